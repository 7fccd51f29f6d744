"""A search that is told to end, by signals or in Prefect: its rows, Prefect's states and the exit code say the same."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import DIED, Entry, Lab, MakeLab, Running, executed, starts
from support_prefect import View, make_endless

import holdfast
from holdfast.flows.server import EmbeddedServer
from holdfast.storage.database.experiments import by_uuid

PREEMPTED = "CANCELLED Preempted"
DONE = "COMPLETED Completed"


def record(lab: Lab, name: str) -> tuple[str, Any]:
    """Return the status of an experiment and why its last drive ended."""
    with holdfast.open(lab.path(name)) as experiment:
        found = by_uuid(experiment._opened.database, experiment.id)
        return experiment.status, found and found.ended


def outcomes(lab: Lab, name: str, trial: int) -> list[Any]:
    with holdfast.open(lab.path(name)) as experiment:
        return [row.outcome for row in experiment._reader.attempts()[trial].values()]


def slow_search(make_lab: MakeLab, name: str, **environment: str) -> tuple[Lab, View, Running, Path]:
    """Start a search whose trial 0 is under way, slowly, and known to Prefect as running."""
    lab = make_lab()
    make_endless(lab)
    slow = lab.order("slow", 0, 0)
    # Steps between two checkpoints are saved all the same when the trial has to stop.
    run = lab.start("run", lab.spec(name=name, search={"num_trials": 2}, checkpoints={"save_period": 100}), **environment)
    lab.until_logged("step", 0, 10, run)
    view = View(lab, name)
    lab.until(lambda: view.tasks() == {"trial-0#1": "RUNNING Running"}, run)
    return lab, view, run, slow


def goes_on(lab: Lab, view: View, name: str, slow: Path) -> None:
    """Restore, and see that nothing that was reported is done again."""
    last = executed(lab.log(), 0)[-1]
    assert lab.checkpoints(0, name)[-1].step == last
    slow.unlink()
    lab.clear_log()
    lab.run("restore", lab.path(name))
    assert starts(lab.log(), 0) == [(2, last + 1)]
    assert lab.statuses(name) == ["COMPLETED"] * 2
    assert view.flows()[-1] == "COMPLETED"
    view.until_tasks({"trial-0#1": PREEMPTED, "trial-0#2": DONE, "trial-1#1": DONE})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_lets_trials_save_and_stop(make_lab: MakeLab, number: signal.Signals, code: int) -> None:
    name = number.name.lower()
    lab, view, run, slow = slow_search(make_lab, name)
    run.signal(number)
    ended = run.wait()
    assert ended.code == code, ended.output
    assert "holdfast restore" in ended.output
    assert lab.statuses(name) == ["PENDING"]
    assert outcomes(lab, name, 0) == ["preempted", None]
    assert record(lab, name) == ("interrupted", f"interrupted: {number.name}")
    assert view.flows() == ["CRASHED"]
    view.until_tasks({"trial-0#1": PREEMPTED})
    goes_on(lab, view, name, slow)
    assert view.flows() == ["CRASHED", "COMPLETED"]


def test_a_second_interrupt_ends_at_once(lab: Lab) -> None:
    lab.order("hold", 0, 1)
    name = "twice"
    run = lab.start("run", lab.spec(name=name), HOLDFAST_GRACE_SECONDS="3600")
    lab.until_logged("hold", 0, 1, run)
    run.signal(signal.SIGINT)
    lab.until(lambda: "running trials have 3600 s" in run.output, run)
    run.signal(signal.SIGINT)
    assert run.wait().code == 130
    assert record(lab, name) == ("interrupted", "interrupted: SIGINT")
    view = View(lab, name)
    assert view.flows() == ["CRASHED"]
    view.until_tasks({"trial-0#1": PREEMPTED})
    assert [one.step for one in lab.checkpoints(0, name)] == [0]


def test_a_closed_terminal(make_lab: MakeLab) -> None:
    """The terminal goes with everything that would be printed; the shell's second SIGHUP is not taken for impatience."""
    lab = make_lab()
    make_endless(lab)
    slow, name = lab.order("slow", 0, 0), "hangup"
    spec = lab.spec(name=name, search={"num_trials": 2}, checkpoints={"save_period": 100})
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have had it ignored
        os.chdir(lab.folder)
        command = [str(Path(sys.executable).with_name("holdfast")), "run", str(spec)]
        os.execve(command[0], command, dict(lab.environment))
    try:
        lab.until(lambda: _read(terminal) and Entry("step", 0, 1, 10, 0) in [_anonymous(entry) for entry in lab.log()])
        os.close(terminal)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)
        _, status = os.waitpid(pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGHUP
    assert record(lab, name) == ("interrupted", "interrupted: SIGHUP")
    view = View(lab, name)
    assert view.flows() == ["CRASHED"]
    goes_on(lab, view, name, slow)


def _read(terminal: int) -> bool:
    """Take what is printed, so that the program never waits for its reader; tell that it went well."""
    os.set_blocking(terminal, False)
    with suppress(BlockingIOError):
        os.read(terminal, 1 << 16)
    return True


def _anonymous(entry: Entry) -> Entry:
    return Entry(entry.event, entry.trial, entry.attempt, entry.step, 0)


AT_POINT = """
import os, signal, sys
from holdfast.core import faults
from holdfast.cli import main
name, number = sys.argv[1], int(sys.argv[2])
faults.install(lambda point: os.kill(os.getpid(), number) if point == name else None)
sys.exit(main(sys.argv[3:]))
"""


class TestBeforeAnythingRuns:
    """SIGTERM comes while the search is prepared, before there is a flow run that could notice."""

    def test_of_a_new_search(self, lab: Lab) -> None:
        run = lab.start("lease.database-taken", int(signal.SIGTERM), "run", lab.spec(name="early"), script=AT_POINT)
        ended = run.wait()
        assert run.process.poll() == -signal.SIGTERM, ended.output
        assert "Traceback" not in ended.output
        assert f"interrupted: SIGTERM; go on with: holdfast restore {lab.path('early')}" in ended.output
        assert record(lab, "early") == ("interrupted", "interrupted: SIGTERM")
        lab.run("restore", lab.path("early"))
        assert lab.statuses("early") == ["COMPLETED"] * 4
        assert View(lab, "early").flows() == ["COMPLETED"]

    def test_of_a_restore(self, lab: Lab) -> None:
        name = "restoring"
        lab.run("run", lab.spec(name=name, search={"num_trials": 2}), fault="checkpoint.committed:2", code=DIED)
        run = lab.start("restore.reconciled", int(signal.SIGTERM), "restore", lab.path(name), script=AT_POINT)
        ended = run.wait()
        assert run.process.poll() == -signal.SIGTERM, ended.output
        assert "Traceback" not in ended.output
        assert record(lab, name) == ("interrupted", "interrupted: SIGTERM")
        lab.clear_log()
        lab.run("restore", lab.path(name))
        assert lab.statuses(name) == ["COMPLETED"] * 2
        assert starts(lab.log(), 0)[0][1] == 2
        # What the first one left open is closed by whoever comes next, also when the one in between did not come to it.
        assert View(lab, name).flows() == ["CRASHED", "COMPLETED"]


class TestInPrefect:
    """A person acts on the runs of a search that was started from a shell: no worker sends it a signal."""

    @pytest.mark.parametrize("kind", ["CANCELLING", "CANCELLED"])
    def test_the_flow_run_is_cancelled(self, make_lab: MakeLab, kind: str) -> None:
        name = f"flow-{kind.lower()}"
        lab, view, run, slow = slow_search(make_lab, name)
        view.set_flow(kind)
        ended = run.wait()
        assert ended.code == 0, ended.output
        assert "cancelled in Prefect" in ended.output
        # Prefect marks the task runs of a cancelled flow run as cancelled, too: no trial is cancelled by that.
        assert lab.statuses(name) == ["PENDING"]
        assert outcomes(lab, name, 0) == ["preempted", None]
        assert record(lab, name) == ("stopped", "stopped: cancelled in Prefect")
        assert view.flows() == ["CANCELLED"]
        view.until_tasks({"trial-0#1": PREEMPTED})
        goes_on(lab, view, name, slow)
        assert view.flows() == ["CANCELLED", "COMPLETED"]

    def test_a_cancelled_flow_run_does_not_wait_for_a_trial_that_hangs(self, lab: Lab) -> None:
        lab.order("hang", 0, 1)
        run = lab.start("run", lab.spec(name="hanging"), HOLDFAST_GRACE_SECONDS="1")
        view = View(lab, "hanging")
        lab.until(lambda: view.tasks() == {"trial-0#1": "RUNNING Running"}, run)
        lab.until(lambda: lab.checkpoints(0, "hanging"), run)
        view.set_flow("CANCELLING")
        assert run.wait().code == 0
        assert record(lab, "hanging") == ("stopped", "stopped: cancelled in Prefect")
        assert [one.step for one in lab.checkpoints(0, "hanging")] == [0]

    def test_a_task_run_is_cancelled(self, make_lab: MakeLab) -> None:
        """As `holdfast cancel` does: that trial ends for good, the search goes on."""
        lab, view, run, _ = slow_search(make_lab, "one-task")
        view.set_task("trial-0#1", "CANCELLED")
        ended = run.wait()
        assert ended.code == 0, ended.output
        assert "cancelled in Prefect" in ended.output
        assert lab.statuses("one-task") == ["CANCELLED", "COMPLETED"]
        assert outcomes(lab, "one-task", 0) == ["cancelled"]
        assert record(lab, "one-task")[0] == "completed"
        view.until_tasks({"trial-0#1": "CANCELLED Cancelled", "trial-1#1": DONE})
        assert not list(lab.path("one-task").glob("trials/000000/result-*"))

    def test_a_false_alarm_changes_nothing(self, make_lab: MakeLab) -> None:
        """Prefect says that the run has crashed, and pauses are asked for that it cannot grant: the search goes on."""
        lab = make_lab(steps=3)
        hold, name = lab.order("hold", 1, 1), "alarm"
        run = lab.start("run", lab.spec(name=name, search={"num_trials": 3}))
        lab.until_logged("hold", 1, 1, run)
        view = View(lab, name)
        assert view.set_flow("PAUSED", name="Suspended", state_details={"pause_reschedule": True})["status"] == "ABORT"
        assert view.set_flow("PAUSED", name="Paused")["status"] == "ACCEPT"
        view.set_flow("CRASHED", force=True)
        hold.unlink()
        ended = run.wait()
        assert ended.code == 0, ended.output
        assert lab.statuses(name) == ["COMPLETED"] * 3
        assert view.flows() == ["COMPLETED"]
        assert record(lab, name)[0] == "completed"


class TestDeadRuns:
    def test_runs_of_a_killed_search_are_closed(self, lab: Lab) -> None:
        """Also where no attempt had been claimed; the third drive closes what the second one left, and did not come to."""
        name = "killed"
        view = View(lab, name)
        lab.run("run", lab.spec(name=name, search={"num_trials": 2}), fault="proposal.committed", code=DIED)
        assert view.flows() == ["RUNNING"]
        lab.run("restore", lab.path(name), fault="attempt.claimed", code=DIED)
        lab.run("restore", lab.path(name))
        assert lab.statuses(name) == ["COMPLETED"] * 2
        assert view.flows() == ["CRASHED", "CRASHED", "COMPLETED"]
        # What a killed process had not sent, the server never knows: the second drive's task run is made where it is missing.
        view.until_tasks({"trial-0#1": "CRASHED Crashed", "trial-0#2": DONE, "trial-1#1": DONE})

    def test_a_copy_does_not_touch_the_runs_of_a_living_original(self, lab: Lab) -> None:
        name = "original"
        hold = lab.order("hold", 1, 1)
        run = lab.start("run", lab.spec(name=name, search={"num_trials": 2}))
        lab.until_logged("hold", 1, 1, run)
        view = View(lab, name)
        lab.until(lambda: view.tasks().get("trial-1#1") == "RUNNING Running", run)
        copy = lab.folder / "elsewhere" / "copy"
        shutil.copytree(lab.path(name), copy)
        (copied := lab.start("restore", copy)).signal(0)
        lab.until(lambda: sum(entry.event == "hold" for entry in lab.log()) == 2, copied)
        assert view.flows() == ["RUNNING"]
        assert view.tasks()["trial-1#1"] == "RUNNING Running"
        hold.unlink()
        assert copied.wait().code == run.wait().code == 0
        assert view.flows() == ["COMPLETED"]
        view.until_tasks({"trial-0#1": DONE, "trial-1#1": DONE})


def test_an_api_that_is_away_delays_nothing(make_lab: MakeLab) -> None:
    """With Prefect's own patience, which is a minute for each request."""
    lab = make_lab()
    make_endless(lab)
    lab.order("slow", 0, 0)
    server = EmbeddedServer()
    server.begin()
    try:
        run = lab.start("run", lab.spec(name="away", search={"num_trials": 2}), PREFECT_API_URL=server.url())
        lab.until_logged("step", 0, 5, run)
    finally:
        server.stop()
    began = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait().code == 143, run.output
    assert time.monotonic() - began < 55, run.output
    assert record(lab, "away") == ("interrupted", "interrupted: SIGTERM")
