"""The flow ``collect``: removes what dead attempts left of experiments that nobody drives. Run it on a schedule, by night."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from holdfast.flows.abandoned import Places
from holdfast.flows.collecting import Found, collect_all, is_trouble, summary
from holdfast.flows.later import run_name, table


def _run_name() -> str:
    return run_name("collect", flow_run.parameters.get("storages"))


@flow(name="collect", flow_run_name=_run_name, persist_result=False)
def collect(
    storages: list[str],
    database: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Remove what dead attempts left of experiments that nobody drives; return what was found and done.

    Args:
        storages: Folders, or URLs on object stores, that hold experiments.
        database: URL of their database, if it is not beside them; without a password, because Prefect keeps parameters: leave
            that to HOLDFAST_DATABASE_URL.
        verify: Read every checkpoint, too, and mark those that are damaged: nothing continues from them.
        dry_run: Only say what would go; nothing is written.
        storage_options: Options of an object store, such as its endpoint; no credentials, because Prefect keeps parameters.
    """
    log = get_run_logger()
    places = Places(storages=tuple(storages), database=database, options=storage_options)
    found: list[Found] = []
    for one in collect_all(places, lambda text: log.info("%s", text), verified=verify, dry_run=dry_run):
        found.append(one)
        (log.warning if is_trouble(one) else log.info)("%s", one.line)
    told = summary(found, dry_run=dry_run)
    rows = [
        {
            "experiment": one.name,
            "what": one.outcome,
            "removed": one.removed,
            "bytes": one.bytes,
            "why": one.why,
            "path": one.path,
        }
        for one in sorted(found, key=lambda one: (not is_trouble(one), -one.bytes))
    ]
    table(
        "collect", storages, rows, f"{told['removed']} removed, {told['bytes']} bytes" + (" (only looked)" if dry_run else "")
    )
    return told
