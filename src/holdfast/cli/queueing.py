"""The commands that give an experiment trials from outside: enqueue, merge."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from holdfast.cli.common import Commands, command, database_option, open_experiment, print_json, storage_option
from holdfast.core.errors import InvalidConfig, InvalidInput


def add_queueing(commands: Commands) -> None:
    enqueue = command(commands, "enqueue", _enqueue, "queue trials of a config for the running search, or the next one")
    enqueue.add_argument("path", metavar="PATH")
    enqueue.add_argument(
        "--config", required=True, metavar="JSON", help="such as '{\"lr\": 0.1}'; @FILE reads a file, - the standard input"
    )
    enqueue.add_argument("--at", metavar="TIME", help="not before this time: ISO 8601 with its zone, 2026-11-21T18:00:00+01:00")
    enqueue.add_argument("--repeat", type=int, default=1, metavar="N", help="that many trials of the config, as one group (1)")
    enqueue.add_argument("--metadata", metavar="KEY=VALUE", action="append", default=[], help="kept with each trial")
    merge = command(commands, "merge", _merge, "warm an experiment up with the finished trials of others in its database")
    merge.add_argument("path", metavar="PATH")
    merge.add_argument("names", metavar="NAME", nargs="+", help="name or UUID of an experiment in the same database")
    for parser in (enqueue, merge):
        database_option(parser)
        storage_option(parser)


def _enqueue(options: argparse.Namespace) -> int:
    config = _config(options.config)
    start = _moment(options.at)
    metadata = _pairs(options.metadata)
    with open_experiment(options, readonly=False) as experiment:
        trials = experiment.enqueue(config, start, options.repeat, metadata)
        if options.json:
            print_json([_queued_json(trial) for trial in trials])
            return 0
        first, last = trials[0].number, trials[-1].number
        words = f"trial {first} is" if first == last else f"trials {first} to {last} are"
        when = "" if start is None else f" for {start.isoformat()}"
        runner = "the running search starts" if experiment.lease.is_held else f"`holdfast restore {experiment.path}` runs"
        print(f"{words} queued{when}; {runner} {'it' if first == last else 'them'}")
    return 0


def _queued_json(trial: Any) -> dict[str, Any]:
    return {
        "number": trial.number,
        "status": trial.status.value,
        "config": trial.config,
        "group": trial.group,
        "repeat": trial.repeat,
        "ts_start": None if trial.ts_start is None else trial.ts_start.isoformat(),
        "metadata": trial.metadata,
    }


def _config(given: str) -> Any:
    """Read ``--config``: JSON, or where to find it. InvalidConfig when it is none, or names a key twice."""
    if given == "-":
        text, source = sys.stdin.read(), "the standard input"
    elif given.startswith("@"):
        source = given[1:]
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidInput(f"--config: {source} cannot be read: {error}") from None
    else:
        text, source = given, "--config"
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{source} holds no JSON: {error}; write it as '{{\"lr\": 0.1}}'") from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidConfig(f"config names {next(name for name in names if names.count(name) > 1)!r} twice; name it once")
    return found


def _moment(given: str | None) -> datetime | None:
    if given is None:
        return None
    try:
        return datetime.fromisoformat(given)
    except ValueError:
        raise InvalidInput(f"--at {given!r} is no time; write ISO 8601 with a zone: 2026-11-21T18:00:00+01:00") from None


def _pairs(given: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InvalidInput(f"--metadata {text!r} is not of the form KEY=VALUE")
        pairs.append((key, value))
    return pairs


def _merge(options: argparse.Namespace) -> int:
    with open_experiment(options, readonly=False) as experiment:
        added = experiment.merge(options.names)
        if options.json:
            print_json(added)
            return 0
        for name, count in added.items():
            print(f"{count} trials of {name} were merged into {experiment.name}")
        left_out = experiment.load().left_out
        if left_out:
            print(f"{left_out} merged trials lack a parameter that has no default: they are left out")
    return 0
