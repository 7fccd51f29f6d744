"""Texts that user code makes, where they are shown: terminals and pipes of every encoding, and JSON."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from store_kit import create

from holdfast.cli import main
from holdfast.core.trial import ErrorInfo, Outcome
from holdfast.locate import Opened
from holdfast.storage.database.driver import Ending
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.rows import storable
from holdfast.testing.lab import Lab

TEXT = "\x1b[2J\x1b]0;x\x07 \x9b31m \u202eabc\u2066 caf\udce9 ü 日本 \x7f \x85 \U000e0001 [red]x[/red]"
ERROR = ErrorInfo(kind=f"Bad\n{TEXT}", message=TEXT, traceback=f"{TEXT}\n" * 3)
KIND, MESSAGE, TRACEBACK = (storable(text) for text in (ERROR.kind, ERROR.message, ERROR.traceback))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with closing(create(tmp_path / "runs")) as opened:
        Leases(opened.database, opened.record.id).take(seen=0, epoch=1, holder={"pid": 1}, action="x", detail={})
        lab = Lab(opened.database, opened.record)
        lab.started().fail(Ending(outcome=Outcome.FAILED, error=ERROR, note=TEXT), max_failures=0)
        yield opened


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("words", [["--trial", "0"], ["--trial", "0", "--json"], [], ["--json"]])
def test_no_text_harms_a_terminal_or_ends_the_command(
    opened: Opened, words: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["trials", str(opened.folder.path), *words]) == 0
    stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert shown.replace("\n", "").isprintable()
    if "--json" not in words:
        assert "Bad\\n" in shown
        return
    found = json.loads(shown)[0]
    if words == ["--json"]:
        assert found["error"] == f"{KIND}: {MESSAGE}"
    else:
        assert found["error"] == {"kind": KIND, "message": MESSAGE, "traceback": TRACEBACK}
    assert ("日本" in shown) is (encoding == "utf-8")
