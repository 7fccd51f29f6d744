"""The commands that look: list, show, trials."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.cli.common import (
    Commands,
    command,
    database_option,
    limit_options,
    limited,
    open_experiment,
    print_json,
    storage_option,
    storage_options,
    terminal,
)
from holdfast.core.errors import HoldfastError, InvalidInput, SpecError
from holdfast.core.scalarisation import SCALARISATIONS


def add_reading(commands: Commands) -> None:
    listing = command(commands, "list", _list, "list the experiments of a storage")
    listing.add_argument("storage", metavar="STORAGE", nargs="?", default="./runs")
    database_option(listing)
    storage_option(listing)
    show = command(commands, "show", _show, "show an experiment: status, holder, best trials, Pareto front")
    show.add_argument(
        "--weights",
        metavar="NAME=W,...",
        type=_weights,
        help="the best by several objectives, such as loss=1,time=0.1: each taken from 0 (best) to 1 (worst), and weighted",
    )
    show.add_argument("--scalarisation", choices=SCALARISATIONS, help="how weighted objectives become one number; default: sum")
    trials = command(commands, "trials", _trials, "list the trials of an experiment, or the attempts of one")
    trials.add_argument("--trial", type=int, metavar="N", help="every attempt of one trial, with errors and tracebacks")
    limit_options(trials, "trial")
    for parser in (show, trials):
        parser.add_argument("path", metavar="PATH")
        database_option(parser)
        storage_option(parser)


def _list(options: argparse.Namespace) -> int:
    from holdfast import references
    from holdfast.experiment import Experiment
    from holdfast.locate import open_path
    from holdfast.report.ranking import show_json
    from holdfast.report.tables import summary_json
    from holdfast.storage.root import absolute, is_url, name_of
    from holdfast.storages import experiments_of

    place, choices = references.place(options.storage, storage_options(options))
    storage = absolute(place)
    if options.database is None and not is_url(storage) and not Path(storage).is_dir():
        raise SpecError(f"storage {storage} does not exist; name one: `holdfast list STORAGE`")
    rows = []
    for path, known in experiments_of(storage, options.database, choices).items():
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


def _weights(text: str) -> dict[str, float]:
    """Read ``loss=1,time=0.1``, or a JSON object for names that hold commas."""
    try:
        if text.lstrip().startswith("{"):
            found: dict[str, float] = json.loads(text)
            return found
        pairs = [part.rpartition("=") for part in text.split(",")]
        weights = {name.strip(): float(weight) for name, _, weight in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form loss=1,time=0.1") from None
    if len(weights) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names an objective more than once")
    return weights


def _show(options: argparse.Namespace) -> int:
    from holdfast.report.holders import holder_words
    from holdfast.report.lineage import lineage_lines, origin_words
    from holdfast.report.ranking import Ranking, show_json
    from holdfast.report.tables import summary_json
    from holdfast.report.working import runner_words, workers_json, workers_table

    if options.scalarisation is not None and options.weights is None:
        raise InvalidInput("--scalarisation is for --weights; give them, such as --weights loss=1,time=0.1")
    how = options.scalarisation or SCALARISATIONS[0]
    with open_experiment(options) as experiment:
        if options.json:
            print_json(show_json(experiment, options.weights, how))
            return 0
        ranking = Ranking(experiment.trials, experiment.spec, options.weights, how)
        shown = summary_json(experiment)
        console = terminal()
        search = experiment.spec.search
        for name in ("name", "id", "status", "path", "epoch"):
            console.print(f"{name + ':':<8} {shown[name]}", markup=False, soft_wrap=True)
        origin = origin_words(experiment.audit())
        if origin is not None:
            console.print(f"{'forked:':<8} from {origin}", markup=False, soft_wrap=True)
        console.print(f"{'holder:':<8} {holder_words(experiment)}", markup=False, soft_wrap=True)
        console.print(f"{'runner:':<8} {runner_words(experiment.spec.execution)}", markup=False, soft_wrap=True)
        console.print(f"{'engine:':<8} {search.chosen or search.engine}", markup=False, soft_wrap=True)
        counts = ", ".join(f"{count} {status}" for status, count in shown["trials"].items())
        console.print(f"{'trials:':<8} {counts or 'none'}", markup=False)
        workers = workers_json(experiment)
        if workers:
            table, left_out = workers_table(workers)
            console.print(table)
            if left_out:
                console.print(f"{left_out} more workers are in what --json prints", markup=False)
        for part in ranking.parts():
            console.print(part, markup=False, soft_wrap=isinstance(part, str))
        if experiment.spec.population is not None:
            for line in lineage_lines(experiment.lineage()):
                console.print(line, markup=False, soft_wrap=True)
    return 0


def _attempts(options: argparse.Namespace) -> int:
    from holdfast.report.attempts import attempt_json, attempt_lines

    with open_experiment(options) as experiment:
        attempts, left_out, _ = limited(options, experiment.attempts(options.trial))
        workers = {worker.id: worker for worker in experiment.workers(every=True)}
    if options.json:
        print_json([attempt_json(attempt, workers) for attempt in attempts])
        return 0
    sys.stdout.writelines(f"{line}\n" for line in attempt_lines(attempts, workers))
    if left_out:
        print(f"{left_out} earlier attempts are not shown: --all shows every one, --limit N the last N", file=sys.stderr)
    return 0


def _trials(options: argparse.Namespace) -> int:
    from holdfast.report.tables import note_lines, trial_json, trial_lines, trials_table
    from holdfast.report.working import worker_json

    if options.trial is not None:
        return _attempts(options)
    with open_experiment(options) as experiment:
        trials = experiment.trials
        workers = {worker.id: worker for worker in experiment.workers(every=True)} if options.json else {}
    trials, left_out, drawn = limited(options, trials)
    if options.json:
        print_json([{**trial_json(trial), "worker": worker_json(workers.get(trial.attempt.worker or 0))} for trial in trials])
    elif drawn:
        console = terminal()
        console.print(trials_table(trials, experiment.objectives, console.width))
        for line in note_lines(trials):
            console.print(line, markup=False)
    else:
        sys.stdout.writelines(f"{line}\n" for line in trial_lines(trials, experiment.objectives))
    if left_out and not options.json:
        print(f"{left_out} earlier trials are not shown: --all shows every one, --limit N the last N", file=sys.stderr)
    return 0
