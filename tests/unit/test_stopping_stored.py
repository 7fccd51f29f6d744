"""Decisions over a real database: the same whenever a search is cut off and goes on, and kept whatever ends the attempt."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from holdfast.core.checkpoint import Checkpoint
from holdfast.core.errors import CheckpointConflict, Fenced
from holdfast.core.resume import Action, Planned, ResumePolicy
from holdfast.core.spec import ExperimentSpec
from holdfast.core.stopping import make
from holdfast.core.trial import Outcome, TrialStatus
from holdfast.flows.reconcile import Survey
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.engine import Database, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.folder import Folder
from holdfast.tasks.runtime import Runtime, stored_history
from holdfast.tasks.supervisor import Supervisor, candidate_of
from holdfast.tasks.workers.messages import Decision, Report
from holdfast.testing.lab import FAILED, Lab
from holdfast.testing.samples import sample_spec

TRIALS, STEPS, WIDTH = 7, 6, 3


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    file = tmp_path_factory.mktemp("stored") / "holdfast.db"
    open_database(sqlite_url(file), create_missing=True).close()
    with closing(open_database(sqlite_url(file))) as database:
        # Thousands of commits: that they reach the disk is for other tests.
        event.listen(database.engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous = OFF").close())
        yield database


def value(trial: int, step: int) -> dict[str, Any]:
    """Return what a trial reports at a step: curves that cross, a NaN, an infinity, and a report without the metric."""
    if (trial, step) == (4, 2):
        return {"loss": math.nan, "size": 1}
    if (trial, step) == (5, 1):
        return {"size": 1}
    loss = (trial * 3 % 7) + 4.0 / (step + 1 + trial % 2) + (step % 3) * (0.9 if trial % 2 else 0.0)
    return {"loss": math.inf if (trial, step) == (2, 0) else loss, "size": trial * step}


RULES: dict[str, dict[str, Any]] = {
    "asha": {"rule": "asha", "reduction_factor": 2},
    "asha, sparse rungs": {"rule": "asha", "min_steps": 2, "reduction_factor": 2, "max_steps": STEPS},
    "hyperband": {"rule": "hyperband", "reduction_factor": 2, "max_steps": STEPS},
    "median": {"rule": "median", "startup_trials": 2},
    "percentile": {"rule": "percentile", "percentile": 60.0, "startup_trials": 1, "interval": 2},
    "patience": {"rule": "patience", "patience": 2},
    "threshold": {"rule": "threshold", "upper": 7.0, "min_steps": 2},
    "several": {
        "rule": "median",
        "startup_trials": 3,
        "also": [{"rule": "threshold", "metric": "size", "upper": 20}, {"rule": "patience", "patience": 3, "min_delta": 0.2}],
    },
}


@dataclass
class Search:
    """A search driven by hand: three trials at once, of which the one that has come least far reports next."""

    lab: Lab
    root: Path
    spec: ExperimentSpec
    log: list[tuple[int, int, str | None]] = field(default_factory=list)
    """trial, step and the reason to stop of each report"""
    runtime: Runtime = field(init=False)
    running: dict[int, Supervisor] = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Come up as a process does that knows only the rows."""
        self.runtime = Runtime(
            uuid="uuid",
            experiment=self.lab.id,
            epoch=1,
            spec=self.spec,
            workdir="/",
            database=self.lab.database,
            reader=self.lab.reader,
            folder=Folder(self.root),
            checkpoints=LocalCheckpoints(self.root),
            pool=None,
        )
        self.runtime.learn()
        self.running = {}

    def supervise(self, number: int) -> Supervisor:
        """Claim a waiting trial, which continues from its checkpoint if it has one."""
        attempt = self.lab.trial(number).attempt
        candidates: list[Checkpoint] = self.lab.reader.candidates(number, attempt.number) if attempt.parent else []

        def claim(**values: Any) -> AttemptWriter:
            return self.lab.claim(number)

        made = Supervisor(self.runtime, claim, number, attempt.number, {"x": 0.5}, candidates, logging.getLogger(__name__))
        made.started(None, candidate_of(candidates[0]) if candidates else None, ())
        self.running[number] = made
        return made

    def crash(self) -> None:
        """Lose the process, and restore: what was told to stop ends so, everything else goes on from its checkpoint."""
        decisions = self.lab.reader.last_decisions()
        for number in list(self.running):
            writer = self.running[number].writer
            if decisions.get(writer.attempt) == "prune":
                self.lab.end(writer, Outcome.PRUNED)
            else:
                self.lab.end(writer, Outcome.LOST)
                self.lab.driver.rerun(self.lab.row(number), restart=False)
        self.begin()
        for trial in self.lab.reader.trials():
            if trial.status is TrialStatus.PENDING:
                supervisor = self.supervise(trial.number)
                if self.step(trial.number) == STEPS:  # cut off after its last report
                    self.lab.end(supervisor.writer)
                    del self.running[trial.number]

    def report(self, number: int, step: int, *, save: bool = True) -> Decision:
        supervisor = self.running[number]
        decision = supervisor.report(Report(step=step, metrics=value(number, step)))
        self.log.append((number, step, supervisor.pruned))
        if save:
            path = f"trials/{number:06d}/checkpoints/step_{step:08d}-a{supervisor.attempt}-3f9c"
            supervisor.writer.save(step, Saved(path=path, digest="d", bytes=1))
        return decision

    def run(self, reports: int = 10**6, *, told: bool = True) -> None:
        """Go on until so many reports are stored; with ``told`` False the last one's trial never hears of the answer."""
        while len(self.log) < reports:
            count = len(self.lab.reader.trials())
            while len(self.running) < WIDTH and count < TRIALS:
                self.supervise(self.lab.driver.propose({"x": 0.5}))
                count += 1
            if not self.running:
                return
            steps = {number: self.step(number) for number in self.running}
            number = min(steps, key=lambda each: (steps[each], each))
            step = steps[number]
            decision = self.report(number, step)
            if len(self.log) == reports and not told:
                return
            if decision is Decision.PRUNE or step == STEPS - 1:
                outcome = Outcome.PRUNED if decision is Decision.PRUNE else Outcome.COMPLETED
                self.lab.end(self.running.pop(number).writer, outcome)

    def step(self, number: int) -> int:
        supervisor = self.running[number]
        last = supervisor.reported
        if last is None:
            last = -1 if supervisor.resumed is None else supervisor.resumed.step
        return last + 1

    def outcome(self) -> list[tuple[str, str, int | None]]:
        return [(trial.status.value, repr(trial.metrics), trial.step) for trial in self.lab.reader.trials()]

    def check(self) -> None:
        """See that what is known is what is stored."""
        rebuilt = stored_history(self.lab.reader, self.runtime._rules)
        assert repr(self.runtime._history.contents()) == repr(rebuilt.contents())


