"""The commands that run something: run, restore, validate."""

from __future__ import annotations

import argparse
import gc
import signal
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console

from holdfast.cli.common import (
    Commands,
    command,
    database_option,
    json_alone,
    print_json,
    storage_option,
    storage_options,
    terminal,
)
from holdfast.core.trial import ERRORED


def add_running(commands: Commands) -> None:
    run = command(commands, "run", _run, "run a search as a spec says")
    run.add_argument("spec", metavar="SPEC", help="a YAML file, or block:NAME")
    run.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change the spec, such as search.seed=1")
    storage_option(run)
    restore = command(commands, "restore", _restore, "go on with an experiment that was interrupted")
    restore.add_argument("path", metavar="PATH")
    restore.add_argument("--resume-errored", action="store_true", help="errored trials go on from their newest checkpoints")
    restore.add_argument("--restart-errored", action="store_true", help="errored trials begin again at step 0")
    restore.add_argument("--no-resume-unfinished", action="store_true", help="leave unfinished trials out (SKIPPED)")
    restore.add_argument(
        "--policy",
        metavar="unfinished=...,errored=...,finished=...",
        help="in place of these flags: resume, restart or skip for each; as by default where it is not named",
    )
    restore.add_argument("--no-new-trials", action="store_true", help="propose nothing new")
    restore.add_argument("--plan", action="store_true", help="show what would be done with each trial, and change nothing")
    restore.add_argument("--force", action="store_true", help="take over from a holder that seems alive")
    restore.add_argument("--trainable", metavar="T", help="where the same trainable is now")
    restore.add_argument("--space", metavar="FILE", help="compare a space, or that of a spec, with the experiment's")
    restore.add_argument(
        "--references",
        metavar="FILE|KEY=VALUE",
        action="append",
        default=[],
        help="what trials are handed in place of the stored references; may be given several times",
    )
    restore.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="such as search.num_trials=40")
    database_option(restore)
    storage_option(restore)
    validate = command(commands, "validate", _validate, "check a spec, and load its trainable")
    validate.add_argument("spec", metavar="SPEC", help="a YAML file, or block:NAME")
    validate.add_argument("--set", metavar="KEY=VALUE", action="append", default=[])


def changes_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``--set`` of a restore or a fork: new values by dotted key."""
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

    storage_options(options)  # what is no pair is refused under its own name
    changes = [*options.set, *(f"storage_options.{pair}" for pair in options.storage_option)]
    return _driven(options, lambda observer: api.search(options.spec, overrides=changes, observer=observer))


def _restore(options: argparse.Namespace) -> int:
    from holdfast import api
    from holdfast.flows.requesting import request_of
    from holdfast.specfile import references_in, space_in

    arguments: dict[str, Any] = {
        "resume_unfinished": not options.no_resume_unfinished,
        "resume_errored": options.resume_errored,
        "restart_errored": options.restart_errored,
        "policy": options.policy,
        "space": None if options.space is None else space_in(options.space),
        "references": references_in(options.references),
        "changes": changes_of(options.set),
        "new_trials": not options.no_new_trials,
        "force": options.force,
        "database": options.database,
        "storage_options": storage_options(options),
    }
    if options.plan:
        with json_alone(options):
            planned = api.plan(request_of(options.path, options.trainable, **arguments))
        return _plan(options, planned)
    return _driven(options, lambda observer: api.restore(options.path, options.trainable, observer=observer, **arguments))


def _collector() -> Any:
    """Return an observer that lets Python look for garbage from the moment when trials start.

    What is imported and read before that stays until the process ends; to look through it again and again takes a quarter of
    the start. This process is ours, so nobody else's garbage waits.
    """
    from holdfast.report.observer import Observer

    class Collector(Observer):
        def running(self, api_url: str | None) -> None:
            gc.freeze()
            gc.enable()

    return Collector()


def _plan(options: argparse.Namespace, plan: Sequence[Any]) -> int:
    from holdfast.report.tables import plan_table, plan_words, planned_json

    if options.json:
        print_json([planned_json(planned) for planned in plan])
    else:
        console = terminal()
        console.print(plan_table(plan))
        console.print(f"{plan_words(plan)}; nothing was changed", markup=False)
    return 0


def _driven(options: argparse.Namespace, call: Any) -> int:
    from holdfast.flows.signals import raised
    from holdfast.report.observer import Together
    from holdfast.report.progress import Progress
    from holdfast.settings import hush_prefect

    hush_prefect()
    console = Console(stderr=True, highlight=False) if options.json else terminal()
    progress = Progress(console)
    gc.disable()  # see _collector
    with raised(signal.SIGTERM, signal.SIGHUP, pass_on=True):
        try:
            with json_alone(options):
                result = call(Together(progress, _collector()))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            gc.enable()
            progress.close()
    if options.json:
        from holdfast.report.restored import restored_json
        from holdfast.report.tables import trial_json

        best = None if result.best is None else trial_json(result.best)
        trials = [trial_json(trial) for trial in result.trials]
        restored = {} if result.restored is None else {"restored": restored_json(result.restored)}
        found = {"name": result.name, "path": str(result.path), "reason": result.reason, "best": best, "trials": trials}
        print_json(found | restored)
    return 1 if any(trial.status in ERRORED for trial in result.trials) else 0


def _validate(options: argparse.Namespace) -> int:
    from holdfast.engines.choosing import chosen
    from holdfast.flows.prepare import check_spec, checked_spec
    from holdfast.locate import check_free, check_merge, dated

    given, origin = checked_spec(options.spec, options.set)
    spec = chosen(given)
    named = spec.model_copy(update={"name": dated(spec.name, datetime.now().astimezone())})
    if spec.if_exists == "fail":
        check_free(named)
    check_merge(named)
    with json_alone(options):
        pool = check_spec(spec, workdir=origin.workdir)
    if pool is not None:
        pool.close()
    if options.json:
        print_json(spec.stored())
    else:
        print(f"{options.spec}: {spec.name} is a good spec; run it with `holdfast run {options.spec}`")
        if spec.search.chosen:
            print(spec.search.chosen)
    return 0
