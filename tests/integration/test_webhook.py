"""A real receiver on a real Prefect server: every answer that it gives, what it starts, and what it never starts twice."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from support_webhook import ROTATED, Receiver, Reply, Scene, client_of, signed

from holdfast.cli import main
from holdfast.holding import holder, liveness
from holdfast.locate import open_path
from holdfast.storage import leasing

pytestmark = pytest.mark.xdist_group("webhook")


def test_a_standard_webhook_starts_a_restore(scene: Scene) -> None:
    path = scene.experiment("first")
    body = {"experiment": "first", "restart_errored": True, "changes": {"search.num_trials": 9}}
    answer = scene.receiver.deliver("plain", body)
    assert (answer.status, answer.kind) == (202, "started")
    run = scene.prefect.ask("GET", f"/flow_runs/{answer.body['flow_run_id']}")
    expected = {"path": str(path), "restart_errored": True, "changes": {"search.num_trials": 9}}
    assert run["parameters"] == expected
    assert run["deployment_id"] == scene.restore
    assert {"holdfast", "experiment:first"} <= set(run["tags"])
    assert answer.body["url"] == scene.prefect.url.removesuffix("/api") + f"/runs/flow-run/{run['id']}"


def test_github_starts_a_restore_by_templates(scene: Scene) -> None:
    path = scene.experiment("from-github")
    event = {"action": "completed", "workflow_run": {"name": "from-github"}}

    def send(event: dict[str, Any], kind: str = "workflow_run", id: str = "a") -> Reply:
        body = json.dumps(event).encode()
        headers = {**signed("github", body, id=id), "X-GitHub-Event": kind}
        return scene.receiver.call("/hooks/github", body, headers)

    assert send({"zen": "Keep it logically awesome."}, "ping").body == {"status": "pong"}
    assert send({**event, "action": "requested"}, id="b").body == {"status": "ignored"}
    assert send(event, "push", id="c").kind == "ignored"
    answer = send({**event, "n": 1}, id="d")
    assert (answer.status, answer.kind) == (202, "started")
    assert [run["parameters"] for run in scene.started(path)] == [{"path": str(path), "resume_errored": True}]
    assert send({**event, "n": 1}, id="d").body == answer.body
    again = send({**event, "n": 1}, id="e")  # the signature does not cover the id
    assert (again.status, again.kind) == (409, "replayed")
    assert send({"action": "completed", "workflow_run": {}}, id="f").status == 422


@pytest.fixture(scope="module")
def other(scene: Scene) -> Iterator[Receiver]:
    """A second receiver with the same memory, started after the first one has answered."""
    started = Receiver(scene.folder, scene.receiver.environment, scene.receiver.config)
    started.start()
    yield started
    started.stop()


def test_a_repeated_delivery_gets_the_same_answer_in_every_process(scene: Scene, other: Receiver) -> None:
    path = scene.experiment("repeated")
    body = {"experiment": "repeated"}
    first = scene.receiver.deliver("plain", body, id="twice")
    scene.prefect.cancel(first.body["flow_run_id"])
    assert scene.receiver.deliver("plain", body, id="twice").body == first.body
    assert other.deliver("plain", body, id="twice").body == first.body
    changed = other.deliver("plain", {**body, "resume_errored": True}, id="twice")
    assert (changed.status, changed.kind) == (409, "other-body")
    assert len(scene.started(path)) == 1


def test_simultaneous_deliveries_in_two_processes_start_one_run(scene: Scene, other: Receiver) -> None:
    same, several = scene.experiment("same"), scene.experiment("several")
    gate = threading.Barrier(8)

    def send(place: int, name: str, id: str) -> Reply:
        gate.wait()
        receiver = (scene.receiver, other)[place % 2]
        while (answer := receiver.deliver("plain", {"experiment": name}, id=id)).kind == "busy":
            pass  # as it says: try again
        return answer

    with ThreadPoolExecutor(8) as pool:
        replies = [*pool.map(lambda place: send(place, "same", "one-id"), range(8))]
        assert {(one.status, json.dumps(one.body)) for one in replies} == {(202, json.dumps(replies[0].body))}
        found = [*pool.map(lambda place: send(place, "several", f"id-{place}"), range(8))]
    assert len(scene.started(same)) == len(scene.started(several)) == 1
    assert sorted(one.kind for one in found) == ["started"] + ["waiting"] * 7
    run = next(one for one in found if one.status == 202).body["flow_run_id"]
    assert {one.body["flow_run_id"] for one in found} == {run}


CRASHES = """
import os, signal, sys
from holdfast.deployments.webhook import starting
started = starting.Api.start
async def dies(self, *arguments, **named):
    await started(self, *arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)
