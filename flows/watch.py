"""The flow ``watch``: finds searches that were cut off, and restores them by their own policy. Run it on a schedule."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from holdfast.flows.abandoned import UNREADABLE, Places
from holdfast.flows.later import look_again, run_name, table
from holdfast.flows.launching import Children, Deployment, Launcher
from holdfast.flows.watched_runs import close_runs, emit
from holdfast.flows.watching import Surroundings, Watch

SHOWN = ("name", "verdict", "why", "restores", "next", "result", "command", "path")
"""What a table of the last look tells of an experiment."""


def _run_name() -> str:
    return run_name("watch", flow_run.parameters.get("storages"))


@flow(name="watch", flow_run_name=_run_name, persist_result=False)
def watch(
    storages: list[str],
    database: str | None = None,
    deployment: str | None = None,
    at_once: int = 2,
    dry_run: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Find experiments that were cut off, and restore each by its own policy; return what was found and done.

    Args:
        storages: Folders, or URLs on object stores, that hold experiments.
        database: URL of their database, if it is not beside them; without a password, because Prefect keeps parameters: leave
            that to HOLDFAST_DATABASE_URL.
        deployment: A deployment of the flow restore, such as restore/gpu, that restores run on; else they run here.
        at_once: How many restores run here side by side at most.
        dry_run: Only say what would be done; nothing is written.
        storage_options: Options of an object store, such as its endpoint; no credentials, because Prefect keeps parameters.
    """
    log = get_run_logger()
    places = Places(storages=tuple(storages), database=database, options=storage_options)
    around = Surroundings(
        say=lambda text: log.info("%s", text), warn=lambda text: log.warning("%s", text), emit=emit, close_runs=close_runs
    )
    # Prefect's settings as a whole: what a profile, or the caller, says of the API holds for the restores, too.
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    launcher: Launcher = Deployment(deployment, places) if deployment else Children(places, lambda: settings)
    watching = Watch(places, launcher, around, at_once=at_once, dry_run=dry_run)
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
