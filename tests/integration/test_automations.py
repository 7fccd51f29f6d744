"""Self-healing on a real server: what the automations take notice of, and what a watch makes of it; once for each crash."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_sync
from support import DIED, Lab
from support_own_server import Own, at_once

from holdfast.deployments.deploy import Wanted, deploy
from holdfast.flows.collect import collect
from holdfast.flows.naming import COLLECT, RESTORE, TAG, WATCH
from holdfast.flows.watch import watch

pytestmark = pytest.mark.xdist_group("own-server")

SILENCE = 20


@pytest.fixture(scope="module")
def server(own_server: Own, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    """A server that is this module's own meanwhile: automations are global to one."""
    with own_server.used() as own:
        folder = tmp_path_factory.mktemp("healing")
        deploy(Wanted(workdir=str(folder), silence=SILENCE), lambda text: None)
        yield own


@pytest.fixture
def lab(server: Own, tmp_path: Any) -> Iterator[Lab]:
    made = Lab(tmp_path / "lab", server.environment)
    yield made
    made.close()


def kinds(server: Own, runs: dict[str, str]) -> dict[str, str]:
    return {name: server.type_of(run) for name, run in runs.items()}


def test_silence_makes_our_runs_crashed_and_a_crash_is_looked_after(server: Own) -> None:
    """Nobody else's, and none that is over, not begun, or left; what crashes again and again is looked after in time."""
    runs = {
        "ours": server.flow_run("search", [TAG, "experiment:a"]),
        "foreign": server.flow_run("search", ["team-b"]),
        "untagged": server.flow_run("train", []),
        "left": server.flow_run("restore", [TAG]),
        "finished": server.flow_run("search", [TAG]),
        "pending": server.flow_run("search", [TAG], "PENDING"),
    }
    tags = {"foreign": ["team-b"], "untagged": []}
    # The process of one beat once more after it was suspended, and then said that it ends. Its word counts, not the event of
    # its state: that waits for the event of the state before, and the server may look at a heartbeat later than at either.
    server.set_state(runs["left"], "PAUSED", name="Suspended")
    for name in ("finished", "left"):
        server.send("prefect.flow-run.heartbeat", runs[name], [TAG])
    # The server takes two events at a time, in any order: what ends the waiting comes once the beats are known.
    server.until(lambda: all(beats(server, runs[name]) for name in ("finished", "left")))
    server.set_state(runs["finished"], "COMPLETED")
    server.send("holdfast.flow-run.left", runs["left"], [TAG])
    for name in ("foreign", "untagged", "ours"):
        server.send("prefect.flow-run.heartbeat", runs[name], tags.get(name, [TAG]))
    # That a beat is known does not say that the automation has looked at it: what came too early for that comes once more.
    server.send("holdfast.flow-run.left", runs["left"], [TAG])
    server.until(lambda: server.type_of(runs["ours"]) == "CRASHED")
    server.until(lambda: len(server.runs_of(WATCH)) == 1)
    (looking,) = server.runs_of(WATCH)
    assert looking["parameters"] == {"storages": ["./runs"], "deployment": RESTORE}
    assert TAG in looking["tags"]
    message = server.ask("GET", f"/flow_runs/{runs['ours']}")["state"]["message"]
    assert "no heartbeat" in message
    # Those that were heard of at the same moment would have been called Crashed by now; another one's silence proves it.
    last = server.flow_run("restore", [TAG])
    server.send("prefect.flow-run.heartbeat", last, [TAG])
    server.until(lambda: server.type_of(last) == "CRASHED")
    expected = {
        "ours": "CRASHED",
        "foreign": "RUNNING",
        "untagged": "RUNNING",
        "left": "PAUSED",
        "finished": "COMPLETED",
        "pending": "PENDING",
    }
    assert kinds(server, runs) == expected
    server.until(lambda: len(server.runs_of(WATCH)) == 2)
    # A foreign crash, and one of collect, start nothing; a watch that crashes is followed by one in five minutes.
    server.set_state(runs["foreign"], "CRASHED")
    server.set_state(server.flow_run("collect", [TAG]), "CRASHED")
    server.set_state(looking["id"], "CRASHED")
    server.set_state(server.flow_run("search", [TAG]), "FAILED")
    server.until(lambda: len(server.runs_of(WATCH)) == 4)
    later = [run for run in server.runs_of(WATCH) if start_of(run) > datetime.now(UTC) + timedelta(seconds=200)]
    assert len(later) == 1
    for run in server.runs_of(WATCH):
        server.ask("DELETE", f"/flow_runs/{run['id']}")
    assert server.runs_of(COLLECT) == []


