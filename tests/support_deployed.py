"""Holdfast as it is deployed: a Prefect server with its pages, workers, the webhook receiver, and a browser to look at them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Browser, sync_playwright
from support import HOLDFAST, PATIENCE, Lab, holdfast_environment
from support_postgres import Postgres, binaries

import holdfast
from holdfast.flows.server import template_file

PREFECT = Path(sys.executable).with_name("prefect")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = f"no browser: none of {', '.join(BROWSERS)} is on the PATH"
TRIGRAMS = "extension/pg_trgm.control"
NO_TRIGRAMS = "no PostgreSQL with the extension pg_trgm, which Prefect's server needs and the package pgserver lacks"
START_SECONDS = 90.0
WINDOW = {"width": 1440, "height": 900}


def programs_with_trigrams() -> Path | None:
    """Return the folder of PostgreSQL programs that Prefect's server can be run on, or None."""
    found = [binaries(), *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    initdb = shutil.which("initdb")
    found += [Path(initdb).resolve().parent] if initdb else []
    for folder in found:
        if folder is not None and (folder / "initdb").exists():
            words = [str(folder / "pg_config"), "--sharedir"]
            with suppress(OSError, subprocess.CalledProcessError):
                shared = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
                if Path(shared, TRIGRAMS).exists():
                    return folder
    return None


@contextmanager
def postgres_for_prefect() -> Iterator[tuple[str, str]]:
    """Have a PostgreSQL server; yield the URLs of a database for Prefect's server, and of one for experiments.

    Where there is none that Prefect can use, the test is skipped.
    """
    programs = programs_with_trigrams()
    if programs is None:
        pytest.skip(NO_TRIGRAMS)
    with Postgres(programs) as server:
        with server.admin() as connection:
            connection.execute("ALTER USER postgres PASSWORD 'prefect'")
        ours = server.tcp(server.create(empty=True), user="postgres", password="prefect")
        yield ours.replace("+psycopg", "+asyncpg"), server.text(server.create())


class Refused(AssertionError):
    """An HTTP answer that is an error."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


def free_port() -> int:
    """Return a port of the loopback interface that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def http(method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Any:
    """Return the JSON of an answer, None for an empty one; Refused for an error."""
    request = Request(url, body, {"Content-Type": "application/json", **(headers or {})}, method=method)
    try:
        with urlopen(request, timeout=60) as answer:
            text = answer.read()
    except HTTPError as error:
        raise Refused(error.code, error.read().decode(errors="replace")) from None
    return json.loads(text) if text else None


@dataclass
class Process:
    """A program in a session of its own, and what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, log: Path, environment: Mapping[str, str], *command: object) -> Process:
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*map(str, command)],
                cwd=log.parent,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(process, log)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], object], what: str, seconds: float = START_SECONDS) -> None:
        """Wait for what this process brings about; AssertionError with its last words when it ends or does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"{what}: ended with {self.process.returncode}:\n{self.output[-3000:]}"
            assert time.monotonic() < deadline, f"{what}: waited {seconds:g} s in vain:\n{self.output[-3000:]}"
            time.sleep(0.05)

    def kill(self) -> None:
        """End it and everything in its session's group by SIGKILL."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it in order, or by SIGKILL when it takes long."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def answers(url: str) -> bool:
    """Tell whether an address answers."""
    try:
        http("GET", url)
    except (OSError, URLError, Refused):
        return False
    return True


@dataclass
class Site:
    """A server, what is deployed on it, and what runs for it; everything below one folder, and ended by :meth:`close`."""

    folder: Path
    url: str
    environment: dict[str, str]
    server: Process
    started: list[Process] = field(default_factory=list)
    database: str | None = None
    """of the experiments, when it is not beside them"""

    @classmethod
    def start(cls, folder: Path, database: str | None = None, experiments: str | None = None) -> Site:
        """Start a server with its pages, on SQLite below ``folder`` or on the ``database`` of the URL.

        ``experiments`` is the database of the experiments, if it is not beside them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "storage").mkdir()
        if database is None:
            database = f"sqlite+aiosqlite:///{folder}/prefect.db"
            if template_file().exists():  # made by the first server that holdfast starts on this machine
                shutil.copyfile(template_file(), folder / "prefect.db")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        here = holdfast_environment(
            PREFECT_HOME=str(folder / "prefect"),
            PREFECT_API_URL=f"{url}/api",
            PREFECT_SERVER_DATABASE_CONNECTION_URL=database,
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY="PT1S",
            PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="2",
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30",
            PREFECT_WORKER_QUERY_SECONDS="1",
            PREFECT_WORKER_PREFETCH_SECONDS="1",
            PREFECT_RUNNER_POLL_FREQUENCY="1",
            XDG_CACHE_HOME=str(folder / "cache"),
            XDG_DATA_HOME=str(folder / "data"),
            NO_COLOR="1",
            **({} if experiments is None else {"HOLDFAST_DATABASE_URL": experiments}),
        )
        server = Process.start(folder / "server.txt", here, PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port)
        site = cls(folder, url, here, server, [server], experiments)
        try:
            server.until(lambda: answers(f"{url}/api/health"), "the Prefect server")
        except BaseException:
            site.close()
            raise
        return site

    @property
    def storage(self) -> Path:
        """Where the experiments are."""
        return self.folder / "storage"

    def close(self) -> None:
        """End everything, the server last."""
        for process in reversed(self.started):
            process.stop()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Return what Prefect's API answers; Refused when it does not."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(30):
            try:
                return http(method, f"{self.url}/api{path}", data)
            except Refused as refused:
                if refused.code != 503 or attempt == 29:  # its database is busy
                    raise
                time.sleep(1)
        raise AssertionError("the last attempt returns or raises")

    def run(self, *arguments: object, code: int = 0) -> str:
        """Run ``holdfast`` to its end, which must have that exit code; return what it says."""
        done = subprocess.run(
            [str(HOLDFAST), *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == code, f"holdfast {' '.join(map(str, arguments))}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def deploy(self, *arguments: object) -> str:
        """Run ``holdfast deploy`` for the experiments of this site."""
        return self.run("deploy", "--storage", self.storage, "--workdir", self.folder, *arguments)

    def worker(self, pool: str = "holdfast", queue: str | None = None) -> Process:
        """Start a worker, and wait until the server knows it."""
        name = f"worker-{len(self.started)}"
        words: list[object] = ["worker", "start", "--pool", pool, "--type", "process", "--name", name]
        words += ["--work-queue", queue] if queue else []
        worker = Process.start(self.folder / f"{name}.txt", self.environment, PREFECT, *words)
        self.started.append(worker)

        def known() -> bool:
            found = self.ask("POST", f"/work_pools/{pool}/workers/filter", {})
            return name in [each["name"] for each in found]

        worker.until(known, name)
        return worker

    def receiver(self, config: Path) -> str:
        """Start ``holdfast webhook``, and return its address once it is healthy."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        words = [HOLDFAST, "webhook", config, "--port", port]
        receiver = Process.start(self.folder / f"receiver-{port}.txt", self.environment, *words)
        self.started.append(receiver)
        receiver.until(lambda: answers(f"{url}/healthz"), "the receiver")
        return url

    # What Prefect says

    def deployment(self, name: str) -> dict[str, Any]:
        """Return a deployment by FLOW/DEPLOYMENT."""
        found: dict[str, Any] = self.ask("GET", f"/deployments/name/{name}")
        return found

    def start_run(self, deployment: str, parameters: Mapping[str, Any]) -> str:
        """Start a flow run as the UI does; return its id."""
        made = self.deployment(deployment)["id"]
        body = {"parameters": dict(parameters), "state": {"type": "SCHEDULED", "message": "Run from the Prefect UI"}}
        return str(self.ask("POST", f"/deployments/{made}/create_flow_run", body)["id"])

    def runs(self, **filters: Any) -> list[dict[str, Any]]:
        """Return flow runs, oldest first."""
        found: list[dict[str, Any]] = []
        query = {"flow_runs": filters, "sort": "START_TIME_ASC", "limit": 200}
        while page := self.ask("POST", "/flow_runs/filter", {**query, "offset": len(found)}):
            found += page
        return sorted(found, key=lambda run: str(run["created"]))

    def runs_of(self, deployment: str) -> list[dict[str, Any]]:
        """Return the flow runs of a deployment, oldest first."""
        return self.runs(deployment_id={"any_": [self.deployment(deployment)["id"]]})

    def flow_run(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/flow_runs/{run}")
        return found

    def state(self, run: str) -> str:
        """Return the type of the state of a flow run."""
        return str(self.flow_run(run)["state_type"])

    def events(self, prefix: str, resource: str) -> list[dict[str, Any]]:
        """Return the events whose names begin so about a resource, oldest first."""
        query = {
            "filter": {"event": {"prefix": [prefix]}, "resource": {"id": [resource]}, "order": "ASC"},
            "limit": 50,
        }
        page = self.ask("POST", "/events/filter", query)
        found = list(page["events"])
        while page["next_page"]:
            page = http("GET", page["next_page"])
            found += page["events"]
        return found

    def artifact(self, key: str) -> dict[str, Any] | None:
        """Return the newest artifact under a key, or None."""
        with suppress(Refused):
            found: dict[str, Any] = self.ask("GET", f"/artifacts/{key}/latest")
            return found
        return None

    # Searches

    def lab(self, name: str, *, steps: int = 3) -> SiteLab:
        """Return a laboratory for one search, which is called as the laboratory is, below the storage of this site."""
        lab = SiteLab(self.folder / "labs" / name, self.environment, steps=steps, storage=str(self.storage))
        lab.url = self.database
        return lab


class SiteLab(Lab):
    """A laboratory whose experiments are below the storage of a site."""

    url: str | None = None
    """of the database"""

    def open(self, name: str = "exp") -> holdfast.Experiment:
        return holdfast.open(self.path(name), database=self.url)


def browser_program() -> str | None:
    """Return the system's Chromium, or None."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@contextmanager
def browsing() -> Iterator[Browser]:
    """Have a headless browser; where there is none, the test is skipped."""
    program = browser_program()
    if program is None:
        pytest.skip(NO_BROWSER)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()