@pytest.fixture
def search(database: Database, tmp_path: Path) -> Any:
    def make_search(name: str, stopping: dict[str, Any]) -> Search:
        return Search(Lab.new(database, name), tmp_path, sample_spec(stopping=stopping))

    return make_search


@pytest.mark.parametrize("rule", RULES)
def test_a_search_that_is_cut_off_decides_as_one_that_is_not(rule: str, search: Any) -> None:
    whole: Search = search(f"{rule}, whole", RULES[rule])
    whole.run()
    reasons = [reason for _, _, reason in whole.log if reason]
    statuses = [status for status, _, _ in whole.outcome()]
    assert statuses.count("PRUNED") == len(reasons) > 0
    assert "COMPLETED" in statuses
    for cut in range(1, len(whole.log) + 1):
        other: Search = search(f"{rule}, cut after {cut}", RULES[rule])
        other.run(cut, told=False)
        other.check()
        other.crash()
        other.check()
        other.run()
        assert other.log == whole.log
        assert other.outcome() == whole.outcome()


def test_the_reason_is_kept_with_the_attempt(search: Any) -> None:
    made: Search = search("reason", {"rule": "threshold", "upper": 0.0})
    made.supervise(made.lab.driver.propose({"x": 0.5}))
    seq = made.lab.trial(0).seq
    assert made.report(0, 0) is Decision.PRUNE
    trial = made.lab.trial(0)
    assert trial.attempt.note == made.running[0].pruned == "stopped by threshold after step 0: loss 4 is above 0"
    assert trial.seq > seq  # so that the journal takes the note along
    assert [row.decision for row in made.lab.reader.history()] == ["prune"]
    made.lab.end(made.running[0].writer, Outcome.PRUNED)
    assert made.lab.trial(0).attempt.note == trial.attempt.note


