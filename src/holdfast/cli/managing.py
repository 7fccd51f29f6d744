"""The commands that ask for something, or delete: stop, cancel, delete."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from holdfast.cli.common import Commands, command, database_option, fail, open_experiment, storage_option
from holdfast.core.errors import SpecError


def add_managing(commands: Commands) -> None:
    stop = command(commands, "stop", _stop, "let running trials save and stop, and end the search", as_json=False)
    stop.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for it (60)")
    cancel = command(commands, "cancel", _cancel, "end one trial for good", as_json=False)
    cancel.add_argument("--trial", type=int, required=True, metavar="N")
    delete = command(
        commands,
        "delete",
        _delete,
        "delete an experiment, or what the database knows of one that is gone; foreign files stay",
        as_json=False,
    )
    delete.add_argument("--yes", action="store_true", help="do not ask")
    for parser in (stop, cancel, delete):
        parser.add_argument("path", metavar="PATH")
        database_option(parser)
        storage_option(parser)


def _stop(options: argparse.Namespace) -> int:
    from holdfast.upkeep import driven

    with open_experiment(options, readonly=False) as experiment:
        if not driven(experiment._opened):  # the same package
            print(f"nobody drives {experiment.name}")
            return 0
        if experiment.stop(wait=options.wait):
            print(f"{experiment.name} has stopped; go on with `holdfast restore {experiment.path}`")
            return 0
        return fail(f"{experiment.name} was asked to stop and is still running after {options.wait:g} s", 4)


def _cancel(options: argparse.Namespace) -> int:
    with open_experiment(options, readonly=False) as experiment:
        experiment.cancel(options.trial)
        print(f"trial {options.trial} of {experiment.name} is to be cancelled")
    return 0


def _delete(options: argparse.Namespace) -> int:
    from holdfast.core.errors import ExperimentNotFound
    from holdfast.locate import find_gone
    from holdfast.storage.database.experiments import delete

    try:
        experiment = open_experiment(options, readonly=False)
    except ExperimentNotFound:
        gone = find_gone(options.path, database=options.database)
        if gone is None:
            raise
        return _delete_rows(options, *gone)
    with experiment:
        _refuse_driven(experiment.name, experiment.lease)
        if not _agreed(options, f"delete {experiment.path} with {sum(experiment.counts().values())} trials?"):
            return 0
        opened = experiment._opened  # the same package
        left = opened.folder.delete()
        delete(opened.database, opened.record.id)
    for path in left:
        print(f"left alone, because holdfast did not write it: {path}")
    print(f"{options.path} is deleted")
    return 0


def _delete_rows(options: argparse.Namespace, database: Any, record: Any) -> int:
    """Delete what the database knows of an experiment whose folder is gone."""
    from holdfast.storage.database.experiments import delete
    from holdfast.storage.database.leases import Leases

    try:
        _refuse_driven(record.name, Leases(database, record.id).look())
        question = f"the folder {record.location} is gone; delete what {database.label} knows of {record.name}?"
        if _agreed(options, question):
            delete(database, record.id)
            print(f"{record.name} is deleted from {database.label}; its folder {record.location} was gone already")
        return 0
    finally:
        database.close()


def _refuse_driven(name: str, lease: Any) -> None:
    from holdfast.core.errors import LeaseHeld

    if lease.is_held:
        raise LeaseHeld(f"{name} is being driven; end it first with `holdfast stop`")


def _agreed(options: argparse.Namespace, question: str) -> bool:
    """Ask before something is deleted; SpecError where nobody can answer."""
    if options.yes:
        return True
    if not sys.stdin.isatty():
        raise SpecError("delete asks before it deletes; say --yes where nobody can answer")
    if input(f"{question} [y/N] ").strip().lower() == "y":
        return True
    print("nothing was deleted")
    return False
