"""One experiment that cannot be read does not keep ``watch`` from looking after the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from restoring_kit import alter, deserted, made

from holdfast.flows.abandoned import UNREADABLE, Claimed, Places, Row, claim, examine, survey
from holdfast.flows.launching import alive
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
