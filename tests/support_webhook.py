"""A receiver of webhooks in a process of its own, experiments for it, and those who call it."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import yaml
from starlette.testclient import TestClient

from holdfast.deployments.webhook.app import create_app
from holdfast.deployments.webhook.config import WebhookConfig
from holdfast.deployments.webhook.signatures import key_of, sign
from holdfast.locate import create
from holdfast.testing.samples import sample_spec

STANDARD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="
ROTATED = "whsec_c2Vjb25kIHNlY3JldCBvZiB0aGUgc2VuZGVyISEhISE="
GITHUB = "It's a Secret to Everybody"
SECRETS = {"HOOK_STANDARD": STANDARD, "HOOK_ROTATED": ROTATED, "HOOK_GITHUB": GITHUB}


def make_experiment(storage: Path, name: str) -> Path:
    """Create an experiment that nobody drives; return its folder."""
    with closing(create(sample_spec(name=name, storage=str(storage)), seed=1, workdir=str(storage))) as opened:
        return opened.folder.path


@dataclass
class Prefect:
    """The tests' server."""

    url: str

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method=method)
        for attempt in range(30):
            try:
                with urlopen(request, timeout=30) as answer:
                    text = answer.read()
            except HTTPError as error:
                if error.code != 503 or attempt == 29:  # its database is busy
                    raise
                time.sleep(1)
            else:
                return json.loads(text) if text else None
        raise AssertionError("the last attempt returns or raises")

    def deployment(self, flow: str, name: str) -> str:
        """Make the record of a deployment that no worker serves: its flow runs stay scheduled."""
        made = self.ask("POST", "/flows/", {"name": flow})["id"]
        entrypoint = f"holdfast.flows.{flow}.{flow}"
        body = {"name": name, "flow_id": made, "entrypoint": entrypoint, "enforce_parameter_schema": False}
        return str(self.ask("POST", "/deployments/", body)["id"])

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        query = {"flow_runs": {"deployment_id": {"any_": [deployment]}}, "limit": 200}
        return list(self.ask("POST", "/flow_runs/filter", query))

    def cancel(self, run: str) -> None:
        self.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def kind(self) -> str:
        """The name of a problem, or the status of an answer."""
        if self.status == 202:
            return str(self.body["status"])
        assert self.headers["content-type"] == "application/problem+json", self.headers
        assert self.body["status"] == self.status
        return str(self.body["type"]).removeprefix("urn:holdfast:webhook:")


def signed(scheme: str, body: bytes, *, id: str | None = None, secret: str | None = None, late: int = 0) -> dict[str, str]:
    """Return the headers of a delivery."""
    key = key_of(scheme, secret or (STANDARD if scheme == "standard" else GITHUB), "test")
    headers = sign(scheme, key, body, id=id or uuid.uuid4().hex, timestamp=int(time.time()) - late)
    return {"Content-Type": "application/json", **headers}


@dataclass
class Receiver:
    """``holdfast webhook`` in a process."""

    folder: Path
    environment: Mapping[str, str]
    config: Mapping[str, Any]
    process: subprocess.Popen[str] | None = None
    port: int = 0
    before: list[str] = field(default_factory=list)

    def start(self, *words: str) -> None:
        file = self.folder / "hooks.yaml"
        file.write_text(yaml.safe_dump(dict(self.config), sort_keys=False))
        command = [sys.executable, *(words or ("-m", "holdfast.cli")), "webhook", str(file), "--port", "0"]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**self.environment, **SECRETS},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60)[0], "it did not start in time"
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, f"{line}{self.log()}"
        self.port = int(found.group(1))

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        return self.process.returncode

    def memory(self) -> int:
        """Return the greatest size that its memory ever had, in bytes."""
        assert self.process is not None
        words = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", words)
        assert found
        return int(found.group(1)) << 10

    def connect(self, source: str = "127.0.0.1") -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30, source_address=(source, 0))

    def call(
        self,
        path: str,
        body: bytes | None = b"{}",
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "POST",
        source: str = "127.0.0.1",
    ) -> Reply:
        with closing(self.connect(source)) as connection:
            connection.request(method, path, body, dict(headers or {}))
            return reply(connection)

    def deliver(self, hook: str, body: Any, *, scheme: str = "standard", source: str = "127.0.0.1", **how: Any) -> Reply:
        """Send a signed delivery, and again where Prefect's server was busy, as a sender does."""
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        for tries in range(5):
            time.sleep(min(tries, 1))
            answer = self.call(f"/hooks/{hook}", text, signed(scheme, text, **how), source=source)
            if answer.status != 503 or answer.kind != "prefect":
                break
        return answer

    def raw(self, *parts: bytes, patience: float = 20.0) -> bytes:
        """Send bytes as they are, as far as they are taken; return all that comes back until the connection is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=patience) as connection:
            try:
                for part in parts:
                    connection.sendall(part)
            except OSError:
                pass
            found = b""
            try:
                while data := connection.recv(1 << 16):
                    found += data
            except ConnectionError:
                pass
            return found


def reply(connection: http.client.HTTPConnection) -> Reply:
    """Read the answer."""
    answer = connection.getresponse()
    text = answer.read()
    headers = {key.lower(): value for key, value in answer.getheaders()}
    return Reply(answer.status, headers, json.loads(text) if text else None)


@dataclass
class Scene:
    """One receiver with its experiments and deployments."""

    receiver: Receiver
    prefect: Prefect
    restore: str
    search: str
    folder: Path

    def experiment(self, name: str) -> Path:
        return make_experiment(self.folder / "runs", name)

    def started(self, path: Path | str) -> list[dict[str, Any]]:
        """Return the flow runs that were started for an experiment."""
        return [run for run in self.prefect.runs(self.restore) if run["parameters"].get("path") == str(path)]

    def config(self, **changes: Any) -> dict[str, Any]:
        places = {"roots": [str(self.folder / "runs")], "specs": [str(self.folder / "specs")]}
        return {**self.receiver.config, **places, **changes}


@contextmanager
def client_of(config: Mapping[str, Any], monkeypatch: Any, *, api: str | None = None) -> Iterator[TestClient]:
    """Return a client of a receiver within this process; ``api`` is where it looks for Prefect, "" for nowhere."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    app = create_app(WebhookConfig.model_validate(config))
    changes = {} if api is None else {PREFECT_API_URL: api or None}
    with temporary_settings(changes), TestClient(app, client=("127.0.0.1", 1)) as client:
        yield client
    app.state.receiver.close()


def data_environment(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return an environment whose user's data lie in a folder."""
    return {**environment, "XDG_DATA_HOME": str(folder / "data"), "PATH": os.environ["PATH"]}
