"""The contract of engines that trials run on: whatever runs them, a search ends as it does in threads of one machine.

A subclass names the spec's section ``execution`` and gives a place to run in. One search with a trial for each way to behave is
told to end in the middle, restored with one trial more, and then looked at by every test.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

from holdfast.core.trial import Attempt
from holdfast.storage.database import experiments, requests
from holdfast.storage.database.reads import Reader
from holdfast.testing.crashes import CLOCKS, Place, Seen
from holdfast.testing.executed import ENDS, Entry, executed, read, starts
from holdfast.testing.runs import PATIENCE, Ended, Running, Runs

TRAINABLE = '''\
"""Behaves as its config says: at most STEPS steps, one report and checkpoint each."""
import os, signal, sys, time
from holdfast.testing.executed import recorded

STEPS = 3


class NoLuck(RuntimeError):
    pass


def unlucky(act):
    raise NoLuck(f"no luck in {act}")


def train(trial):
    act, start, w = trial.config["act"], 0, 0.0
    if trial.checkpoint:
        start, w = trial.checkpoint.step + 1, trial.checkpoint.load()["w"]
    print(f"trial {trial.number} of the contract says {act} at {start}")
    for step in range(start, STEPS):
        if act == "fail" or (act == "flaky" and step == 2 and trial.attempt == 1):
            unlucky(act)
        if act == "segv" and step == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if act == "exit" and step == 1:
            os._exit(3)
        if act == "hang":
            time.sleep(3600)
        w = 0.5 * w + step + 1
        value = 1000.0 if act == "prune" and step == 1 else w
        trial.report({"loss": value}, step=step, state={"w": w})
        while act == "cancel" or (act == "preempt" and trial.attempt == 1 and step >= 1):
            time.sleep(0.1)
            step += 1
            trial.report({"loss": w}, step=step, state={"w": w})
    return {"said": act}


train = recorded(train, FOLDER)
'''

ACTS = ("cancel", "ok", "fail", "flaky", "segv", "exit", "prune", "preempt", "hang")
"""What the trials do, by number."""
STATUSES = {
    "cancel": "CANCELLED",
    "ok": "COMPLETED",
    "fail": "FAILED",
    "flaky": "COMPLETED",
    "segv": "FAILED",
    "exit": "FAILED",
    "prune": "PRUNED",
    "preempt": "COMPLETED",
    "hang": "TIMED_OUT",
}
OUTCOMES = {
    "cancel": ["cancelled"],
    "ok": ["completed"],
    "fail": ["failed", "failed"],
    "flaky": ["failed", "completed"],
    "segv": ["crashed", "crashed"],
    "exit": ["crashed", "crashed"],
    "prune": ["pruned"],
    "preempt": ["preempted", "completed"],
    "hang": ["timed_out"],
}
"""How the attempts of each end: one failure is retried, unless it is a timeout; a preemption is none."""
LOSSES = {"ok": 4.25, "flaky": 4.25}
SPEC: Mapping[str, Any] = {
    "name": "contract",
    "trainable": "act.py:train",
    "objectives": {"loss": "min"},
    "space": {"act": {"type": "categorical", "choices": list(ACTS)}},
    "search": {"engine": "grid", "num_trials": len(ACTS) - 1, "seed": 3, "max_concurrent": 2},
    "stopping": {"rule": "threshold", "upper": 100.0},
    "failure": {"max_failures": 1, "retry_on": ["NoLuck", "crashed"]},
}
TIMEOUT = 15.0
"""Seconds of each attempt after the restore: the last trial hangs, and a child of another one may take long to start."""


@dataclass
class Ran:
    """What the search left, and what its processes said."""

    runs: Runs
    place: Place
    preempted: Ended
    restored: Ended
    seen: Seen
    log: list[Entry]

    def trial(self, act: str) -> Any:
        return self.seen.trials[ACTS.index(act)]

    def attempts(self, act: str) -> list[Attempt]:
        found = self.seen.attempts[ACTS.index(act)]
        return [found[number] for number in sorted(found)]

    def steps(self, act: str) -> list[int]:
        """Return the canonical steps of a trial."""
        return [row.step for row in self.seen.reports if row.trial == ACTS.index(act) and row.canonical and row.step >= 0]

    def lines(self, act: str, attempt: int) -> str:
        """Return the log of an attempt that is with the experiment."""
        folder = self.place.folder()
        name = f"trials/{ACTS.index(act):06d}/log-a{attempt}.txt"
        return (folder.root.read(name) or b"").decode(errors="replace")


class RunnerContract:
    """What every engine promises."""

    execution: Mapping[str, Any] = {}
    """the spec's section of that name"""

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls) -> Iterator[Runs]:
        """A folder to run in; its environment names Prefect's API."""
        raise NotImplementedError("the subclass gives it")

    @pytest.fixture(scope="class")
    @classmethod
    def ran(cls, runs: Runs) -> Ran:
        folder = runs.folder
        (folder / "act.py").write_text(TRAINABLE.replace("FOLDER", repr(str(folder))))  # it runs elsewhere, from a copy
        spec = folder / "contract.yaml"
        spec.write_text(yaml.safe_dump({**SPEC, "execution": dict(cls.execution)}, sort_keys=False))
        place = Place(location=str(folder / "runs" / "contract"), database=f"sqlite:///{folder}/runs/holdfast.db")
        run = runs.start("run", spec)
        until_logged(runs, run, "cancel", 1)
        cancel(place, ACTS.index("cancel"))
        until_logged(runs, run, "preempt", STEP_OF_PREEMPTION)
        until_ended(place, run, *(act for act in ACTS if act not in ("preempt", "hang")))
        run.signal(signal.SIGTERM)
        preempted = run.wait(2 * PATIENCE)
        more = (f"search.num_trials={len(ACTS)}", f"failure.trial_timeout={TIMEOUT}")
        restored = runs.start("restore", place.location, *(word for one in more for word in ("--set", one))).wait(2 * PATIENCE)
        seen = place.look()
        assert seen is not None, f"{preempted.output}\n{restored.output}"
        return Ran(runs, place, preempted, restored, seen, read(folder))

    def test_every_trial_ends_as_its_code_does(self, ran: Ran) -> None:
        assert ran.preempted.code == 128 + signal.SIGTERM, ran.preempted.output
        assert ran.restored.code in (0, 1), ran.restored.output
        statuses = {act: ran.trial(act).status.value for act in ACTS}
        assert statuses == STATUSES, statuses
        assert [ran.seen.trials[number].config for number in range(len(ACTS))] == [{"act": act} for act in ACTS]

    def test_failures_keep_their_traceback_and_use_up_the_budget(self, ran: Ran) -> None:
        outcomes = {act: [one.outcome and one.outcome.value for one in ran.attempts(act)] for act in ACTS}
        assert outcomes == OUTCOMES, outcomes
        for one in ran.attempts("fail"):
            assert one.error is not None
            assert (one.error.kind, one.error.message) == ("NoLuck", "no luck in fail")
            assert 'in unlucky\n    raise NoLuck(f"no luck in {act}")' in one.error.traceback
        segv, left, late = (ran.attempts(act)[-1].error for act in ("segv", "exit", "hang"))
        assert segv is not None
        assert "SIGSEGV" in segv.message
        assert left is not None
        assert "3" in left.message
        assert late is not None
        assert f"{TIMEOUT:g} s" in late.message

    def test_attempts_go_on_from_checkpoints(self, ran: Ran) -> None:
        log = ran.log
        assert starts(log, ACTS.index("flaky")) == [(1, 0), (2, 2)]
        assert executed(log, ACTS.index("flaky")) == [0, 1, 2]
        assert starts(log, ACTS.index("segv")) == [(1, 0), (2, 1)]
        (first, began), (second, again) = starts(log, ACTS.index("preempt"))
        assert (first, began, second) == (1, 0, 2)
        steps = executed(log, ACTS.index("preempt"))
        assert steps == [*range(len(steps))]  # none twice
        assert 3 <= again <= len(steps)
        for act in ("ok", "flaky"):
            assert ran.steps(act) == [0, 1, 2]
        assert ran.steps("preempt") == steps
        assert ran.steps("prune") == [0, 1]

    def test_metrics_are_those_of_reports_and_of_what_was_returned(self, ran: Ran) -> None:
        for act, loss in LOSSES.items():
            assert ran.trial(act).metrics == {"loss": loss, "said": act}
        assert ran.trial("prune").metrics == {"loss": 1000.0}
        assert ran.trial("fail").metrics == {}

    def test_no_more_trials_run_at_once_than_allowed(self, ran: Ran) -> None:
        spans = []
        for entry in ran.log:
            if entry.event == "start":
                own = [one for one in ran.log if (one.trial, one.attempt) == (entry.trial, entry.attempt)]
                last = next((one.time for one in own if one.event in ENDS), None)
                row = ran.seen.attempts[entry.trial][entry.attempt]
                assert row.ended is not None
                spans.append((entry.time, row.ended.timestamp() + CLOCKS if last is None else last))
        most = max(sum(begin <= moment <= end for begin, end in spans) for moment, _ in spans)
        assert most <= SPEC["search"]["max_concurrent"]

    def test_the_children_have_ended(self, ran: Ran) -> None:
        deadline = time.monotonic() + PATIENCE
        while left := [pid for pid in {entry.pid for entry in ran.log} if _runs_with(pid, "HOLDFAST_WORKER")]:
            assert time.monotonic() < deadline, f"processes {left} outlive the search"
            time.sleep(0.02)

    def test_what_trials_print_is_kept_and_reaches_the_flow(self, ran: Ran) -> None:
        for act, attempt, start in (("ok", 1, 0), ("flaky", 2, 2), ("fail", 1, 0), ("hang", 1, 0)):
            assert f"trial {ACTS.index(act)} of the contract says {act} at {start}" in ran.lines(act, attempt)
        [first] = ran.attempts("ok")
        wanted = f"trial {ACTS.index('ok')} of the contract says ok at 0"
        deadline = time.monotonic() + PATIENCE
        while not any(wanted in line for line in self.flow_log(ran, first)):
            assert time.monotonic() < deadline, "the flow's log lacks the line"
            time.sleep(0.1)

    def flow_log(self, ran: Ran, attempt: Attempt) -> list[str]:
        """Return the lines of the flow run that an attempt belongs to, as Prefect has them."""
        assert attempt.flow_run_id is not None
        body = {"logs": {"flow_run_id": {"any_": [attempt.flow_run_id]}}, "limit": 200}
        lines: list[str] = []
        while page := _asked(ran.runs, "/logs/filter", {**body, "offset": len(lines)}):
            lines += [str(one["message"]) for one in page]
        return lines