starting.Api.start = dies
from holdfast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_crash_between_storing_and_answering_starts_nothing_twice(scene: Scene) -> None:
    path = scene.experiment("crashed")
    dying = Receiver(scene.folder, scene.receiver.environment, scene.receiver.config)
    dying.start("-c", CRASHES)
    with pytest.raises(ConnectionError):
        dying.deliver("plain", {"experiment": "crashed"}, id="crash")
    assert dying.process is not None
    assert dying.process.wait(30) == -signal.SIGKILL
    dying.process.communicate()
    (run,) = scene.started(path)
    # By another process, at once: the claim of a dead one is none.
    answer = scene.receiver.deliver("plain", {"experiment": "crashed"}, id="crash")
    assert (answer.status, answer.body["flow_run_id"]) == (202, run["id"])
    assert len(scene.started(path)) == 1


def test_what_is_driven_or_waits_is_told(scene: Scene) -> None:
    path = scene.experiment("driven")
    with closing(open_path(path)) as opened:
        claimant = leasing.Claimant(holder=holder(), liveness=liveness, say=print)
        keeper = leasing.take(opened.database, opened.record.id, opened.folder, claimant, action="taken", detail={},
                              uuid=opened.record.uuid)  # fmt: skip
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        answer = scene.receiver.deliver("plain", {"experiment": "driven"}, id="driven")
        assert (answer.status, answer.kind) == (409, "running")
        assert answer.body["holder"] == f"process {holder()['pid']} on {holder()['hostname']}"
        assert "T" in answer.body["expires"]
        assert 0 < int(answer.headers["retry-after"]) <= 31
        assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
        assert scene.receiver.deliver("plain", {"experiment": "driven", "force": True}).status == 422
        forced = scene.receiver.deliver("strong", {"experiment": "driven", "force": True})
        assert forced.status == 202
        scene.prefect.cancel(forced.body["flow_run_id"])
        keeper.release(None)
    assert scene.receiver.deliver("plain", {"experiment": "driven"}, id="driven").status == 202  # who was refused may try again
    waiting = scene.receiver.deliver("plain", {"experiment": "driven"})
    assert (waiting.status, waiting.kind) == (409, "waiting")
    assert len(scene.started(path)) == 2


def test_a_search_is_started_by_a_spec(scene: Scene) -> None:
    spec = str(scene.folder / "specs" / "looked-for.yaml")
    body = {"spec": "looked-for.yaml", "overrides": {"search.seed": 7, "name": "seven"}}
    answer = scene.receiver.deliver("looks", body)
    assert answer.status == 202
    run = scene.prefect.ask("GET", f"/flow_runs/{answer.body['flow_run_id']}")
    assert run["parameters"] == {"spec": spec, "overrides": ["search.seed=7", 'name="seven"']}
    assert scene.receiver.deliver("looks", {"spec": "../hooks.yaml"}).status == 404
    assert scene.receiver.deliver("looks", {"spec": "block:other"}).status == 404
    assert scene.receiver.deliver("looks", {"spec": "looked-for.yaml", "overrides": {"trainable": "x.py:y"}}).status == 422
    scene.experiment("looked-for")
    taken = scene.receiver.deliver("looks", {"spec": "looked-for.yaml"})
    assert (taken.status, taken.kind) == (409, "experiment-exists")


