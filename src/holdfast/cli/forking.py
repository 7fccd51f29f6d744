"""The command that begins a new experiment from the state of another one: fork."""

from __future__ import annotations

import argparse
import sys

from holdfast.cli.common import Commands, command, database_option, print_json, storage_option, storage_options


def add_forking(commands: Commands) -> None:
    fork = command(commands, "fork", _fork, "begin a new experiment from the state of another one, which stays as it is")
    fork.add_argument("path", metavar="PATH")
    fork.add_argument("--name", required=True, metavar="NEW", help="the new experiment's name; may hold {date}")
    fork.add_argument(
        "--at-trial",
        type=int,
        metavar="N",
        help="only the trials with numbers below N come along: trial N is the first that the fork proposes itself",
    )
    fork.add_argument("--storage", metavar="DIR-or-URL", help="where it goes; else beside the original")
    fork.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="such as search.num_trials=40 or search.seed=2"
    )
    database_option(fork)
    storage_option(fork)


def _fork(options: argparse.Namespace) -> int:
    from holdfast.cli.running import changes_of
    from holdfast.forking import fork
    from holdfast.report.observer import restore_command
    from holdfast.report.tables import summary_json

    opened = fork(
        options.path,
        options.name,
        at_trial=options.at_trial,
        storage=options.storage,
        database=options.database,
        changes=changes_of(options.set),
        options=storage_options(options),
    )
    for note in opened.notes:
        print(f"holdfast: {note}", file=sys.stderr)
    from holdfast.experiment import Experiment

    with Experiment(opened) as experiment:
        shown = summary_json(experiment)
        if options.json:
            print_json(shown)
            return 0
        counts = ", ".join(f"{count} {status}" for status, count in shown["trials"].items())
        print(f"path: {shown['path']}\ntrials: {counts or 'none'}\ngo on with: {restore_command(opened)}")
    return 0