STEP_OF_PREEMPTION = 2
"""A step of the trial that is preempted which it comes to in its endless loop alone."""


def until_logged(runs: Runs, run: Running, act: str, step: int) -> None:
    """Wait until a trial has reported a step."""
    _until(lambda: any((e.event, e.trial, e.step) == ("reported", ACTS.index(act), step) for e in read(runs.folder)), run)


def until_ended(place: Place, run: Running, *acts: str) -> None:
    """Wait until all attempts of trials have ended, and their trials with them: none of them runs, or waits to run again."""
    with closing(experiments.open_database(place.database, readonly=True)) as database:
        [record] = experiments.every(database)
        reader = Reader(database, record.id)

        def ended(act: str) -> bool:
            trial = reader.trial(ACTS.index(act))
            own = reader.attempts().get(ACTS.index(act), {})
            return trial is not None and trial.status.value == STATUSES[act] and len(own) == len(OUTCOMES[act])

        _until(lambda: all(map(ended, acts)), run)


def _until(condition: Callable[[], bool], run: Running) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert run.process.poll() is None or condition(), f"it ended:\n{run.output}"
        assert time.monotonic() < deadline, f"waited {PATIENCE:g} s in vain:\n{run.output}"
        time.sleep(0.02)


def cancel(place: Place, number: int) -> None:
    """Ask for the end of a trial, as anybody may."""
    with closing(experiments.open_database(place.database)) as database:
        [record] = experiments.every(database)
        assert Reader(database, record.id).trial(number) is not None
        requests.request_cancel(database, record.id, number)


def _asked(runs: Runs, path: str, body: Mapping[str, Any]) -> Any:
    address = f"{runs.environment['PREFECT_API_URL']}{path}"
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def _runs_with(pid: int, variable: str) -> bool:
    """Tell whether a process runs, and has a variable: its number may be another one's by now."""
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return any(entry.startswith(variable.encode() + b"=") for entry in file.read().split(b"\0"))
    return False
