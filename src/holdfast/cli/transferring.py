"""The commands that carry an experiment between databases: export, import."""

from __future__ import annotations

import argparse
from pathlib import Path

from holdfast.cli.common import Commands, command, database_option, open_experiment, print_json, storage_option


def add_transferring(commands: Commands) -> None:
    export = command(commands, "export", _export, "write an experiment's rows into a file, to be imported elsewhere")
    export.add_argument("path", metavar="PATH")
    export.add_argument("--to", metavar="FILE", required=True, type=Path)
    database_option(export)
    storage_option(export)
    taken = command(commands, "import", _import, "write the rows in an exported file into a database")
    taken.add_argument("file", metavar="FILE", type=Path)
    taken.add_argument("--database", metavar="URL", help="the database; else that of the storage it was exported from")


def _export(options: argparse.Namespace) -> int:
    with open_experiment(options) as experiment:
        trials = experiment.export(options.to)
        if options.json:
            print_json({"name": experiment.name, "id": experiment.id, "file": str(options.to), "trials": trials})
        else:
            print(f"{options.to} holds {experiment.name}: {trials} trials; `holdfast import {options.to} --database URL`")
    return 0


def _import(options: argparse.Namespace) -> int:
    from holdfast.transfer import take_in

    record, label, trials = take_in(options.file, options.database)
    if options.json:
        print_json({"name": record.name, "id": record.uuid, "database": label, "trials": trials, "path": record.location})
    else:
        print(f"database {label} has {record.name} now: {trials} trials; its files are expected in {record.location}")
    return 0
