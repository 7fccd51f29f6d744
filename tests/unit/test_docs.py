"""What the program writes into docs/ says what the program does today."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from holdfast.storage.database.schema import metadata

DOCS = Path(__file__).parents[2] / "docs"


def pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("holdfast_docs", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, str] = module.pages()
    return found


@pytest.mark.parametrize("name", ["cli.md", "spec.md", "settings.md", "schema.md"])
def test_a_page_is_up_to_date(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "cli.md" and sys.version_info[:2] != (3, 11):
        pytest.skip("the page is written by Python 3.11: later versions lay out the help of commands otherwise")
    monkeypatch.setenv("COLUMNS", "100")
    assert (DOCS / name).read_text() == pages()[name], f"docs/{name} is out of date: run `make docs`"


def test_the_diagram_shows_every_table_and_reference() -> None:
    text = re.search(r"```mermaid\nerDiagram\n(.*?)```", (DOCS / "schema.md").read_text(), re.DOTALL)
    assert text is not None
    relations = re.findall(r"^    (\w+) (?:\|\||\|o)--o\{ (\w+) : (\w+)$", text[1], re.MULTILINE)
    keys = [key for table in metadata.tables.values() for key in table.foreign_keys]
    assert sorted(relations) == sorted((key.column.table.name, key.parent.table.name, key.parent.name) for key in keys)
    assert set(re.findall(r"^    (\w+) \{$", text[1], re.MULTILINE)) == set(metadata.tables)
