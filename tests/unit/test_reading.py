"""What ``holdfast trials`` and ``list`` print of many trials, and of what is hard to print."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from store_kit import create, on_terminal

from holdfast.cli import main
from holdfast.core.trial import ErrorInfo, Outcome
from holdfast.storage.database.driver import Driver, Ending
from holdfast.storage.database.leases import Leases

COUNT = 120
HARD = 'two\nlines\r\x1b[31m\ttab "ü" caf\\udce9 [bold]'


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of 120 trials; the first one failed and has a config that is hard to print."""
    with closing(create(tmp_path_factory.mktemp("store"))) as opened:
        leases = Leases(opened.database, opened.record.id)
        leases.take(seen=0, epoch=1, holder={}, action="started", detail={})
        driver = Driver(opened.database, opened.record.id, 1, seed=1)
        writer = driver.start({"x": 0.5, "hard": HARD}, token="t")
        error = ErrorInfo(kind="ValueError", message="bad\nworse")
        writer.fail(Ending(outcome=Outcome.FAILED, error=error), max_failures=0)
        for number in range(1, COUNT):
            writer = driver.start({"x": number / COUNT}, token="t")
            driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED, metrics={"loss": number / 7}))
        leases.release(epoch=1, active=1.0, ended="done")
        return opened.folder.path


def test_a_pipe_gets_every_trial_in_a_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trials", str(path)]) == 0
    out, err = capsys.readouterr()
    lines = out.split("\n")
    assert len(lines) == 1 + COUNT + 1
    assert lines[0].split() == ["trial", "status", "loss", "step", "attempts", "config"]
    assert lines[1].split()[:2] == ["0", "FAILED"]
    assert lines[1].endswith("ValueError: bad")
    assert r"two\nlines\r\x1b[31m\ttab" in lines[1]
    assert lines[-2].split() == ["119", "COMPLETED", "17", "1", "x=0.99167"]
    assert err == ""


def test_a_limit_shows_the_last_ones_and_says_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trials", str(path), "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["trial", "118", "119"]
    assert err.startswith("118 earlier trials are not shown")
    assert main(["trials", str(path), "--limit", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [trial["number"] for trial in json.loads(out)] == [118, 119]
    assert err == ""
    assert main(["trials", str(path), "--limit", "1000", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == COUNT


@pytest.mark.parametrize("given", [["--limit", "0"], ["--limit", "-1"], ["--limit", "many"], ["--limit", "3", "--all"]])
def test_a_bad_limit_is_refused(path: Path, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["trials", str(path), *given])
    assert caught.value.code == 2
    assert "--limit" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "shown"), [([], 100), (["--all"], COUNT), (["--limit", "3"], 3)])
def test_a_terminal_gets_the_last_ones_unless_told_otherwise(path: Path, given: list[str], shown: int) -> None:
    code, text, err = on_terminal(400, "trials", str(path), *given)
    assert code == 0
    numbers = [line.split()[0] for line in text.splitlines() if " COMPLETED " in line]
    assert numbers == [str(number) for number in range(max(COUNT - shown, 1), COUNT)]
    assert (f"{COUNT - shown} earlier trials are not shown" in err) == (shown < COUNT)


def test_a_list_in_words_needs_no_trials_and_in_json_has_the_best(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(path.parent)]) == 0
    assert "119 COMPLETED, 1 FAILED" in capsys.readouterr().out
    assert main(["list", "--json", str(path.parent)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["best"]["number"] == 1
