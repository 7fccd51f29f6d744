"""Where experiments of a receiver may be: on object stores, behind blocks; and those who send by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from s3_server import S3
from starlette.testclient import TestClient
from support_webhook import GITHUB, STANDARD, Scene, client_of, make_experiment, signed

from holdfast.flows.blocks import HoldfastSpec, HoldfastStorage, register
from holdfast.holding import holder, liveness
from holdfast.locate import create, open_path
from holdfast.storage import leasing
from holdfast.testing.samples import sample_spec

pytestmark = pytest.mark.xdist_group("webhook")

EXAMPLES = Path(__file__).parents[2] / "examples" / "webhooks"
CANARY = "canary-of-the-hooks-block"


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a configuration of a receiver in this process has beside its places; its data lie in the test's folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    secret = {"signature": "standard", "secrets": {"env": "HOOK_STANDARD"}}
    return {
        "memory": {"database": f"sqlite:///{tmp_path / 'hooks.db'}"},
        "hooks": {
            "plain": {**secret, "deployment": "restore/hooked"},
            "looks": {**secret, "deployment": "search/hooked", "runs": "search"},
        },
    }


@contextmanager
def driven(location: str | Path, options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Drive an experiment in the body."""
    with closing(open_path(location, options=options)) as opened:
        claimant = leasing.Claimant(holder=holder(), liveness=liveness, say=print)
        keeper = leasing.take(opened.database, opened.record.id, opened.folder, claimant, action="taken", detail={},
                              uuid=opened.record.uuid)  # fmt: skip
        yield
        keeper.release(None)


def asked(client: TestClient, **body: Any) -> tuple[int, str]:
    """Deliver a body; return status and kind."""
    content = json.dumps(body).encode()
    hook = f"/hooks/{'looks' if 'spec' in body else 'plain'}"
    for _ in range(5):
        answer = client.post(hook, content=content, headers=signed("standard", content))
        told = answer.json()
        if answer.status_code != 503 or not told["type"].endswith(":prefect"):
            break
        time.sleep(1)  # Prefect's server was busy: it is to be sent again, as the answer says
    return answer.status_code, told["status"] if answer.status_code == 202 else told["type"].rpartition(":")[2]


def put(bucket: str, s3: S3, name: str) -> str:
    """Create an experiment on the object store; return its URL."""
    spec = sample_spec(name=name, storage=f"{bucket}/lab", storage_options=s3.options)
    with closing(create(spec, seed=1, workdir=".")) as opened:
        return opened.folder.location


