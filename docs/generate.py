"""Write the parts of the documentation that the code knows best: the commands, the spec's keys, the tables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from sqlalchemy import UniqueConstraint

from holdfast.cli import _parser
from holdfast.core.faults import POINTS
from holdfast.core.spec import ExperimentSpec
from holdfast.settings import Settings
from holdfast.storage.database.schema import VERSION, metadata

HERE = Path(__file__).parent

FOLDERS = {
    "cache_folder": "`$XDG_CACHE_HOME/holdfast`, or `~/.cache/holdfast`",
    "data_folder": "`$XDG_DATA_HOME/holdfast`, or `~/.local/share/holdfast`",
}
"""Defaults that are another one for each user."""


def main() -> None:
    """Write cli.md, spec.md, settings.md and schema.md."""
    for name, text in pages().items():
        (HERE / name).write_text(text)


def pages() -> dict[str, str]:
    """Return the text of each page by file name."""
    os.environ["COLUMNS"] = "100"
    written = {"cli.md": commands(), "spec.md": keys(), "settings.md": variables(), "schema.md": tables()}
    return {name: "\n".join(lines) + "\n" for name, lines in written.items()}


def commands() -> Iterator[str]:
    """Yield the help of every command."""
    parser = _parser()
    yield "# Commands\n\nWritten by `make docs` from the program itself.\n"
    yield f"```\n{parser.format_help().strip()}\n```\n"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from _help("holdfast", action)
    yield "## Crash points\n\n`HOLDFAST_FAULT=NAME` makes a command die by SIGKILL there.\n"
    yield "| name | what is half-done then |\n|---|---|"
    for name, text in POINTS.items():
        yield f"| `{name}` | {text} |"


def _help(program: str, action: argparse._SubParsersAction[argparse.ArgumentParser]) -> Iterator[str]:
    for name, command in action.choices.items():
        yield f"## {program} {name}\n\n```\n{command.format_help().strip()}\n```\n"
        for below in command._actions:
            if isinstance(below, argparse._SubParsersAction):
                yield from _help(f"{program} {name}", below)


def keys() -> Iterator[str]:
    """Yield the spec's keys with defaults and descriptions."""
    yield "# Keys of a spec\n\nWritten by `make docs` from the program itself.\n\n| key | default | meaning |\n|---|---|---|"
    yield from _rows(ExperimentSpec, None, "")


def _rows(model: type[BaseModel], given: BaseModel | None, prefix: str) -> Iterator[str]:
    """Yield a row for each key of ``model``; defaults are those of ``given``, where its parent has one of its own."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        value = getattr(given, name) if given is not None else field.get_default(call_default_factory=True)
        if isinstance(kind, type) and issubclass(kind, BaseModel) and "root" not in kind.model_fields:
            yield from _rows(kind, value, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{value!r}`"
        yield f"| `{prefix}{name}` | {default} | {field.description or ''} |"


def variables() -> Iterator[str]:
    """Yield the environment variables that processes of ours read."""
    yield "# Environment variables\n\nWritten by `make docs` from the program itself.\n"
    yield "What a spec or a command line says counts before them. Workers on other machines, and jobs of a work pool,"
    yield "read their own.\n"
    yield "| variable | default | meaning |\n|---|---|---|"
    for name, field in Settings.model_fields.items():
        value = field.default
        default = FOLDERS.get(name) or ("" if value is None else f"`{value:g}`" if isinstance(value, float) else f"`{value}`")
        yield f"| `{Settings.model_config.get('env_prefix', '')}{name.upper()}` | {default} | {field.description} |"
    yield "\n`HOLDFAST_FAULT` is for tests; [the crash points](cli.md#crash-points) are its values."
    yield "Prefect's own variables ([deploying](deploying.md)) and those of [object stores](object-stores.md) hold as ever."


def tables() -> Iterator[str]:
    """Yield every table of the database with its columns."""
    yield f"# Database\n\nWritten by `make docs` from the program itself. This is schema {VERSION}.\n"
    yield from diagram()
    for table in metadata.sorted_tables:
        yield f"## {table.name}\n\n{table.comment}\n\n| column | refers to | meaning |\n|---|---|---|"
        for column in table.columns:
            target = ", ".join(key.target_fullname for key in column.foreign_keys)
            yield f"| `{column.name}` | {target} | {column.comment} |"
        yield ""


def diagram() -> Iterator[str]:
    """Yield the tables, their keys and how they refer to each other, as a Mermaid entity diagram."""
    yield "```mermaid\nerDiagram"
    for table in metadata.sorted_tables:
        for key in sorted(table.foreign_keys, key=lambda key: key.parent.name):
            many = "|o" if key.parent.nullable else "||"
            yield f"    {key.column.table.name} {many}--o{{ {table.name} : {key.parent.name}"
    for table in metadata.sorted_tables:
        unique = {
            column.name
            for constraint in table.constraints
            if isinstance(constraint, UniqueConstraint)
            for column in constraint.columns
        }
        yield f"    {table.name} {{"
        for column in table.columns:
            marks = {"PK": column.primary_key, "FK": bool(column.foreign_keys), "UK": column.name in unique}
            found = ", ".join(mark for mark, given in marks.items() if given)
            if found:
                yield f"        {'integer' if column.type.python_type is int else 'text'} {column.name} {found}"
        yield "    }"
    yield "```\n"


if __name__ == "__main__":
    main()
