"""Searches that were cut off are restored by ``holdfast watch``, and only those; on real processes."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from support import DIED, Lab, MakeLab, executed, starts

from holdfast.cli import main
from holdfast.flows.abandoned import Claimed, Places, Row
from holdfast.flows.launching import Restoring
from holdfast.flows.watching import Surroundings, Watch


def watch(lab: Lab, *arguments: object, code: int | None = 0, **options: Any) -> dict[str, Any]:
    """Watch once; return the summary by experiment."""
    ended = lab.run("watch", lab.folder / "runs", "--json", *arguments, code=code, **options)
    return {row["name"]: row for row in json.loads(json_of(ended.output))["experiments"]}


def json_of(output: str) -> str:
    """Return the JSON object in an output that has other lines before it."""
    return output[output.index("{\n") :]


def look(lab: Lab) -> dict[str, Row]:
    """Look as ``watch`` does, in this process, where a restore must not be due; return the rows by experiment."""
    places = Places(storages=(str(lab.folder / "runs"),))
    found = Watch(places, NoRestores(), Surroundings(say=str, warn=str)).look()
    return {row.name: row for row in found}


class NoRestores:
    awaits = True

    def check(self) -> None: ...

    def start(self, claimed: Claimed) -> Restoring:
        raise AssertionError(f"{claimed.examined.row} was to be left alone")


def actions(lab: Lab, name: str = "exp") -> list[str]:
    with lab.open(name) as experiment:
        return [row.action for row in experiment.audit()]


def died(lab: Lab, name: str = "exp", *, fault: str = "checkpoint.committed:5", **changes: Any) -> None:
    lab.run("run", lab.spec(name=name, **changes), fault=fault, code=DIED)


def test_a_killed_search_is_restored_once_and_ends_as_if_nothing_had_happened(make_lab: MakeLab) -> None:
    whole, lab = make_lab("whole"), make_lab("cut")
    whole.run("run", whole.spec())
    died(lab)
    seen = watch(lab, "--dry-run")["exp"]
    assert (seen["verdict"], seen["cause"], seen["result"]) == ("restore", "lost", None)
    assert actions(lab) == ["created", "started", "driving"]
    lab.run("watch", lab.folder / "runs", fault="watch.claimed", code=DIED)
    assert actions(lab)[-1] == "recovering"
    assert watch(lab)["exp"]["verdict"] == "waits"  # a claimed restore that died is tried again, after the delay
    set_recovery(lab, delay=0)
    found = watch(lab)["exp"]
    assert (found["verdict"], found["result"], found["restores"]) == ("restore", "restored", 1)
    assert lab.outcome() == whole.outcome()
    assert starts(lab.log(), 0) == [(1, 0)]
    assert executed(lab.log(), 1) == [0, 1, 2]
    rows = actions(lab)
    assert rows.count("recovering") == 2
    assert rows.count("restored") == 1
    assert rows[-1] == "recovery ended"
    ended = lab.light("watch", lab.folder / "runs")
    assert "left alone" in ended.output
    assert actions(lab) == rows


def set_recovery(lab: Lab, name: str = "exp", **changes: Any) -> None:
    """Change the stored section, as a restore with ``--set`` does, without a restore."""
    with closing(sqlite3.connect(lab.database)) as connection, connection:
        ((body,),) = connection.execute("SELECT spec FROM experiment WHERE name = ?", (name,))
        spec = json.loads(body)
        spec["recovery"].update(changes)
        connection.execute("UPDATE experiment SET spec = ? WHERE name = ?", (json.dumps(spec), name))


def test_two_watches_at_once_restore_once(lab: Lab) -> None:
    died(lab, search={"num_trials": 2})
    watches = [lab.start("watch", lab.folder / "runs") for _ in range(2)]
    for each in watches:
        assert each.wait().code == 0, each.output
    rows = actions(lab)
    assert (rows.count("recovering"), rows.count("restored")) == (1, 1), rows
    assert lab.statuses() == ["COMPLETED"] * 2


KILLER = """\
{rest}

steady = train


def train(trial):
    met = HERE / "orders" / "met"
    if trial.number == 2 or (trial.number == 1 and not met.exists()):
        met.touch()
        os.kill(os.getppid(), 9)
        time.sleep(3600)
    steady(trial)
