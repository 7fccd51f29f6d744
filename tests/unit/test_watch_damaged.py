"""One experiment that cannot be read does not keep ``watch`` from looking after the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from restoring_kit import alter, deserted, made

from holdfast.flows.abandoned import UNREADABLE, Claimed, Places, Row, claim, examine, survey
from holdfast.flows.launching import Restoring, alive
from holdfast.flows.watching import Surroundings, Watch
from holdfast.locate import Opened
from holdfast.storages import paths_in

DAMAGES = {
    "a holder that is no JSON": "UPDATE experiment SET holder = 'garbage'",
    "a holder that is a list": "UPDATE experiment SET holder = '[1]'",
    "a process id that is no number": """UPDATE experiment SET holder = '{"pid": "x"}'""",
    "an epoch that is no number": "UPDATE experiment SET epoch = 'x'",
    "an audit row that is no JSON": "UPDATE audit SET detail = 'garbage' WHERE action = 'started'",
    "an audit row that is a list": "UPDATE audit SET detail = '[]' WHERE action = 'started'",
}


def looked(opened: Opened) -> dict[str, Row]:
    return {Path(row.path).name: row for row, _ in survey(Places(storages=(str(opened.folder.path.parent),)), alive)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_that_cannot_be_read_are_one_experiments_affair(tmp_path: Path, damage: str) -> None:
    with made(tmp_path) as opened:
        deserted(opened).lab.driver.propose({"x": 0.5, "n": 1})
        alter(opened, """UPDATE audit SET detail = '{"token": "t"}' WHERE action = 'started'""")  # as whoever drives writes it
        places = Places(storages=(str(opened.folder.path.parent),))
        _, before = examine(str(opened.folder.path), places, alive)
        assert before is not None
        assert before.row.verdict == "restore"
        alter(opened, DAMAGES[damage])
        row = looked(opened)[opened.record.name]
        assert row.verdict == UNREADABLE
        assert "restore the database from a backup" in row.why
        late = claim(before, places, alive)  # it was damaged between the look and the claim
        assert not isinstance(late, Claimed)
        assert late.verdict == UNREADABLE


class NoRestores:
    awaits = True

    def check(self) -> None: ...

    def start(self, claimed: Claimed) -> Restoring:
        raise AssertionError(f"{claimed.examined.row} was to be left alone")


def test_a_storage_that_is_not_there_is_said_once_while_that_lasts(tmp_path: Path) -> None:
    said: list[str] = []
    watch = Watch(Places(storages=(str(tmp_path / "runs"),)), NoRestores(), Surroundings(say=said.append, warn=said.append))
    for _ in range(3):
        assert [row.verdict for row in watch.look()] == [UNREADABLE]
        assert watch.exit_code() == 4
    assert len(said) == 1
    assert "does not exist" in said[0]


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    with made(tmp_path) as opened:
        storage = opened.folder.path.parent
        odd = Path(str(storage).encode().decode()) / b"\xff".decode(errors="surrogateescape")
        odd.mkdir()
        (odd / "experiment.json").write_text(json.dumps({}))
        assert str(odd) in paths_in(str(storage), None)
        rows = looked(opened)
        assert rows[odd.name].verdict == UNREADABLE
        assert rows[opened.record.name].verdict == "left alone"