@pytest.mark.parametrize(
    ("wish", "told", "stored"),
    [
        (Decision.PREEMPT, Decision.PRUNE, "prune"),
        (Decision.KILL, Decision.KILL, "prune"),
        (Decision.CANCEL, Decision.CANCEL, "cancel"),
    ],
)
def test_what_people_and_processes_wish_meanwhile(search: Any, wish: Decision, told: Decision, stored: str) -> None:
    """What ends the process does not change what becomes of the trial; what a person wants does."""
    made: Search = search(f"wish {wish}", {"rule": "threshold", "upper": 0.0})
    made.supervise(made.lab.driver.propose({"x": 0.5}))
    if wish is Decision.CANCEL:
        made.runtime.cancelled = {0}
    else:
        made.runtime.order(wish)
    assert made.report(0, 0) is told
    assert [row.decision for row in made.lab.reader.history()] == [stored]
    assert (made.running[0].pruned is None) == (wish is Decision.CANCEL)


class TestWhatCounts:
    def test_a_retry_and_a_restart_take_reports_out(self, search: Any) -> None:
        made: Search = search("counts", {"rule": "median", "also": [{"rule": "threshold", "metric": "size", "upper": 1e9}]})
        for _ in range(2):
            made.supervise(made.lab.driver.propose({"x": 0.5}))
        for step in range(3):
            made.report(0, step, save=step == 1)
            made.report(1, step, save=False)
        made.check()
        with made.runtime.changing(0):
            made.running[0].writer.fail(FAILED, max_failures=3)
        assert made.runtime._history.of("loss", 0).steps == [0, 1]
        made.check()
        made.supervise(0)
        made.check()
        made.report(0, 2)
        made.report(0, 4)
        made.check()
        with made.runtime.changing(1):
            made.lab.end(made.running[1].writer, Outcome.PREEMPTED)
        assert made.runtime._history.of("loss", 1).steps == []
        made.supervise(1)
        made.report(1, 0)
        made.check()
        made.lab.end(made.running[0].writer, Outcome.COMPLETED)
        with made.runtime.changing(0):
            made.lab.driver.rerun(made.lab.row(0), restart=True)
        assert list(made.runtime._history.at("loss", 0)) == [1]
        made.check()

    def test_a_report_that_was_refused_does_not_count(self, search: Any) -> None:
        made: Search = search("refused", {"rule": "median"})
        made.supervise(made.lab.driver.propose({"x": 0.5}))
        made.report(0, 0)
        before = made.runtime._history.contents()
        with pytest.raises(CheckpointConflict):
            made.running[0].writer.report(0, {"loss": 1.0})
        made.lab.take_over()
        with pytest.raises(Fenced):
            made.report(0, 1)
        assert made.runtime._history.contents() == before
        made.check()

    def test_merged_trials_do_not_count(self, search: Any) -> None:
        made: Search = search("merged", {"rule": "median"})
        assert made.lab.reader.measured(["loss"]) == {"loss": []}


def test_the_order_of_commits_is_the_order_of_decisions(search: Any) -> None:
    """Eight threads report at once: decided anew in the order of seq, every decision is the one that was stored."""
    made: Search = search("threads", {"rule": "asha", "reduction_factor": 2})
    for _ in range(8):
        made.supervise(made.lab.driver.propose({"x": 0.5}))
    errors: list[BaseException] = []

    def reporting(number: int) -> None:
        try:
            for step in range(8):
                loss = float(number * 7 % 5) + step % 3
                if made.running[number].report(Report(step=step, metrics={"loss": loss})) is Decision.PRUNE:
                    return
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)

    threads = [threading.Thread(target=reporting, args=(number,)) for number in made.running]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    made.check()
    rows = sorted(made.lab.reader.history(), key=lambda row: row.seq)
    rules = make(made.spec.stopping, made.spec.goals)
    history = type(made.runtime._history)(rules.metrics)
    for row in rows:
        history.add(row.trial, row.step, row.metrics)
        reason = rules.decide(history, row.trial, row.step)
        assert (row.decision == "prune") == (reason is not None)
    assert any(row.decision == "prune" for row in rows)