def test_every_other_answer(scene: Scene) -> None:
    receiver, body = scene.receiver, b'{"experiment": "first"}'
    assert receiver.deliver("plain", {"experiment": "not-there"}).kind == "no-such-experiment"
    assert receiver.call("/hooks/unknown", body, signed("standard", body)).kind == "no-such-hook"
    assert receiver.call("/elsewhere", method="GET", body=None).kind == "no-such-page"
    got = receiver.call("/hooks/plain", method="GET", body=None)
    assert (got.status, got.headers["allow"]) == (405, "POST")
    assert receiver.call("/hooks/plain", body, {"Content-Type": "text/plain"}).status == 415
    assert receiver.call("/hooks/plain", body, {**signed("standard", body), "Content-Encoding": "gzip"}).status == 415
    assert receiver.call("/hooks/plain", body, {"Content-Type": "application/json"}).kind == "signature"
    assert receiver.deliver("plain", b"{").status == 400
    refused = receiver.deliver("plain", {"experiment": 3, "trainable": "x.py:y"})
    assert refused.status == 422
    assert {error["pointer"] for error in refused.body["errors"]} == {"#", "#/experiment"}
    lost = receiver.deliver("lost", {"experiment": "first"})
    assert (lost.status, lost.kind) == (503, "prefect")
    assert receiver.deliver("rare", {"experiment": "first"}).kind == "secret"
    assert receiver.call("/healthz", None, method="GET").body == {"status": "ok", "prefect": True}
    described = receiver.call("/openapi.json", None, method="GET").body
    assert set(described["paths"]) == {"/healthz", *(f"/hooks/{name}" for name in receiver.config["hooks"])}


def test_keys_are_changed_without_a_gap(scene: Scene) -> None:
    scene.experiment("rotated")
    assert scene.receiver.deliver("plain", {"experiment": "rotated"}, secret=ROTATED).status == 202


def test_prefect_away_is_told_and_may_be_repeated(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is back, and then the same delivery is taken."""
    path = scene.experiment("patient")
    body = b'{"experiment": "patient"}'
    memory = {"database": f"sqlite:///{scene.folder / 'data' / 'holdfast' / 'webhook.db'}"}
    with client_of(scene.config(memory=memory), monkeypatch, api="http://127.0.0.1:9/api") as client:
        answer = client.post("/hooks/plain", content=body, headers=signed("standard", body, id="patient"))
        assert (answer.status_code, answer.json()["title"]) == (503, "prefect")
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/healthz").json() == {"status": "ok", "prefect": False}
    with client_of(scene.config(memory=memory), monkeypatch, api="") as client:
        assert client.get("/healthz").json() == {"status": "ok", "prefect": False}
        assert client.post("/hooks/plain", content=body, headers=signed("standard", body)).status_code == 503
    assert scene.receiver.deliver("plain", {"experiment": "patient"}, id="patient").status == 202
    assert len(scene.started(path)) == 1


def test_who_calls_too_often_is_told_to_wait(scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = {"per_client": {"times": 5, "seconds": 1000}, "per_hook": {"times": 2, "seconds": 1000}}
    config = scene.config(limits=limits, memory={"database": f"sqlite:///{tmp_path / 'hooks.db'}"})
    body = b'{"experiment": "not-there"}'
    with client_of(config, monkeypatch) as client:
        found = [client.post("/hooks/plain", json={}).status_code for _ in range(6)]
        assert found == [401] * 5 + [429]
        # Another client is not held up by that one; and what is not signed does not use up a hook.
        client._transport.client = ("127.0.0.2", 1)  # type: ignore[attr-defined]
        replies = [client.post("/hooks/plain", content=body, headers=signed("standard", body)) for _ in range(3)]
        assert [one.status_code for one in replies] == [404, 404, 429]
        assert int(replies[2].headers["retry-after"]) >= 1


def test_a_receiver_that_cannot_serve_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hooks.yaml"
    hook = {"signature": "standard", "secrets": {"env": "NOT_SET_ANYWHERE"}}
    file.write_text(yaml.safe_dump({"roots": ["."], "hooks": {"plain": hook}, "memory": {"database": "sqlite:///m.db"}}))
    assert main(["webhook", str(file), "--port", "0"]) == 2
    assert "environment variable NOT_SET_ANYWHERE is not set" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [file]


def test_the_log_has_one_clean_line_a_delivery(scene: Scene) -> None:
    before = scene.receiver.log()
    scene.receiver.deliver("plain", {"experiment": "secret-name\n2026 forged line"}, id="logged")
    scene.receiver.raw(b"POST /hooks/evil%0aforged HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    deadline = time.monotonic() + 20
    while len(added := scene.receiver.log()[len(before) :].splitlines()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(added) == 2
    assert "hook=plain client=127.0.0.1 delivery=logged status=404 no-such-experiment" in added[0]
    assert "hook=- client=127.0.0.1 delivery=- status=404 no-such-hook" in added[1]
    assert not any("secret-name" in line or "forged" in line for line in added)
