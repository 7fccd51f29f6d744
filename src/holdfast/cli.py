"""The command line. Bad input is refused before Prefect is imported."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.core.errors import Corrupt, HoldfastError, Infrastructure, SpecError
from holdfast.core.trial import ERRORED

EXIT_CODES = (
    "exit codes: 0 done; 1 some trials errored; 2 bad input; 3 somebody else holds the experiment; "
    "4 database, storage or Prefect failed; 130/143 on a signal"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        _install_fault()
        return int(options.run(options))
    except HoldfastError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has gone: so do we
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'storage'}: {error.strerror or error}", Infrastructure.exit_code)
    except Exception as error:
        code = _prefect_failure(error)
        if code is None:
            raise
        return _fail(f"Prefect: {error}", code)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"holdfast: {message}", file=sys.stderr)
    return code


def _prefect_failure(error: Exception) -> int | None:
    """Return the exit code for what Prefect raises when its API cannot be used, or None when it is something else."""
    module = type(error).__module__.partition(".")[0]
    return Infrastructure.exit_code if module in ("prefect", "httpx", "httpcore", "websockets") else None


def _install_fault() -> None:
    from holdfast.settings import settings

    fault = settings().fault
    if fault:
        from holdfast.testing.faults import install

        install(fault)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="holdfast", description="Hyperparameter searches that survive anything.", epilog=EXIT_CODES
    )
    from holdfast import __version__

    parser.add_argument("--version", action="version", version=f"holdfast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_running(commands)
    _add_reading(commands)
    _add_managing(commands)
    return parser


Commands = Any  # argparse gives its type no public name


def _command(commands: Commands, name: str, run: Any, text: str, *, as_json: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
    parser.set_defaults(run=run)
    if as_json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--database", metavar="URL", help="the experiment's database, if it is not beside it")


def _add_running(commands: Commands) -> None:
    run = _command(commands, "run", _run, "run a search as a spec says")
    run.add_argument("spec", metavar="SPEC", help="a YAML file")
    run.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change the spec, such as search.seed=1")
    restore = _command(commands, "restore", _restore, "go on with an experiment that was interrupted")
    restore.add_argument("path", metavar="PATH")
    restore.add_argument("--resume-errored", action="store_true", help="errored trials go on from their newest checkpoints")
    restore.add_argument("--restart-errored", action="store_true", help="errored trials begin again at step 0")
    restore.add_argument("--no-resume-unfinished", action="store_true", help="leave unfinished trials out (SKIPPED)")
    restore.add_argument("--no-new-trials", action="store_true", help="propose nothing new")
    restore.add_argument("--plan", action="store_true", help="show what would be done with each trial, and change nothing")
    restore.add_argument("--force", action="store_true", help="take over from a holder that seems alive")
    restore.add_argument("--trainable", metavar="T", help="where the same trainable is now")
    restore.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="such as search.num_trials=40")
    _database(restore)
    validate = _command(commands, "validate", _validate, "check a spec, and load its trainable")
    validate.add_argument("spec", metavar="SPEC")
    validate.add_argument("--set", metavar="KEY=VALUE", action="append", default=[])


def _add_reading(commands: Commands) -> None:
    listing = _command(commands, "list", _list, "list the experiments of a storage")
    listing.add_argument("storage", metavar="STORAGE", nargs="?", default="./runs")
    _database(listing)
    show = _command(commands, "show", _show, "show an experiment: status, holder, best trials")
    trials = _command(commands, "trials", _trials, "list the trials of an experiment")
    checkpoints = _command(commands, "checkpoints", _checkpoints, "list the checkpoints of an experiment")
    checkpoints.add_argument("--verify", action="store_true", help="read every file; exit 1 when one is bad")
    for parser in (show, trials, checkpoints):
        parser.add_argument("path", metavar="PATH")
        _database(parser)


def _add_managing(commands: Commands) -> None:
    stop = _command(commands, "stop", _stop, "let running trials save and stop, and end the search", as_json=False)
    stop.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for it (60)")
    cancel = _command(commands, "cancel", _cancel, "end one trial for good", as_json=False)
    cancel.add_argument("--trial", type=int, required=True, metavar="N")
    delete = _command(commands, "delete", _delete, "delete an experiment; foreign files stay", as_json=False)
    delete.add_argument("--yes", action="store_true", help="do not ask")
    for parser in (stop, cancel, delete):
        parser.add_argument("path", metavar="PATH")
        _database(parser)


def _console() -> Console:
    """Return the console for people; with a pipe it is wide, so that no line is cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``--set`` of a restore: new values by dotted key."""
    from holdfast.specfile import apply_overrides

    found: dict[str, Any] = {}

    def flatten(value: Any, key: str) -> None:
        if isinstance(value, dict) and key.count(".") == 0:
            for name, below in value.items():
                flatten(below, f"{key}.{name}" if key else name)
        else:
            found[key] = value

    flatten(apply_overrides({}, pairs, "restore"), "")
    return found


def _run(options: argparse.Namespace) -> int:
    from holdfast import api

    return _driven(options, lambda observer: api.search(options.spec, overrides=options.set, observer=observer))


def _restore(options: argparse.Namespace) -> int:
    from holdfast import api

    arguments: dict[str, Any] = {
        "resume_unfinished": not options.no_resume_unfinished,
        "resume_errored": options.resume_errored,
        "restart_errored": options.restart_errored,
        "changes": _changes(options.set),
        "new_trials": not options.no_new_trials,
        "force": options.force,
        "database": options.database,
    }
    if options.plan:
        return _plan(options, api.plan(api.request_of(options.path, options.trainable, **arguments)))
    return _driven(options, lambda observer: api.restore(options.path, options.trainable, observer=observer, **arguments))


def _plan(options: argparse.Namespace, plan: Sequence[Any]) -> int:
    from holdfast.report.tables import plan_table, plan_words, planned_json

    if options.json:
        _print_json([planned_json(planned) for planned in plan])
    else:
        console = _console()
        console.print(plan_table(plan))
        console.print(f"{plan_words(plan)}; nothing was changed", markup=False)
    return 0


def _driven(options: argparse.Namespace, call: Any) -> int:
    from holdfast.report.progress import Progress
    from holdfast.settings import hush_prefect

    hush_prefect()
    console = Console(stderr=True, highlight=False) if options.json else _console()
    progress = Progress(console)
    try:
        result = call(progress)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        progress.close()
    if options.json:
        from holdfast.report.tables import trial_json

        best = None if result.best is None else trial_json(result.best)
        trials = [trial_json(trial) for trial in result.trials]
        _print_json({"name": result.name, "path": str(result.path), "reason": result.reason, "best": best, "trials": trials})
    return 1 if any(trial.status in ERRORED for trial in result.trials) else 0


def _validate(options: argparse.Namespace) -> int:
    from holdfast.flows.prepare import check_spec
    from holdfast.locate import check_free
    from holdfast.specfile import ExperimentSpec

    spec = ExperimentSpec.from_file(options.spec, options.set)
    if spec.if_exists == "fail":
        check_free(spec)
    pool = check_spec(spec, workdir=str(Path(options.spec).absolute().parent))
    if pool is not None:
        pool.close()
    if options.json:
        _print_json(spec.stored())
    else:
        print(f"{options.spec}: {spec.name} is a good spec; run it with `holdfast run {options.spec}`")
    return 0


def _list(options: argparse.Namespace) -> int:
    from holdfast.experiment import Experiment
    from holdfast.locate import database_url, open_path
    from holdfast.report.tables import show_json
    from holdfast.storage.database.experiments import every, open_database

    storage = Path(options.storage).absolute()
    url = database_url(storage, options.database)
    if options.database is None and not storage.is_dir():
        raise SpecError(f"storage {storage} does not exist; name one: `holdfast list STORAGE`")
    if not isinstance(url, str) and not Path(str(url.database)).exists():
        records = []
    else:
        with_database = open_database(url, readonly=True)
        records = every(with_database)
        with_database.close()
    rows = []
    for record in records:
        beside = storage / Path(record.location).name
        path = beside if (beside / "experiment.json").exists() else Path(record.location)
        try:
            with Experiment(open_path(path, database=options.database, readonly=True)) as experiment:
                rows.append(show_json(experiment))
        except (Corrupt, HoldfastError) as error:
            rows.append({"name": record.name, "id": record.uuid, "status": f"unreadable: {error}", "path": str(path)})
    if options.json:
        _print_json(rows)
    else:
        _print_list(rows, storage)
    return 0


def _print_list(rows: Sequence[dict[str, Any]], storage: Path) -> None:
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
    _console().print(table)


def _opened(options: argparse.Namespace, *, readonly: bool = True) -> Any:
    from holdfast.experiment import Experiment
    from holdfast.locate import find

    return Experiment(find(options.path, database=options.database, readonly=readonly))


def _show(options: argparse.Namespace) -> int:
    from holdfast.report.tables import leaderboard, show_json
    from holdfast.storage.leasing import describe

    with _opened(options) as experiment:
        shown = show_json(experiment)
        if options.json:
            _print_json(shown)
            return 0
        console = _console()
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

    with _opened(options) as experiment:
        trials = experiment.trials
        if options.json:
            _print_json([trial_json(trial) for trial in trials])
        else:
            _console().print(trials_table(trials, experiment.objectives))
    return 0


def _checkpoints(options: argparse.Namespace) -> int:
    from holdfast.core.errors import CheckpointNotFound
    from holdfast.report.tables import checkpoint_json, checkpoints_table
    from holdfast.storage.checkpoints.local import LocalCheckpoints

    with _opened(options) as experiment:
        rows = [item for item in experiment.checkpoints() if item.status != "deleted"]
        store = LocalCheckpoints(experiment.path)
        bad = {}
        for item in rows if options.verify else ():
            try:
                store.verify(item.path, digest=item.digest, trial=item.trial, attempt=item.attempt, step=item.step)
            except (Corrupt, CheckpointNotFound) as error:
                bad[item.id] = str(error)
    if options.json:
        changes = {identity: {"status": "corrupt", "reason": reason} for identity, reason in bad.items()}
        _print_json([{**checkpoint_json(item), **changes.get(item.id, {})} for item in rows])
    else:
        _console().print(checkpoints_table(rows))
        for item in rows:
            if item.id in bad:
                print(f"trial {item.trial} step {item.step}: {bad[item.id]}")
    return 1 if bad else 0


def _stop(options: argparse.Namespace) -> int:
    with _opened(options, readonly=False) as experiment:
        if not experiment.lease.is_held:
            print(f"nobody drives {experiment.name}")
            return 0
        if experiment.stop(wait=options.wait):
            print(f"{experiment.name} has stopped; go on with `holdfast restore {experiment.path}`")
            return 0
        return _fail(f"{experiment.name} was asked to stop and is still running after {options.wait:g} s", 4)


def _cancel(options: argparse.Namespace) -> int:
    with _opened(options, readonly=False) as experiment:
        experiment.cancel(options.trial)
        print(f"trial {options.trial} of {experiment.name} is to be cancelled")
    return 0


def _delete(options: argparse.Namespace) -> int:
    from holdfast.core.errors import LeaseHeld
    from holdfast.storage.database.experiments import delete

    with _opened(options, readonly=False) as experiment:
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


if __name__ == "__main__":
    sys.exit(main())