"""


def test_a_search_that_dies_each_time_is_given_up_and_one_that_gets_on_is_not(lab: Lab) -> None:
    """The first restore gets trial 1 done, so that two more are made."""
    file = lab.folder / "train.py"
    file.write_text(KILLER.format(rest=file.read_text()))
    recovery = {"max_restores": 2, "delay": 0.02, "max_delay": 0.03}
    lab.run("run", lab.spec(name="killer", search={"num_trials": 3}, recovery=recovery), code=DIED)
    restores = []
    while (seen := watch(lab, code=None)["killer"])["verdict"] != "gave up":
        assert seen["verdict"] in ("waits", "restore")
        if seen["verdict"] == "restore":
            assert seen["result"] == "cut off: exit code 137"
            restores.append(seen["restores"])
    assert restores == [0, 0, 1]
    assert "2 restores in a row got nothing done" in seen["why"]
    assert f"holdfast restore {lab.path('killer')}" in seen["why"]
    again = look(lab)["killer"]
    assert (again.verdict, again.why) == ("gave up", seen["why"])
    with lab.open("killer") as experiment:
        rows = experiment.audit()
    assert [row.action for row in rows].count("recovery gave up") == 1
    claims = [row.detail["at"] for row in rows if row.action == "recovering"]
    assert claims[2] - claims[1] >= 0.02
    assert lab.statuses("killer") == ["COMPLETED", "COMPLETED", "RUNNING"]
    assert [run["state_type"] for run in flow_runs(lab, "killer")] == ["CRASHED"] * 4


def flow_runs(lab: Lab, name: str) -> list[dict[str, Any]]:
    query = {"flow_runs": {"name": {"any_": [name]}}, "sort": "START_TIME_ASC"}
    address = f"{lab.environment['PREFECT_API_URL']}/flow_runs/filter"
    request = Request(address, json.dumps(query).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


def statements(lab: Lab, *changes: str) -> None:
    with closing(sqlite3.connect(lab.database, timeout=30)) as connection, connection:
        for change in changes:
            connection.execute(change)


NOW = "(julianday('now') - 2440587.5) * 86400.0"


def test_who_lives_or_was_ended_by_a_person_is_left_alone(lab: Lab) -> None:
    order = lab.order("hold", 1, 1)
    search = lab.start("run", lab.spec())
    lab.until_logged("hold", 1, 1, search)
    rows = actions(lab)
    assert "drives it" in look(lab)["exp"].why
    lab.suspend(search)
    statements(lab, f"UPDATE experiment SET lease_expires = {NOW} - 100")
    assert "suspended" in look(lab)["exp"].why
    search.signal(signal.SIGCONT)
    search.signal(signal.SIGINT)
    order.unlink()
    assert search.wait().code == 130
    assert look(lab)["exp"].why == "interrupted: SIGINT"
    assert [action for action in actions(lab) if action not in rows] == []
    # The same, ended by SIGTERM: only if its own settings say so.
    statements(lab, "UPDATE experiment SET ended = 'interrupted: SIGTERM'")
    assert "recovery.after names lost" in look(lab)["exp"].why
    for ended in ("stopped on request", "completed: all done"):
        statements(lab, f"UPDATE experiment SET ended = '{ended}'")
        assert (look(lab)["exp"].verdict, look(lab)["exp"].why) == ("left alone", ended)
    assert actions(lab) == rows
    statements(lab, "UPDATE experiment SET ended = 'interrupted: SIGTERM'")
    set_recovery(lab, after=["terminated"])
    assert watch(lab)["exp"]["result"] == "restored"
    assert lab.statuses() == ["COMPLETED"] * 4


def test_another_hosts_lease_is_waited_for_by_the_databases_clock(lab: Lab) -> None:
    died(lab, search={"num_trials": 2})
    file = lab.path() / "lease.json"
    lease = json.loads(file.read_text())
    holder = {**lease["holder"], "host": "elsewhere/boot", "hostname": "elsewhere"}
    file.write_text(json.dumps({**lease, "holder": holder, "expires": 0.0, "renewed": 0.0}))  # its clock is wrong
    held = f"UPDATE experiment SET holder = '{json.dumps(holder)}', lease_expires = {NOW}"
    statements(lab, f"{held} + 3600")
    rows = actions(lab)
    assert "elsewhere" in look(lab)["exp"].why
    assert actions(lab) == rows
    statements(lab, f"{held} - 1")
    assert watch(lab)["exp"]["result"] == "restored"
    assert lab.statuses() == ["COMPLETED"] * 2


def test_a_lost_database_and_broken_neighbours_do_not_stop_it(lab: Lab) -> None:
    died(lab, search={"num_trials": 2})
    runs = lab.folder / "runs"
    shutil.copytree(lab.path(), runs / "copy")
    shutil.copytree(lab.path(), runs / "broken")
    (runs / "broken" / "experiment.json").write_text("{")
    (runs / "foreign").mkdir()
    for database in runs.glob("holdfast.db*"):
        database.unlink()
    before = lab.tree(runs)
    watching = Watch(Places(storages=(str(runs),)), NoRestores(), Surroundings(say=str, warn=str), dry_run=True)
    verdicts = {row.name: row.verdict for row in watching.look()}
    assert verdicts == {"broken": "unreadable", "copy": "left alone", "exp": "restore"}
    assert watching.exit_code() == 4
    assert lab.tree(runs) == before
    ended = lab.run("watch", lab.folder / "nowhere", runs, "--json", code=4)
    found = {row["name"]: row for row in json.loads(json_of(ended.output))["experiments"]}
    assert (found["nowhere"]["verdict"], found["exp"]["result"]) == ("unreadable", "restored")
    assert lab.statuses() == ["COMPLETED"] * 2
    assert lab.tree(runs / "copy") == {name[5:]: each for name, each in before.items() if name.startswith("copy/")}


def test_a_watch_that_is_ended_ends_its_restores_and_the_next_one_goes_on(lab: Lab) -> None:
    order = lab.order("hold", 1, 1)
    daemon = lab.start("watch", lab.folder / "runs", "--every", "0.2", HOLDFAST_GRACE_SECONDS="2")  # its restores', too
    (lab.folder / "runs").mkdir(exist_ok=True)
    search = lab.start("run", lab.spec())
    lab.until_logged("hold", 1, 1, search)
    search.kill()
    lab.until(lambda: len(starts(lab.log(), 1)) == 2, daemon)
    lab.until(lambda: [entry.event for entry in lab.log()].count("hold") == 2, daemon)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait().code == 143
    order.unlink()
    with lab.open() as experiment:
        assert not experiment.lease.is_held
        assert experiment.audit()[-1].detail["passed_on"] is True
    assert watch(lab)["exp"]["result"] == "restored"
    assert lab.statuses() == ["COMPLETED"] * 4
    assert executed(lab.log(), 1) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at-once", "0"], "at_once is 0"),
        (["--every", "0"], "number of seconds above 0"),
        (["--storage-option", "x"], "KEY=VALUE"),
        ([""], "name at least one folder"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    try:
        code = main(["watch", str(tmp_path), *arguments])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert (code, words in capsys.readouterr().err) == (2, True)
    assert not list(tmp_path.iterdir())
