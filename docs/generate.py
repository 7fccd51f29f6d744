"""Write the parts of the documentation that the code knows best: the commands, the spec's keys, the tables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from holdfast.cli import _parser
from holdfast.core.faults import POINTS
from holdfast.core.spec import ExperimentSpec
from holdfast.storage.database.schema import metadata

HERE = Path(__file__).parent


def main() -> None:
    """Write cli.md, spec.md and schema.md."""
    os.environ["COLUMNS"] = "100"
    (HERE / "cli.md").write_text("\n".join(commands()) + "\n")
    (HERE / "spec.md").write_text("\n".join(keys()) + "\n")
    (HERE / "schema.md").write_text("\n".join(tables()) + "\n")


def commands() -> Iterator[str]:
    """Yield the help of every command."""
    parser = _parser()
    yield "# Commands\n\nWritten by `make docs` from the program itself.\n"
    yield f"```\n{parser.format_help().strip()}\n```\n"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"## holdfast {name}\n\n```\n{command.format_help().strip()}\n```\n"
    yield "## Crash points\n\n`HOLDFAST_FAULT=NAME` makes a command die by SIGKILL there.\n"
    yield "| name | what is half-done then |\n|---|---|"
    for name, text in POINTS.items():
        yield f"| `{name}` | {text} |"


def keys() -> Iterator[str]:
    """Yield the spec's keys with defaults and descriptions."""
    yield "# Keys of a spec\n\nWritten by `make docs` from the program itself.\n\n| key | default | meaning |\n|---|---|---|"
    yield from _rows(ExperimentSpec, "")


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and "root" not in kind.model_fields:
            yield from _rows(kind, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
        yield f"| `{prefix}{name}` | {default} | {field.description or ''} |"


def tables() -> Iterator[str]:
    """Yield every table of the database with its columns."""
    yield "# Database\n\nWritten by `make docs` from the program itself.\n"
    for table in metadata.sorted_tables:
        yield f"## {table.name}\n\n{table.comment}\n\n| column | refers to | meaning |\n|---|---|---|"
        for column in table.columns:
            target = ", ".join(key.target_fullname for key in column.foreign_keys)
            yield f"| `{column.name}` | {target} | {column.comment} |"
        yield ""


if __name__ == "__main__":
    main()