def beats(server: Own, run: str) -> int:
    """Return how many heartbeats of a flow run the server has recorded."""
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run}"]}}
    return int(server.ask("POST", "/events/filter", {"filter": wanted, "limit": 10})["total"])


def start_of(run: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(run["expected_start_time"])


def looked(server: Own, lab: Lab, *, key: str | None = None) -> dict[str, Any]:
    """Run the deployment watch over a laboratory in this process, as a worker does; return what it found of its experiment."""
    with get_client(sync_client=True) as client:
        parameters = {"storages": [str(lab.folder / "runs")]}
        identity = uuid.UUID(server.deployment(WATCH)["id"])
        made = client.create_flow_run_from_deployment(identity, parameters=parameters, idempotency_key=key)
        run = client.read_flow_run(made.id)
    told: Any = run_flow_sync(watch, flow_run=run, parameters=run.parameters)
    (row,) = told["experiments"]
    return dict(row)


def restores(server: Own, lab: Lab, name: str) -> list[dict[str, Any]]:
    path = str(lab.path(name))
    return [run for run in server.runs_of(RESTORE) if run["parameters"].get("path") == path]


def watches(server: Own, lab: Lab) -> list[dict[str, Any]]:
    """Return the watches of a laboratory that are still to come."""
    storages = [str(lab.folder / "runs")]
    found = [run for run in server.runs_of(WATCH) if run["parameters"].get("storages") == storages]
    return [run for run in found if run["state_type"] == "SCHEDULED"]


def actions(lab: Lab, name: str) -> list[str]:
    with lab.open(name) as experiment:
        return [row.action for row in experiment.audit()]


def test_many_watches_and_a_person_restore_once_and_the_next_one_is_scheduled_for_its_time(server: Own, lab: Lab) -> None:
    lab.run("run", lab.spec(name="healed", recovery={"delay": 900}), fault="checkpoint.committed:2", code=DIED)
    person = lab.start("watch", lab.folder / "runs", "--deployment", RESTORE)
    found = at_once(*[partial(looked, server, lab)] * 3)
    assert person.wait().code == 0
    assert sum((row["result"] or "").startswith("handed over") for row in found) <= 1
    assert actions(lab, "healed").count("recovering") == 1
    (first,) = restores(server, lab, "healed")
    with lab.open("healed") as experiment:
        assert first["idempotency_key"] == f"holdfast-{experiment.id}-1-1"
    assert watches(server, lab) == []
    # It crashes before it has done anything: the next one is due in a quarter of an hour, and one watch comes then.
    server.set_state(first["id"], "CRASHED")
    rows = [looked(server, lab) for _ in range(3)]
    assert {row["verdict"] for row in rows} == {"waits"}
    (coming,) = watches(server, lab)
    due = datetime.fromisoformat(rows[0]["next"])
    assert abs((start_of(coming) - due).total_seconds()) < 5
    assert coming["idempotency_key"] == f"holdfast-watch-{rows[0]['id']}-1-2"
    # That one came, too early: another one is made.
    server.set_state(coming["id"], "COMPLETED")
    looked(server, lab)
    (again,) = watches(server, lab)
    assert again["idempotency_key"].endswith("-1-2-2")
    assert len(restores(server, lab, "healed")) == 1


def test_a_restore_that_a_person_cancels_before_it_begins_is_not_made_again(server: Own, lab: Lab) -> None:
    lab.run("run", lab.spec(name="unwanted", recovery={"delay": 900}), fault="checkpoint.committed:2", code=DIED)
    assert (looked(server, lab)["result"] or "").startswith("handed over")
    (first,) = restores(server, lab, "unwanted")
    words = f"flow run {first['id']}, which was to restore it, was cancelled in Prefect; `holdfast restore"
    server.set_state(first["id"], "CANCELLED")
    before = actions(lab, "unwanted")
    dry = json.loads(lab.run("watch", lab.folder / "runs", "--dry-run", "--json").output)["experiments"][0]
    assert (dry["verdict"], dry["next"], words in dry["why"]) == ("left alone", None, True)
    assert actions(lab, "unwanted") == before
    for is_forgotten in (False, True):
        if is_forgotten:
            server.ask("DELETE", f"/flow_runs/{first['id']}")
        row = looked(server, lab)
        assert (row["verdict"], row["result"], row["next"], words in row["why"]) == ("left alone", None, None, True)
    # It was noted once, and holds where Prefect forgets, and where no Prefect is.
    assert actions(lab, "unwanted") == [*before, "recovery ended"]
    away = json.loads(lab.run("watch", lab.folder / "runs", "--json", PREFECT_API_URL="").output)["experiments"][0]
    assert (away["verdict"], words in away["why"]) == ("left alone", True)
    assert watches(server, lab) == []
    # What a person restores, and crashes again, is looked after again.
    lab.run("restore", lab.path("unwanted"), fault="checkpoint.committed:2", code=DIED)
    assert (looked(server, lab)["result"] or "").startswith("handed over")
    (second,) = restores(server, lab, "unwanted")
    # What Prefect cancels by itself is nobody's wish.
    server.set_state(second["id"], "CANCELLED", message="Deployment concurrency limit reached.")
    assert looked(server, lab)["verdict"] == "waits"


def test_a_lease_of_a_host_that_is_gone_is_waited_for_by_one_watch(server: Own, lab: Lab) -> None:
    """Prefect says Crashed before the lease has run out; while Prefect says that it runs, nobody is looked for."""
    lab.run("run", lab.spec(name="away"), fault="checkpoint.committed:2", code=DIED)
    with closing(sqlite3.connect(lab.database)) as connection, connection:
        (text,) = connection.execute("SELECT holder FROM experiment").fetchone()
        holder = {**json.loads(text), "host": "elsewhere", "boot": "another", "boot_id": "another"}
        ends = int((datetime.now(UTC) + timedelta(seconds=3600)).timestamp())
        connection.execute("UPDATE experiment SET holder = ?, lease_expires = ?", (json.dumps(holder), ends))
    (drove,) = server.every("flow_runs", flow_runs={"name": {"any_": ["away"]}})
    server.set_state(drove["id"], "RUNNING")
    row = looked(server, lab)
    assert row["verdict"] == "left alone"
    assert "drives it" in row["why"]
    assert watches(server, lab) == []
    server.set_state(drove["id"], "CRASHED")
    for _ in range(2):
        looked(server, lab)
    (coming,) = watches(server, lab)
    assert coming["idempotency_key"].endswith("-1-lease")
    assert 3000 < (start_of(coming) - datetime.now(UTC)).total_seconds() < 3700
    # Who still renews its lease then is alive, whatever Prefect says: it is not looked for again and again.
    server.set_state(coming["id"], "COMPLETED")
    looked(server, lab)
    assert watches(server, lab) == []
    assert "recovering" not in actions(lab, "away")


def test_what_cannot_be_looked_at_is_tried_again_where_no_schedule_does(server: Own, lab: Lab) -> None:
    lab.run("run", lab.spec(name="hidden"), fault="checkpoint.committed:2", code=DIED)
    lab.database.write_bytes(b"no database")
    assert looked(server, lab)["verdict"] == "unreadable"
    (coming,) = watches(server, lab)
    assert 200 < (start_of(coming) - datetime.now(UTC)).total_seconds() < 400
    deployment = server.deployment(WATCH)
    (schedule,) = deployment["schedules"]
    server.ask("DELETE", f"/flow_runs/{coming['id']}")
    server.ask("PATCH", f"/deployments/{deployment['id']}/schedules/{schedule['id']}", {"active": True})
    try:
        looked(server, lab)
        assert watches(server, lab) == []
    finally:
        server.ask("PATCH", f"/deployments/{deployment['id']}/schedules/{schedule['id']}", {"active": False})


def test_collect_is_named_logs_and_leaves_a_table(server: Own, lab: Lab) -> None:
    lab.run("run", lab.spec(name="littered"), fault="checkpoint.committed:2", code=DIED)
    told = collect([str(lab.folder / "runs")], dry_run=True)
    assert [row["name"] for row in told["experiments"]] == ["littered"]
    (run,) = server.every("flow_runs", flow_runs={"name": {"any_": ["collect runs"]}})
    assert run["state_type"] == "COMPLETED"
    (table,) = server.every("artifacts", artifacts={"flow_run_id": {"any_": [run["id"]]}})
    assert table["key"].startswith("holdfast-collect-runs-")
    assert [row["experiment"] for row in json.loads(table["data"])] == ["littered"]
