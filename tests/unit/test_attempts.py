"""The attempts of a trial, as people and programs read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from store_kit import create

from holdfast.cli import main
from holdfast.core.errors import InvalidInput
from holdfast.core.trial import ErrorInfo, Outcome
from holdfast.experiment import Experiment
from holdfast.locate import Opened
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.leases import Leases
from holdfast.testing.lab import Lab

HARD = ErrorInfo(
    kind="ValueError", message="bad\x1b[31m\nworse", traceback='Traceback ...\n  File "x.py"\nValueError: bad\x1b[31m'
)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """An experiment with one trial: it failed, went on, was lost, began anew, was preempted, and waits."""
    with closing(create(tmp_path / "runs")) as opened:
        Leases(opened.database, opened.record.id).take(seen=0, epoch=1, holder={"pid": 1}, action="x", detail={})
        lab = Lab(opened.database, opened.record)
        first = lab.started()
        lab.save(first, 3)
        lab.driver.end(first.attempt, Ending(outcome=Outcome.FAILED, error=HARD))
        lab.driver.rerun(lab.row(0), restart=False, note="a checkpoint\nis not used")
        lab.driver.end(lab.claim(0, token="2").attempt, Ending(outcome=Outcome.LOST, note="its driver died"))
        lab.driver.rerun(lab.row(0), restart=True)
        lab.driver.end(lab.claim(0, token="3").attempt, Ending(outcome=Outcome.PREEMPTED))
        yield opened


def test_every_attempt_is_there_with_its_own_error(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    attempts = Experiment(opened).attempts(0)
    assert [(one.number, one.outcome, one.error) for one in attempts] == [
        (1, Outcome.FAILED, HARD),
        (2, Outcome.LOST, None),
        (3, Outcome.PREEMPTED, None),
        (4, None, None),
    ]
    assert main(["trials", str(opened.folder.path), "--trial", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["number"], one["reason"], one["outcome"], one["parent"], one["step"]) for one in found] == [
        (1, "first", "failed", None, None),
        (2, "resume", "lost", 1, 3),
        (3, "restart", "preempted", None, None),
        (4, "resume", None, None, None),
    ]
    assert found[0]["error"] == vars(HARD)
    assert all(one["started"].endswith("+00:00") and one["started"] <= one["ended"] for one in found[:3])
    assert (found[3]["started"], found[3]["ended"]) == (None, None)
    assert "its driver died" in found[1]["note"]


def test_people_read_it_and_nothing_harms_their_terminal(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trials", str(opened.folder.path), "--trial", "0"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "attempt 1 (first): failed, from step 0"
    assert lines[2:7] == [
        r"  ValueError: bad\x1b[31m",
        "    worse",
        "    Traceback ...",
        '      File "x.py"',
        r"    ValueError: bad\x1b[31m",
    ]
    assert lines[7] == "attempt 2 (resume): lost, after step 3 of attempt 1"
    assert lines[-1] == "attempt 4 (resume): not started, from step 0"
    assert main(["trials", str(opened.folder.path), "--trial", "0", "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == lines[-1] + "\n"
    assert err.startswith("3 earlier attempts are not shown")


def test_a_trial_that_is_not_there(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trials", str(opened.folder.path), "--trial", "1"]) == 2
    assert "it has the trials 0 to 0" in capsys.readouterr().err
    for number in (1, -1, True, "0"):
        with pytest.raises(InvalidInput, match="there is no trial"):
            Experiment(opened).attempts(number)  # type: ignore[arg-type]  # on purpose
