"""What the commands share: their parsers, output, and how they open an experiment."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

from rich.console import Console

EXIT_CODES = (
    "exit codes: 0 done; 1 some trials errored, or checkpoints are bad; 2 bad input; 3 somebody else holds the experiment; "
    "4 database, storage or Prefect failed; 129/130/143 on a signal"
)

Row = TypeVar("Row")

SHOWN = 100
"""Rows that a terminal is shown when nothing else is asked for."""

DRAWN = 1000
"""Rows that are drawn as a table at most: it takes half a millisecond each; more are printed as plain lines."""

Commands = Any  # argparse gives its type no public name


def fail(message: str, code: int) -> int:
    """Say why on stderr; return the exit code."""
    sys.stdout.flush()
    print(f"holdfast: {message}", file=sys.stderr)
    return code


def command(commands: Commands, name: str, run: Any, text: str, *, as_json: bool = True) -> argparse.ArgumentParser:
    """Add a command that calls ``run`` with the parsed options."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
    parser.set_defaults(run=run)
    if as_json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def database_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--database``."""
    parser.add_argument("--database", metavar="URL", help="the experiment's database, if it is not beside it")


def storage_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--storage-option``."""
    parser.add_argument(
        "--storage-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an object store's, such as endpoint_url=http://...; credentials are better left to the environment",
    )


def storage_options(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return what ``--storage-option`` says, its values read as YAML, or None when it is not given; SpecError for no pair."""
    from holdfast.core.errors import SpecError
    from holdfast.specfile import apply_overrides

    for pair in options.storage_option:
        if not all(pair.partition("=")[:2]):
            raise SpecError("--storage-option takes KEY=VALUE, such as --storage-option endpoint_url=http://127.0.0.1:9000")
    data = apply_overrides({}, [f"storage_options.{pair}" for pair in options.storage_option], "--storage-option")
    found: dict[str, Any] | None = data.get("storage_options")
    return found


def terminal() -> Console:
    """Return the console for people; with a pipe it is wide, so that no line is cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def print_json(value: object) -> None:
    """Print strict JSON; what no terminal may get, or stdout cannot encode, as an escape, which JSON has for it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if not _encodable(text):
        text = json.dumps(value, indent=2, allow_nan=False)
    if not text.replace("\n", "").isprintable():
        text = "".join(letter if letter == "\n" or letter.isprintable() else _escaped(letter) for letter in text)
    print(text)


def _encodable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _escaped(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else json.dumps(letter)[1:-1]


@contextmanager
def json_alone(options: argparse.Namespace) -> Iterator[None]:
    """With ``--json`` send to stderr what a user's engine or trainable prints meanwhile: stdout is for JSON alone."""
    if not options.json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def open_experiment(options: argparse.Namespace, *, readonly: bool = True) -> Any:
    """Open the experiment that the options name."""
    from holdfast.experiment import Experiment
    from holdfast.locate import find

    opened = find(options.path, database=options.database, readonly=readonly, options=storage_options(options))
    for note in () if getattr(options, "json", False) else opened.notes:
        print(f"holdfast: {note}", file=sys.stderr)
    return Experiment(opened)


def limit_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--limit`` and ``--all``."""
    shown = parser.add_mutually_exclusive_group()
    text = f"only the last N; a terminal is shown {SHOWN} unless told otherwise"
    shown.add_argument("--limit", type=_count, metavar="N", help=text)
    shown.add_argument("--all", action="store_true", help=f"every {what}, on a terminal too")


def _count(text: str) -> int:
    """Read a whole number from 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def limited(options: argparse.Namespace, rows: Sequence[Row]) -> tuple[Sequence[Row], int, bool]:
    """Return the rows to print, how many earlier ones are left out, and whether they are to be drawn as a table."""
    on_terminal = sys.stdout.isatty() and not options.json
    limit = options.limit or (SHOWN if on_terminal and not options.all else len(rows))
    chosen = rows[-limit:] if limit else rows
    return chosen, len(rows) - len(chosen), on_terminal and len(chosen) <= DRAWN
