"""The commands about a database as a whole: db upgrade, db show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from holdfast.cli.common import EXIT_CODES, Commands, command, print_json


def add_databases(commands: Commands) -> None:
    text = "look at a database, or upgrade its schema"
    db: argparse.ArgumentParser = commands.add_parser("db", help=text, description=text, epilog=EXIT_CODES)
    below = db.add_subparsers(metavar="COMMAND", required=True)
    upgrade = command(below, "upgrade", _upgrade, "bring a database to this program's schema; a SQLite file is backed up first")
    show = command(below, "show", _show, "show a database's schema, place and size")
    for parser in (upgrade, show):
        parser.add_argument("storage", metavar="STORAGE", nargs="?", default="./runs", help="a storage, or an experiment in it")
        parser.add_argument("--database", metavar="URL", help="the database, if it is not in the storage")


def _url(options: argparse.Namespace) -> Any:
    """Return the database that the options name."""
    from holdfast import references
    from holdfast.locate import database_url
    from holdfast.storage.root import absolute, is_url, parent_of

    place = references.place(options.storage)[0]
    if references.is_reference(options.storage) and is_url(place):
        place = absolute(place)
        return database_url(parent_of(place) if "/" in options.storage else place, options.database)
    storage = Path(place).absolute()
    if (storage / "experiment.json").exists():
        storage = storage.parent
    return database_url(str(storage), options.database)


def _upgrade(options: argparse.Namespace) -> int:
    from holdfast.holding import liveness
    from holdfast.storage.database.upgrading import upgrade

    done = upgrade(_url(options), liveness=liveness)
    if options.json:
        backup = None if done.backup is None else str(done.backup)
        print_json({"database": done.database, "before": done.before, "after": done.after, "backup": backup})
    elif done.before == done.after:
        print(f"{done.database} has schema {done.after} already; nothing was changed")
    else:
        print(f"{done.database} has schema {done.after} now; it had {done.before}")
        print(f"backup: {done.backup}" if done.backup else "no backup was made: a server's databases are copied by pg_dump")
    return 0


def _show(options: argparse.Namespace) -> int:
    from holdfast.storage.database.upgrading import inspect

    found = inspect(_url(options))
    shown = {
        "database": found.database,
        "schema": found.schema,
        "reads": found.reads,
        "file": None if found.file is None else str(found.file),
        "bytes": found.bytes,
        "experiments": found.experiments,
    }
    if options.json:
        print_json(shown)
        return 0
    older = "; run `holdfast db upgrade`" if found.schema < found.reads else ""
    newer = "; update holdfast" if found.schema > found.reads else ""
    print(f"database:    {found.database}")
    print(f"schema:      {found.schema} (this program reads {found.reads}{older}{newer})")
    if found.bytes is not None:
        print(f"size:        {found.bytes} bytes")
    print(f"experiments: {found.experiments}")
    return 0