def test_a_hundred_thousand_reports_are_loaded_fast(database: Database) -> None:
    """In seconds of this process: others run, too."""
    lab = Lab.new(database, "many")
    writers = [lab.started() for _ in range(100)]
    with database.engine.begin() as connection:
        raw = connection.connection.cursor()
        for writer in writers:
            raw.executemany(
                "INSERT INTO report (attempt_id, step, seq, reported, decision) VALUES (?, ?, 1, 1, 'continue')",
                [(writer.attempt, step) for step in range(1000)],
            )
        raw.execute(
            "INSERT INTO metric (report_id, name, kind, number) SELECT id, 'loss', 'float', step FROM report"
            f" WHERE attempt_id BETWEEN {writers[0].attempt} AND {writers[-1].attempt}"
        )
    rules = make(sample_spec(stopping={"rule": "median"}).stopping, sample_spec().goals)
    began = time.process_time()
    history = stored_history(lab.reader, rules)
    seconds = time.process_time() - began
    assert sum(len(series.steps) for _, series in history.trials("loss")) == 100_000
    assert seconds < 3.0


class TestRestore:
    """What a restore makes of the last decision on a trial that was running."""

    def survey(self, made: Search) -> tuple[Survey, list[Planned]]:
        survey = Survey(made.lab.reader, Folder(made.root), ResumePolicy(), made.spec)
        return survey, survey.plan()

    def write(self, made: Search, decision: str) -> None:
        """Have the newest report's row say another decision, as one that was rebuilt from the path may."""
        with made.lab.database.engine.begin() as connection:
            last = "SELECT MAX(id) FROM report"
            connection.execute(text(f"UPDATE report SET decision = :d WHERE id = ({last})"), {"d": decision})

    @pytest.mark.parametrize(
        ("upper", "decision", "action"),
        [
            (0.0, "prune", Action.ADOPT),
            (0.0, "continue", Action.RESUME),
            (0.0, "recovered", Action.ADOPT),
            (9.0, "recovered", Action.RESUME),
            (9.0, "preempt", Action.RESUME),
        ],
    )
    def test_the_last_decision(self, search: Any, upper: float, decision: str, action: Action) -> None:
        made: Search = search(f"last {upper} {decision}", {"rule": "threshold", "upper": upper})
        made.supervise(made.lab.driver.propose({"x": 0.5}))
        made.report(0, 0, save=False)
        self.write(made, decision)
        survey, (planned,) = self.survey(made)
        assert planned.action is action
        told = {0: "stopped by threshold after step 0: loss 4 is above 0"}
        assert survey.stopped == (told if (decision, upper) == ("recovered", 0.0) else {})

    def test_that_of_a_superseded_attempt_does_not_count(self, search: Any) -> None:
        """A trial that was stopped, and that somebody has run again: it runs."""
        made: Search = search("again", {"rule": "threshold", "upper": 0.0})
        made.supervise(made.lab.driver.propose({"x": 0.5}))
        assert made.report(0, 0) is Decision.PRUNE
        made.lab.end(made.running[0].writer, Outcome.PRUNED)
        made.lab.driver.rerun(made.lab.row(0), restart=False)
        assert self.survey(made)[1][0].action is Action.RESUME
        made.supervise(0)
        assert self.survey(made)[1][0].action is Action.RESUME

    def test_a_person_who_wanted_it_cancelled_later_comes_too_late(self, search: Any) -> None:
        made: Search = search("late", {"rule": "threshold", "upper": 0.0})
        made.supervise(made.lab.driver.propose({"x": 0.5}))
        made.report(0, 0)
        with made.lab.database.engine.begin() as connection:
            connection.execute(text("UPDATE trial SET cancel_requested = 1 WHERE id = :id"), {"id": made.lab.row(0)})
        (planned,) = self.survey(made)[1]
        assert planned.reason == "it was told to end (pruned) before"
