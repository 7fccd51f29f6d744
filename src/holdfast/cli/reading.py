"""The commands that look: list, show, trials, checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.cli.common import (
    Commands,
    command,
    database_option,
    open_experiment,
    print_json,
    storage_option,
    storage_options,
    terminal,
)
from holdfast.core.errors import Corrupt, HoldfastError, SpecError

SHOWN = 100
"""Trials that a terminal is shown when nothing else is asked for."""

DRAWN = 1000
"""Trials that are drawn as a table at most: it takes half a millisecond each; more are printed as plain lines."""


def add_reading(commands: Commands) -> None:
    listing = command(commands, "list", _list, "list the experiments of a storage")
    listing.add_argument("storage", metavar="STORAGE", nargs="?", default="./runs")
    database_option(listing)
    storage_option(listing)
    show = command(commands, "show", _show, "show an experiment: status, holder, best trials")
    trials = command(commands, "trials", _trials, "list the trials of an experiment")
    shown = trials.add_mutually_exclusive_group()
    text = f"only the last N; a terminal is shown {SHOWN} unless told otherwise"
    shown.add_argument("--limit", type=_count, metavar="N", help=text)
    shown.add_argument("--all", action="store_true", help="every trial, on a terminal too")
    checkpoints = command(commands, "checkpoints", _checkpoints, "list the checkpoints of an experiment")
    checkpoints.add_argument("--verify", action="store_true", help="read every file; exit 1 when one is bad")
    for parser in (show, trials, checkpoints):
        parser.add_argument("path", metavar="PATH")
        database_option(parser)
        storage_option(parser)


def _list(options: argparse.Namespace) -> int:
    from holdfast.experiment import Experiment
    from holdfast.locate import open_path
    from holdfast.report.tables import show_json, summary_json
    from holdfast.storage.root import absolute, is_url, name_of

    storage, choices = absolute(options.storage), storage_options(options)
    if options.database is None and not is_url(storage) and not Path(storage).is_dir():
        raise SpecError(f"storage {storage} does not exist; name one: `holdfast list STORAGE`")
    rows = []
    for path, known in _experiments(storage, options.database, choices).items():
        try:
            with Experiment(open_path(path, database=options.database, readonly=True, options=choices)) as experiment:
                rows.append(show_json(experiment) if options.json else summary_json(experiment))
        except HoldfastError as error:
            rows.append({"name": name_of(path), "id": known, "status": f"unreadable: {error}", "path": path})
    if options.json:
        print_json(rows)
    else:
        _print_list(rows, storage)
    return 0


def _experiments(storage: str, database: str | None, choices: dict[str, Any] | None) -> dict[str, str | None]:
    """Return the paths of all experiments of a storage or a database, and the UUID of those that the database knows."""
    from holdfast.locate import database_url, folder_at
    from holdfast.storage.database.experiments import every, open_database
    from holdfast.storage.root import join, name_of

    inside = [join(storage, name) for name in folder_at(storage, choices).root.names()]
    inside = [path for path in inside if folder_at(path, choices).exists()]
    url = database_url(storage, database)
    found: dict[str, str | None] = {}
    if isinstance(url, str) or Path(str(url.database)).exists():
        with_database = open_database(url, readonly=True)
        for record in every(with_database):
            beside = join(storage, name_of(record.location))
            found[beside if beside in inside else record.location] = record.uuid
        with_database.close()
    return found | {path: found.get(path) for path in inside}


def _print_list(rows: Sequence[dict[str, Any]], storage: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        print(f"{storage} holds no experiment yet")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("name", "status", "trials", "path"):
        table.add_column(name, overflow="fold")
    for row in rows:
        trials = ", ".join(f"{count} {status}" for status, count in row.get("trials", {}).items())
        table.add_row(escape(row["name"]), escape(row["status"]), trials, escape(row["path"]))
    terminal().print(table)


def _show(options: argparse.Namespace) -> int:
    from holdfast.report.tables import leaderboard, show_json, summary_json
    from holdfast.storage.leasing import describe

    with open_experiment(options) as experiment:
        if options.json:
            print_json(show_json(experiment))
            return 0
        shown = summary_json(experiment)
        console = terminal()
        lease = experiment.lease
        for name in ("name", "id", "status", "path", "epoch"):
            console.print(f"{name + ':':<8} {shown[name]}", markup=False, soft_wrap=True)
        if lease.is_held:
            holder = lease.holder or {}
            words = f"{describe(holder)}, for another {lease.remaining:.0f} s unless renewed"
            console.print(f"{'holder:':<8} {words}", markup=False)
        counts = ", ".join(f"{count} {status}" for status, count in shown["trials"].items())
        console.print(f"{'trials:':<8} {counts or 'none'}", markup=False)
        console.print(leaderboard(experiment.trials, experiment.objectives))
    return 0


def _trials(options: argparse.Namespace) -> int:
    from holdfast.report.tables import trial_json, trial_lines, trials_table

    with open_experiment(options) as experiment:
        trials = experiment.trials
    drawn = sys.stdout.isatty() and not options.json
    limit = options.limit or (SHOWN if drawn and not options.all else len(trials))
    left_out, trials = max(len(trials) - limit, 0), trials[-limit:]
    if options.json:
        print_json([trial_json(trial) for trial in trials])
    elif drawn and len(trials) <= DRAWN:
        terminal().print(trials_table(trials, experiment.objectives))
    else:
        sys.stdout.writelines(f"{line}\n" for line in trial_lines(trials, experiment.objectives))
    if left_out and not options.json:
        print(f"{left_out} earlier trials are not shown: --all shows every one, --limit N the last N", file=sys.stderr)
    return 0


def _count(text: str) -> int:
    """Read a whole number from 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _checkpoints(options: argparse.Namespace) -> int:
    from holdfast.core.errors import CheckpointNotFound
    from holdfast.report.tables import checkpoint_json, checkpoints_table
    from holdfast.storage.checkpoints.ports import checkpoints_in

    with open_experiment(options) as experiment:
        rows = [item for item in experiment.checkpoints() if item.status != "deleted"]
        store = checkpoints_in(experiment._opened.folder)  # the same package
        bad = {}
        for item in rows if options.verify else ():
            try:
                store.verify(item.path, digest=item.digest, trial=item.trial, attempt=item.attempt, step=item.step)
            except (Corrupt, CheckpointNotFound) as error:
                bad[item.id] = str(error)
    if options.json:
        changes = {identity: {"status": "corrupt", "reason": reason} for identity, reason in bad.items()}
        print_json([{**checkpoint_json(item), **changes.get(item.id, {})} for item in rows])
    else:
        terminal().print(checkpoints_table(rows))
        for item in rows:
            if item.id in bad:
                print(f"trial {item.trial} step {item.step}: {bad[item.id]}")
    return 1 if bad else 0
