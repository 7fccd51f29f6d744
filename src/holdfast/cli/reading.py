"""The commands that look: list, show, trials, checkpoints."""

from __future__ import annotations

import argparse
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


def add_reading(commands: Commands) -> None:
    listing = command(commands, "list", _list, "list the experiments of a storage")
    listing.add_argument("storage", metavar="STORAGE", nargs="?", default="./runs")
    database_option(listing)
    storage_option(listing)
    show = command(commands, "show", _show, "show an experiment: status, holder, best trials")
    trials = command(commands, "trials", _trials, "list the trials of an experiment")
    checkpoints = command(commands, "checkpoints", _checkpoints, "list the checkpoints of an experiment")
    checkpoints.add_argument("--verify", action="store_true", help="read every file; exit 1 when one is bad")
    for parser in (show, trials, checkpoints):
        parser.add_argument("path", metavar="PATH")
        database_option(parser)
        storage_option(parser)


def _list(options: argparse.Namespace) -> int:
    from holdfast.experiment import Experiment
    from holdfast.locate import database_url, folder_at, open_path
    from holdfast.report.tables import show_json
    from holdfast.storage.database.experiments import every, open_database
    from holdfast.storage.root import absolute, is_url, join, name_of

    storage, choices = absolute(options.storage), storage_options(options)
    url = database_url(storage, options.database)
    if is_url(storage):
        folder_at(storage, choices).root.names()  # a storage that does not answer is no empty one
    elif options.database is None and not Path(storage).is_dir():
        raise SpecError(f"storage {storage} does not exist; name one: `holdfast list STORAGE`")
    if not isinstance(url, str) and not Path(str(url.database)).exists():
        records = []
    else:
        with_database = open_database(url, readonly=True)
        records = every(with_database)
        with_database.close()
    rows = []
    for record in records:
        path = join(storage, name_of(record.location))
        try:
            if not folder_at(path, choices).exists():
                path = record.location
            with Experiment(open_path(path, database=options.database, readonly=True, options=choices)) as experiment:
                rows.append(show_json(experiment))
        except (Corrupt, HoldfastError) as error:
            rows.append({"name": record.name, "id": record.uuid, "status": f"unreadable: {error}", "path": path})
    if options.json:
        print_json(rows)
    else:
        _print_list(rows, storage)
    return 0


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
    from holdfast.report.tables import leaderboard, show_json
    from holdfast.storage.leasing import describe

    with open_experiment(options) as experiment:
        shown = show_json(experiment)
        if options.json:
            print_json(shown)
            return 0
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
    from holdfast.report.tables import trial_json, trials_table

    with open_experiment(options) as experiment:
        trials = experiment.trials
        if options.json:
            print_json([trial_json(trial) for trial in trials])
        else:
            terminal().print(trials_table(trials, experiment.objectives))
    return 0


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
