"""What ``holdfast show`` and ``trials`` say of runners and workers, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from restoring_kit import alter, deserted
from store_kit import create, on_terminal
from upkeep_kit import Shop

from holdfast.cli import main
from holdfast.core.execution_section import ExecutionSection
from holdfast.report.working import SHOWN, execution_json, plain_address, runner_words, workers_table
from holdfast.storage.database import workers
from holdfast.storage.database.attempts import AttemptWriter

EVIL = "w \x1b[31m[bold]ü"


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    execution = {"runner": "dask", "address": "tls://scheduler:8786"}
    with closing(create(tmp_path / "runs", execution=execution)) as opened:
        yield deserted(opened)


def join(shop: Shop, name: str, epoch: int = 1) -> int:
    """Let a worker join; return the id of its row."""
    who: dict[str, Any] = {"hostname": f"host-{name}", "host": "h", "pid": 7, "started": "1", "about": {}}
    return workers.join(shop.opened.database, shop.opened.record.id, epoch, name=name, engine="dask", **who)


def claimed(shop: Shop, worker: int) -> AttemptWriter:
    lab = shop.lab
    attempt = lab.trial(lab.driver.propose({"x": 0.5})).attempt.id
    return AttemptWriter.claim(lab.database, lab.id, lab.epoch, attempt, token="t", worker=worker)


@pytest.fixture
def busy(shop: Shop) -> Shop:
    """Three workers: one with work, one that is silent, one that left."""
    first, silent, left = (join(shop, name) for name in ("one", "two", EVIL))
    claimed(shop, first)
    shop.lab.end(claimed(shop, first), loss=1.0)
    shop.lab.end(claimed(shop, left), loss=2.0)
    shop.lab.started()
    alter(shop.opened, f"UPDATE worker SET seen = seen - 100 WHERE id = {silent}")
    workers.leave(shop.opened.database, shop.opened.record.id, left, "told to end")
    return shop


def said(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    assert main([*map(str, command)]) == 0
    return capsys.readouterr().out


def test_the_workers_of_the_newest_drive_in_json(busy: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(said(capsys, "show", "--json", busy.path))
    assert (shown["runner"], shown["address"]) == ("dask", "tls://scheduler:8786")
    for worker in shown["workers"]:
        assert worker.pop("silent") >= (100 if worker["name"] == "two" else 0)
    rest = {"runner": "dask", "pid": 7}
    assert shown["workers"] == [
        {"name": "one", "hostname": "host-one", "run": 1, "running": 1, "beats": True, "left": None, **rest},
        {"name": "two", "hostname": "host-two", "run": 0, "running": 0, "beats": False, "left": None, **rest},
        {"name": EVIL, "hostname": f"host-{EVIL}", "run": 1, "running": 0, "beats": False, "left": "told to end", **rest},
    ]
    busy.lab.take_over()
    join(busy, "new", epoch=2)
    assert [worker["name"] for worker in json.loads(said(capsys, "show", "--json", busy.path))["workers"]] == ["new"]
    trials = json.loads(said(capsys, "trials", "--json", busy.path))
    assert [trial["worker"] and trial["worker"]["name"] for trial in trials] == ["one", "one", EVIL, None]


def test_the_workers_in_words(busy: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "show", busy.path)
    assert "runner:  dask, tls://scheduler:8786\n" in text
    assert "still alive of its workers: one\n" in text
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("worker "))
    assert lines[start].split() == ["worker", "host", "runner", "run", "running", "last", "beat", "left"]
    assert lines[start + 1].split()[:5] == ["one", "host-one", "dask", "1", "1"]
    assert lines[start + 2].split()[:5] == ["two", "host-two", "dask", "0", "0"]
    assert r"w \x1b[31m[bold]ü" in text
    assert "told to end" in lines[start + 3]
    attempt = said(capsys, "trials", "--trial", "2", busy.path)
    assert attempt.startswith("attempt 1 (first): completed")
    (found,) = json.loads(said(capsys, "trials", "--json", "--trial", "2", busy.path))
    assert found["worker"] == {"name": EVIL, "runner": "dask", "hostname": f"host-{EVIL}", "pid": 7}
    (found,) = json.loads(said(capsys, "trials", "--json", "--trial", "3", busy.path))
    assert found["worker"] is None


def test_many_workers_are_cut_short_for_people(shop: Shop) -> None:
    for number in range(SHOWN + 5):
        worker = join(shop, f"w{number}")
        if number < 10:
            workers.leave(shop.opened.database, shop.opened.record.id, worker, f"reason {number}")
    code, text, _ = on_terminal(200, "show", str(shop.path))
    assert code == 0
    names = [line.split()[0] for line in text.splitlines() if line.startswith("w") and " host-" in line]
    assert names == [*(f"w{number}" for number in range(10, SHOWN + 5)), *(f"w{number}" for number in (9, 8, 7, 6, 5))]
    assert "5 more workers are in what --json prints" in text
    assert "w10, w11, w12 and 12 more" in text


def test_a_search_on_one_machine_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(create(tmp_path / "runs")) as opened:
        text = said(capsys, "show", opened.folder.path)
        assert "runner:  threads of the search's own machine\n" in text
        assert "last beat" not in text
        shown = json.loads(said(capsys, "show", "--json", opened.folder.path))
        assert (shown["runner"], shown["address"], shown["workers"]) == ("threads", None, [])
    assert workers_table([])[1] == 0


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (None, None),
        ("auto", "auto"),
        ("head:6379", "head:6379"),
        ("ray://user:word@head:10001", "ray://head:10001"),
        ("tls://word@[::1]:8786", "tls://[::1]:8786"),
        ("wss://host:443/path?token=word#word", "wss://host:443"),
    ],
)
def test_an_address_shows_no_credentials(given: str | None, shown: str | None) -> None:
    assert plain_address(given) == shown


def test_where_trials_run() -> None:
    assert runner_words(ExecutionSection(runner="ray")) == "ray, started for the run"
    assert runner_words(ExecutionSection(runner="workpool", deployment="trial/big")) == "workpool, trial/big"
    assert execution_json(ExecutionSection()) == {"runner": "threads", "address": None}
