"""How attempts end in real processes, and what each end does to the next attempt."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any
from urllib.request import Request, urlopen

from support import PATIENCE, Lab, MakeLab, executed, starts, steps_of


def states(lab: Lab, what: str, name: str) -> list[str]:
    """Return the states of an experiment's flow or task runs in Prefect."""
    order = "START_TIME_ASC" if what == "flow_runs" else "EXPECTED_START_TIME_ASC"
    query = {"flow_runs": {"name": {"any_": [name]}}, "sort": order}
    address = f"{lab.environment['PREFECT_API_URL']}/{what}/filter"
    request = Request(address, json.dumps(query).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        return [run["state_type"] for run in json.load(answer)]


def attempts(lab: Lab, number: int, name: str = "exp") -> list[Any]:
    """Return the attempts of a trial in order."""
    with lab.open(name) as experiment:
        return [attempt for _, attempt in sorted(experiment._reader.attempts()[number].items())]


def test_each_end_of_an_attempt_is_told_apart(make_lab: MakeLab) -> None:
    """Its process killed, its driver killed, told to stop; then it fails: with one retry, that is still retried."""
    lab = make_lab(steps=4)
    hold = lab.order("hold", 0, 1)
    spec = lab.spec(search={"num_trials": 1}, failure={"max_failures": 1, "retry_on": ["RuntimeError", "crashed"]})
    run = lab.start("run", spec)
    lab.until_logged("hold", 0, 1, run)
    os.kill(lab.log()[-1].pid, signal.SIGKILL)
    lab.until(lambda: [entry.attempt for entry in lab.log() if entry.event == "hold"] == [1, 2], run)
    run.kill()

    run = lab.start("restore", lab.path())
    lab.until(lambda: [entry.attempt for entry in lab.log() if entry.event == "hold"] == [1, 2, 3], run)
    before, hold = hold, lab.order("hold", 0, 2)
    before.unlink()
    lab.until_logged("hold", 0, 2, run)
    run.signal(signal.SIGTERM)
    lab.until(lambda: "running trials have" in run.output, run)
    hold.unlink()
    assert run.wait().code == 128 + signal.SIGTERM

    fail = lab.order("fail", 0, 3)
    lab.run("restore", lab.path(), code=1)
    ends = [(each.outcome.value, each.reason, each.epoch) for each in attempts(lab, 0)]
    assert ends == [
        ("crashed", "first", 1),
        ("lost", "retry", 1),
        ("preempted", "resume", 2),
        ("failed", "resume", 3),
        ("failed", "retry", 3),
    ]
    fail.unlink()
    lab.run("restore", lab.path(), "--resume-errored")
    assert lab.statuses() == ["COMPLETED"]
    assert steps_of(lab, 0) == [0, 1, 2, 3]
    errors = [each.error for each in attempts(lab, 0)]
    assert [error and error.kind for error in errors] == ["TrialCrashed", None, None, "RuntimeError", "RuntimeError", None]
    assert "SIGKILL" in errors[0].message
    assert all("no luck in step 3" in error.traceback for error in errors[3:5])

    lab.database.unlink()  # what the journal tells is the same
    lab.run("show", lab.path())
    assert [each.error for each in attempts(lab, 0)] == errors


def test_a_timed_out_attempt_is_retried_from_its_checkpoint_and_waits(lab: Lab) -> None:
    """Each attempt has its own time; other trials run while one waits, and what is not named is not retried."""
    code = """
import time

def train(trial):
    start = 0 if trial.checkpoint is None else trial.checkpoint.step + 1
    print("start", trial.number, trial.attempt, start, flush=True)
    for step in range(start, 3):
        if trial.number == 0 and trial.attempt == 1 and step == 1:
            time.sleep(3600)
        if trial.number == 1:
            raise KeyError("never again")
        trial.report({"loss": 1.0}, step=step, state={"step": step})
"""
    (lab.folder / "slow.py").write_text(code)
    failure = {"max_failures": 1, "trial_timeout": 20.0, "retry_on": ["timed_out"], "retry_delay": 0.5}
    lab.run("run", lab.spec(trainable="slow.py:train", search={"num_trials": 3}, failure=failure), code=1)
    assert lab.statuses() == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [(each.outcome.value, each.parent_step) for each in attempts(lab, 0)] == [
        ("timed_out", None),
        ("completed", 0),
    ]
    assert len(attempts(lab, 1)) == 1
    before, after = attempts(lab, 0)
    assert (after.started - before.ended).total_seconds() >= failure["retry_delay"]


def test_a_search_that_waits_for_a_retry_can_be_killed_told_to_stop_and_restored(lab: Lab) -> None:
    """What has been waited for counts, whoever waits; a shorter delay given to a restore counts at once."""
    fail = lab.order("fail", 0, 1)
    rule = {"max_failures": 1, "retry_delay": 3600.0, "max_retry_delay": 3600.0}
    run = lab.start("run", lab.spec(search={"num_trials": 2}, failure=rule))
    lab.until(lambda: re.search(r"trial 0 waits 3[56]\d\d s for attempt 2 \(retry\)", run.output), run)
    lab.until(lambda: "trial 1 COMPLETED" in run.output, run)
    created = attempts(lab, 0)[1].created
    run.kill()
    fail.unlink()

    run = lab.start("restore", lab.path())
    lab.until(lambda: "trial 0 waits 3" in run.output, run)  # the rest of it
    with lab.open() as experiment:
        assert experiment.stop(wait=PATIENCE)
    ended = run.wait()
    assert ended.code == 0, ended.output
    assert "stopped on request" in ended.output
    assert lab.statuses() == ["PENDING", "COMPLETED"]

    run = lab.start("restore", lab.path())
    lab.until(lambda: "trial 0 waits 3" in run.output, run)
    run.signal(signal.SIGTERM)
    assert run.wait().code == 128 + signal.SIGTERM
    waiting = attempts(lab, 0)[1]
    assert (waiting.created, waiting.reason, waiting.claimed) == (created, "retry", False)

    lab.run("restore", lab.path(), "--set", "failure.retry_delay=0.1")
    assert lab.statuses() == ["COMPLETED", "COMPLETED"]
    assert starts(lab.log(), 0) == [(1, 0), (2, 1)]


class TestInline:
    """Code in a thread of the search cannot be interrupted; the search ends all the same."""

    def test_sigterm(self, lab: Lab) -> None:
        hold = lab.order("hold", 0, 1)
        spec = lab.spec(name="deaf", search={"num_trials": 1}, execution={"isolation": "inline"})
        run = lab.start("run", spec, HOLDFAST_GRACE_SECONDS="1")
        lab.until_logged("hold", 0, 1, run)
        lab.until(lambda: states(lab, "task_runs", "deaf") == ["RUNNING"], run)
        run.signal(signal.SIGTERM)
        ended = run.wait()
        assert ended.code == 128 + signal.SIGTERM, ended.output
        assert f"restore: holdfast restore {lab.path('deaf')}" in ended.output
        with lab.open("deaf") as experiment:
            assert experiment.status == "interrupted"
        assert [each.outcome and each.outcome.value for each in attempts(lab, 0, "deaf")] == ["preempted", None]
        assert states(lab, "flow_runs", "deaf") == ["CRASHED"]
        lab.until(lambda: states(lab, "task_runs", "deaf") == ["CRASHED"])
        hold.unlink()
        lab.clear_log()
        lab.run("restore", lab.path("deaf"))
        assert starts(lab.log(), 0) == [(2, 1)]
        assert executed(lab.log(), 0) == [1, 2]
        assert lab.statuses("deaf") == ["COMPLETED"]

    def test_the_second_interrupt_ends_it_at_once(self, lab: Lab) -> None:
        lab.order("hold", 0, 1)
        spec = lab.spec(search={"num_trials": 1}, execution={"isolation": "inline"})
        run = lab.start("run", spec, HOLDFAST_GRACE_SECONDS="3600")
        lab.until_logged("hold", 0, 1, run)
        run.signal(signal.SIGINT)
        lab.until(lambda: "running trials have 3600 s" in run.output, run)
        run.signal(signal.SIGINT)
        ended = run.wait()
        assert ended.code == 128 + signal.SIGINT, ended.output
        with lab.open() as experiment:
            assert experiment.status == "interrupted"
        assert [each.outcome and each.outcome.value for each in attempts(lab, 0)] == ["preempted", None]
