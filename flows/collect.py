"""The flow ``collect``: removes what dead attempts left of experiments that nobody drives. Run it on a schedule, by night."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from holdfast.core.errors import HoldfastError
from holdfast.flows import forms
from holdfast.flows.abandoned import Places
from holdfast.flows.collecting import Found, collect_all, is_trouble, summary
from holdfast.flows.later import run_name, table
from holdfast.flows.search import refused


def _run_name() -> str:
    return run_name("collect", flow_run.parameters.get("storages"))


@flow(name="collect", flow_run_name=_run_name, persist_result=False, validate_parameters=False)
def collect(
    storages: forms.Storages,
    database: forms.Database = None,
    verify: forms.Verify = False,
    dry_run: forms.OnlyTell = False,
    storage_options: forms.Options = None,
) -> dict[str, Any] | State[Any]:
    """Remove what dead attempts left of experiments that nobody drives; return what was found and done."""
    log = get_run_logger()
    try:
        form = forms.collect_form(
            {
                "storages": storages,
                "database": database,
                "verify": verify,
                "dry_run": dry_run,
                "storage_options": storage_options,
            }
        )
        places = Places(storages=tuple(form.storages), database=form.database, options=form.storage_options)
    except HoldfastError as error:
        return refused(error)
    found: list[Found] = []
    for one in collect_all(places, lambda text: log.info("%s", text), verified=form.verify, dry_run=form.dry_run):
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