def test_what_lies_on_an_object_store(scene: Scene, s3: S3, beside: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By its URL, with credentials of the environment; and by a block, whose credentials are nowhere else."""
    bucket = s3.bucket()
    url, other = put(bucket, s3, "far"), put(bucket, s3, "blocked")
    with temporary_settings({PREFECT_API_URL: scene.prefect.url}):
        register()
        options = {"config_kwargs": {"user_agent_extra": CANARY}}
        block = HoldfastStorage(location=f"{bucket}/lab", endpoint=s3.endpoint, secret_options=options,
                                key=s3.options["key"], secret=s3.options["secret"])  # fmt: skip
        block.save("hooks-far", overwrite=True)
    for roots, name, path, own in (
        ([{"location": f"{bucket}/lab", "storage_options": {"endpoint_url": s3.endpoint}}], "far", url, s3.environment),
        (["block:hooks-far"], "blocked", "block:hooks-far/blocked", {}),
    ):
        with monkeypatch.context() as patch:
            for key, value in own.items():
                patch.setenv(key, value)
            with client_of(
                {**beside, "roots": roots, "hooks": {"plain": beside["hooks"]["plain"]}}, patch, api=scene.prefect.url
            ) as client:
                with driven(url if own else other, s3.options):
                    assert asked(client, experiment=name) == (409, "running")
                for bad in (
                    "nobody",
                    f"{name}?versionId=1",
                    f"{name}#x",
                    f"{name}%2f..",
                    f"{bucket}/other/{name}",
                    f"{name}/..",
                ):
                    assert asked(client, experiment=bad) == (404, "no-such-experiment"), bad
                assert asked(client, experiment=name) == (202, "started")
                (run,) = scene.started(path)
                scene.prefect.cancel(run["id"])
                assert CANARY not in str(run)
                s3.fault("403", method="GET", part="lease.json", count=99)
                s3.fault("403", method="HEAD", part="experiment.json", count=99)
                s3.fault("403", method="GET", part="experiment.json", count=99)
                assert asked(client, experiment=name)[0] == 503
                s3.fault("clear")
                assert CANARY not in str(client.get("/openapi.json").json())
    rows = (Path(beside["memory"]["database"].removeprefix("sqlite:///"))).read_bytes()
    assert CANARY.encode() not in rows


def test_what_blocks_stand_for(
    scene: Scene, beside: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Is looked at as if it were named itself: no link leads out of it, and what is driven is told."""
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    near, hidden = make_experiment(runs, "near"), make_experiment(outside, "hidden")
    (runs / "link").symlink_to(hidden)
    name = f"spec-{uuid.uuid4().hex[:6]}"
    with temporary_settings({PREFECT_API_URL: scene.prefect.url}):
        register()
        HoldfastStorage(location=str(runs)).save("hooks-near", overwrite=True)
        saved = sample_spec(name=name, storage="block:hooks-near").model_dump(mode="json", exclude_unset=True)
        HoldfastSpec(spec={**saved, "storage": "block:hooks-near"}).save("hooks-spec", overwrite=True)
        HoldfastSpec(spec={**saved, "storage": "block:hooks-gone"}).save("hooks-lost", overwrite=True)
    config = {**beside, "roots": ["block:hooks-near", "block:hooks-nobody"], "specs": ["block:*"]}
    with client_of(config, monkeypatch, api=scene.prefect.url) as client:
        with driven(near):
            assert asked(client, experiment="near") == (409, "running")
        assert asked(client, experiment="near") == (202, "started")
        assert asked(client, experiment="block:hooks-near/near") == (409, "waiting")
        (run,) = scene.started("block:hooks-near/near")
        scene.prefect.cancel(run["id"])
        # The second root names a block that nobody saved: nothing can be said of what is not in the first one.
        assert asked(client, experiment="nobody") == (503, "storage")
        assert asked(client, experiment="link") == (503, "storage")
        assert asked(client, spec="block:hooks-spec") == (202, "started")
        make_experiment(runs, name)
        assert asked(client, spec="block:hooks-spec") == (409, "experiment-exists")
        assert asked(client, spec="block:hooks-lost") == (503, "storage")
        assert asked(client, spec="block:hooks-none") == (503, "storage")
        assert "block:hooks-nobody names no block HoldfastStorage" in caplog.text
    with client_of({**config, "roots": ["block:hooks-near"]}, monkeypatch, api=scene.prefect.url) as client:
        assert asked(client, experiment="nobody") == (404, "no-such-experiment")
        assert asked(client, experiment="link") == (404, "no-such-experiment")
        assert asked(client, experiment="link/hidden") == (404, "no-such-experiment")
    for api in ("", "http://127.0.0.1:9/api"):
        with client_of(config, monkeypatch, api=api) as client:
            assert asked(client, experiment="near")[0] == 503
            assert asked(client, spec="block:hooks-spec")[0] == 503


@pytest.fixture
def run(scene: Scene) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script of the examples; what it is told goes to the receiver."""
    lacking = [program for program in ("sh", "curl", "python3") if shutil.which(program) is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} is not installed")

    def run(script: str, hook: str, *words: str, **secrets: str) -> subprocess.CompletedProcess[str]:
        url = f"http://127.0.0.1:{scene.receiver.port}/hooks/{hook}"
        command = [str(EXAMPLES / script), url, *words]
        return subprocess.run(command, env={"PATH": os.environ["PATH"], **secrets}, capture_output=True, text=True, timeout=60)

    return run


def test_the_examples_sign_what_they_send(scene: Scene, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    path = scene.experiment("by hand é")
    body = '{"experiment": "by hand é"}'
    said = run("send.sh", "plain", body, HOOK_SECRET=STANDARD)
    assert said.stdout.startswith("HTTP/1.1 202"), said
    (found,) = scene.started(path)
    assert found["id"] in said.stdout
    wrong = run("send.sh", "plain", body, HOOK_SECRET="whsec_" + "A" * 43)  # not padded, as some make them
    assert wrong.stdout.startswith("HTTP/1.1 401"), wrong
    assert wrong.returncode != 0
    assert run("send.sh", "plain", body).returncode != 0  # no secret
    event = '{"action": "completed", "workflow_run": {"name": "by hand é"}, "sender": "send_github.sh"}'
    waits = run("send_github.sh", "github", "workflow_run", event, GITHUB_HOOK_SECRET=GITHUB)
    assert waits.stdout.startswith("HTTP/1.1 409"), waits
    assert found["id"] in waits.stdout
    scene.prefect.cancel(found["id"])
    said = run("send_github.sh", "github", "workflow_run", event, GITHUB_HOOK_SECRET=GITHUB)
    assert said.stdout.startswith("HTTP/1.1 202"), said
    assert run("send_github.sh", "github", "ping", '{"zen": "x"}', GITHUB_HOOK_SECRET=GITHUB).stdout.endswith('"pong"}')
