"""The flow ``watch``: finds searches that were cut off, and restores them by their own policy. Run it on a schedule."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from holdfast.core.errors import HoldfastError
from holdfast.flows import forms
from holdfast.flows.abandoned import UNREADABLE, Places
from holdfast.flows.later import look_again, run_name, table
from holdfast.flows.launching import Children, Deployment, Launcher
from holdfast.flows.search import refused
from holdfast.flows.watched_runs import close_runs, emit
from holdfast.flows.watching import Surroundings, Watch

SHOWN = ("name", "verdict", "why", "restores", "next", "result", "command", "path")
"""What a table of the last look tells of an experiment."""


def _run_name() -> str:
    return run_name("watch", flow_run.parameters.get("storages"))


@flow(name="watch", flow_run_name=_run_name, persist_result=False, validate_parameters=False)
def watch(
    storages: forms.Storages,
    database: forms.Database = None,
    deployment: forms.DeploymentName = None,
    at_once: forms.AtOnce = 2,
    dry_run: forms.DryRun = False,
    storage_options: forms.Options = None,
) -> dict[str, Any] | State[Any]:
    """Find experiments that were cut off, and restore each by its own policy; return what was found and done."""
    log = get_run_logger()
    try:
        form = forms.watch_form(
            {
                "storages": storages,
                "database": database,
                "deployment": deployment,
                "at_once": at_once,
                "dry_run": dry_run,
                "storage_options": storage_options,
            }
        )
        places = Places(storages=tuple(form.storages), database=form.database, options=form.storage_options)
    except HoldfastError as error:
        return refused(error)
    around = Surroundings(
        say=lambda text: log.info("%s", text), warn=lambda text: log.warning("%s", text), emit=emit, close_runs=close_runs
    )
    # Prefect's settings as a whole: what a profile, or the caller, says of the API holds for the restores, too.
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    launcher: Launcher = Deployment(form.deployment, places) if form.deployment else Children(places, lambda: settings)
    watching = Watch(places, launcher, around, at_once=form.at_once, dry_run=form.dry_run)
    try:
        watching.look()
        watching.finish()
    except BaseException:
        watching.end()
        raise
    log.info("%s", "\n".join(watching.lines()))
    told = watching.summary()
    if shown := [row for row in told["experiments"] if row["cause"] or row["result"] or row["verdict"] == UNREADABLE]:
        table("watch", storages, [{key: row[key] for key in SHOWN} for row in shown], "what was found cut off")
    if not dry_run and (when := look_again(watching.later, trouble=bool(watching.troubles()))):
        log.info("looks again at %s", when.isoformat(timespec="seconds"))
    return told
