"""What a restore says of each trial afterwards, and what engines are told of trials that ran again."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from store_kit import create

from holdfast.core.resume import Action, Planned
from holdfast.core.trial import Outcome, TrialStatus
from holdfast.engines.optuna_engine import make
from holdfast.locate import Opened
from holdfast.report.observer import RunLog
from holdfast.report.progress import Progress
from holdfast.report.restored import SHOWN, RestoreSummary, restored_json, restored_lines, summary_of
from holdfast.result import result_of
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.leases import Leases
from holdfast.testing.lab import FAILED, Lab
from holdfast.testing.samples import sample_trial

S = TrialStatus


def planned(trial: int, status: TrialStatus, action: Action, step: int | None = None, lost: int = 0) -> Planned:
    return Planned(trial=trial, status=status, action=action, step=step, reason="why", lost=lost)


PLAN = [
    planned(0, S.COMPLETED, Action.KEEP),
    planned(1, S.RUNNING, Action.ADOPT),
    planned(2, S.RUNNING, Action.RESUME, 4, lost=2),
    planned(3, S.RUNNING, Action.RESUME, None, lost=1),
    planned(4, S.FAILED, Action.RESTART, lost=7),
    planned(5, S.PENDING, Action.RUN),
    planned(6, S.PENDING, Action.SKIP),
    planned(7, S.FAILED, Action.KEEP),
]
ENDED = [S.COMPLETED, S.COMPLETED, S.PRUNED, S.COMPLETED, S.FAILED, S.COMPLETED, S.SKIPPED, S.FAILED]


def summary() -> RestoreSummary:
    trials = [sample_trial(number, status) for number, status in enumerate(ENDED)]
    new = [sample_trial(8, S.COMPLETED), sample_trial(9, S.PENDING, source="queued"), sample_trial(10, source="preset")]
    return summary_of(PLAN, [*trials, *new])


def test_every_trial_is_in_one_place() -> None:
    found = summary()
    assert (found.kept, found.adopted, found.restarted, found.started, found.skipped) == ((0, 7), (1,), (4,), (5,), (6,))
    assert found.resumed == {2: 4, 3: None}
    assert (found.proposed, found.queued) == ((8, 10), (9,))
    assert found.work_lost == 10
    assert sum(found.counts.values()) == 11
    assert [(trial.number, trial.before, trial.status) for trial in found.trials][1] == (2, S.RUNNING, S.PRUNED)
    json = restored_json(found)
    assert json["counts"] == found.counts
    assert json["trials"][1] == {
        **{"trial": 2, "before": "RUNNING", "action": "resume", "step": 4, "lost": 2, "status": "PRUNED"}
    }
    assert (json["proposed"], json["queued"], json["work_lost"]) == ([8, 10], [9], 10)


def test_the_table() -> None:
    assert "\n".join(restored_lines(summary())) == (
        "restored: 2 kept, 1 adopted, 2 resumed, 1 restarted, 1 started, 1 left out, 2 newly proposed, 1 newly queued;"
        " 10 steps lost\n"
        "  trial  was      restore                     lost     is\n"
        "      1  RUNNING  adopted                              COMPLETED\n"
        "      2  RUNNING  resumed after step 4        2 steps  PRUNED\n"
        "      3  RUNNING  resumed from the beginning  1 step   COMPLETED\n"
        "      4  FAILED   restarted at step 0         7 steps  FAILED\n"
        "      5  PENDING  started                              COMPLETED\n"
        "      6  PENDING  left out                             SKIPPED"
    )


def test_nothing_is_said_where_nothing_was_done() -> None:
    kept = [planned(number, S.COMPLETED, Action.KEEP) for number in range(3)]
    assert not [*restored_lines(summary_of(kept, [sample_trial(number, S.COMPLETED) for number in range(3)]))]
    assert [*restored_lines(summary_of([], [sample_trial(0, S.COMPLETED)]))] == ["restored: 1 newly proposed; 0 steps lost"]


def test_a_long_table_shows_those_that_lost_most() -> None:
    count = 10_000
    plan = [planned(number, S.RUNNING, Action.RESUME, 1, lost=number % 100) for number in range(count)]
    lines = [*restored_lines(summary_of(plan, [sample_trial(number, S.COMPLETED) for number in range(count)]))]
    assert len(lines) == SHOWN + 3
    assert lines[0] == f"restored: {count} resumed; {sum(number % 100 for number in range(count))} steps lost"
    assert [int(line.split()[0]) for line in lines[2:-1]] == [99 + 100 * place for place in range(SHOWN)]
    assert lines[-1] == f"  and {count - SHOWN} more: --json has every one"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with closing(create(tmp_path / "runs")) as opened:
        yield opened


def driven(opened: Opened) -> Lab:
    Leases(opened.database, opened.record.id).take(seen=0, epoch=1, holder={"pid": 1}, action="started", detail={})
    return Lab(opened.database, opened.record)


def test_a_fresh_search_says_nothing_of_it_and_a_restored_one_does(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    lab = driven(opened)
    lab.end(lab.started(), loss=1.0)
    fresh = result_of(opened, "done")
    assert fresh.restored is None
    found = result_of(opened, "done", plan=[planned(0, S.RUNNING, Action.RESUME, 3, lost=2)])
    assert found.restored is not None
    assert (found.restored.resumed, found.restored.work_lost) == ({0: 3}, 2)
    for result, said in ((fresh, False), (found, True)):
        stream = io.StringIO()
        progress = Progress(Console(file=stream, width=120))
        progress.opened(opened, restored=said)
        progress.ended(result)
        assert ("restored: 1 resumed; 2 steps lost" in stream.getvalue()) is said
        caplog.clear()
        with caplog.at_level(logging.INFO):
            RunLog(logging.getLogger("run")).ended(result)
        assert ("restored: 1 resumed; 2 steps lost" in caplog.messages) is said
        assert any("resumed after step 3" in message for message in caplog.messages) is said


# What engines are told

TPE: dict[str, Any] = {
    "space": {"x": {"type": "float", "low": 0.0, "high": 1.0}},
    "search": {"engine": "tpe", "num_trials": 40, "seed": 1, "options": {"n_startup_trials": 4}},
}


def histories(folder: Path) -> dict[str, list[Any]]:
    """Return the same trials as three stores tell them: all succeeded; one failed first, and was resumed; it failed."""
    found = {}
    for name in ("succeeded", "resumed", "failed"):
        with closing(create(folder / name, **TPE)) as opened:
            lab = driven(opened)
            for number in range(8):
                writer = lab.started(number / 8 + 0.05)
                if number == 2 and name != "succeeded":
                    lab.save(writer, 0, loss=9.0)
                    lab.driver.end(writer.attempt, FAILED)
                else:
                    lab.end(writer, loss=abs(number / 8 - 0.25))
            if name == "resumed":
                lab.driver.rerun(lab.row(2), restart=False)
                again = lab.claim(2, token="again")
                lab.driver.end(again.attempt, Ending(outcome=Outcome.COMPLETED, metrics={"loss": 0.0}))
            found[name] = lab.reader.trials()
            spec = opened.spec
    found["spec"] = [spec]
    return found


def test_a_failed_trial_that_succeeds_later_reaches_the_engine_as_a_success(tmp_path: Path) -> None:
    """R10: with TPE, whether it is rebuilt from the rows, or has seen the failure and learns of the success."""
    found = histories(tmp_path)
    spec = found["spec"][0]

    def proposals(*trials: Any) -> list[Any]:
        engine = make(spec, 1)
        for trial in trials:
            engine.observe(trial)
        return [engine.propose(number) for number in range(8, 14)]

    expected = proposals(*found["succeeded"])
    assert [trial.status for trial in found["resumed"]] == [S.COMPLETED] * 8
    assert proposals(*found["resumed"]) == expected
    assert proposals(*found["failed"], found["resumed"][2]) == expected
    assert proposals(*found["failed"]) != expected
