"""The commands that ask for something, or delete: stop, cancel, delete."""

from __future__ import annotations

import argparse
import sys

from holdfast.cli.common import Commands, command, database_option, fail, open_experiment, storage_option
from holdfast.core.errors import SpecError


def add_managing(commands: Commands) -> None:
    stop = command(commands, "stop", _stop, "let running trials save and stop, and end the search", as_json=False)
    stop.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for it (60)")
    cancel = command(commands, "cancel", _cancel, "end one trial for good", as_json=False)
    cancel.add_argument("--trial", type=int, required=True, metavar="N")
    delete = command(commands, "delete", _delete, "delete an experiment; foreign files stay", as_json=False)
    delete.add_argument("--yes", action="store_true", help="do not ask")
    for parser in (stop, cancel, delete):
        parser.add_argument("path", metavar="PATH")
        database_option(parser)
        storage_option(parser)


def _stop(options: argparse.Namespace) -> int:
    with open_experiment(options, readonly=False) as experiment:
        if not experiment.lease.is_held:
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
    from holdfast.core.errors import LeaseHeld
    from holdfast.storage.database.experiments import delete

    with open_experiment(options, readonly=False) as experiment:
        if experiment.lease.is_held:
            raise LeaseHeld(f"{experiment.name} is being driven; end it first with `holdfast stop {experiment.path}`")
        if not options.yes:
            if not sys.stdin.isatty():
                raise SpecError("delete asks before it deletes; say --yes where nobody can answer")
            question = f"delete {experiment.path} with {sum(experiment.counts().values())} trials? [y/N] "
            if input(question).strip().lower() != "y":
                print("nothing was deleted")
                return 0
        opened = experiment._opened  # the same package
        left = opened.folder.delete()
        delete(opened.database, opened.record.id)
    for path in left:
        print(f"left alone, because holdfast did not write it: {path}")
    print(f"{options.path} is deleted")
    return 0
