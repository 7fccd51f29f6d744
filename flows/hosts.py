"""Whether the workers of a spec can reach what they need: asked before anything is written. Imports no Prefect."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from holdfast import references
from holdfast.core.errors import SpecError
from holdfast.core.spec import ExperimentSpec
from holdfast.locate import database_url
from holdfast.settings import api_url, names_api
from holdfast.storage.database.engine import connect
from holdfast.storage.root import absolute, is_url

EXTRAS = {"dask": "prefect_dask", "ray": "prefect_ray"}
"""The extra that brings an engine, and the module that says whether it is there."""
_LOOPBACK = ("localhost", "::1", "0.0.0.0", "::")


def check_hosts(spec: ExperimentSpec, stored: Mapping[str, Any] | None = None) -> None:
    """Raise SpecError when workers on other machines, or in other processes, could not run the trials of a spec.

    All reasons are in one message, each with the setting that mends it. Nothing is written. ``stored`` are the references that
    are stored already; None: those of ``spec`` are about to be.
    """
    execution = spec.execution
    if not execution.is_remote:
        return
    check_installed(execution.runner)
    if execution.runner == "workpool":
        check_pool(spec, stored)
    location, _ = references.place(spec.storage, spec.storage_options)
    storage = absolute(str(location))
    reasons = []
    if storage.partition("://")[0] in ("memory", "local-memory"):
        reasons.append(f"storage {storage} is the memory of this process; name a folder, or storage: s3://bucket/prefix")
    elif execution.spans_hosts and not (is_url(storage) and not storage.startswith("file:")):
        reasons.append(f"storage {storage} is a path of this machine; set storage: s3://bucket/prefix")
    if execution.spans_hosts:
        database = connect(database_url(storage, spec.database))
        try:
            if database.is_sqlite:
                reasons.append(
                    f"database {database.label} is a file of this machine; set database: postgresql+psycopg://user@host/name"
                )
        finally:
            database.close()
        reasons += _api_reasons()
    if reasons:
        lines = "\n".join(f"  {reason}" for reason in reasons)
        where = f" at {execution.address}" if execution.address else ""
        whose = "on other machines" if execution.spans_hosts else "in other processes"
        raise SpecError(f"execution.runner: {execution.runner}{where} runs trials {whose}, which cannot reach:\n{lines}")


def check_pool(spec: ExperimentSpec, stored: Mapping[str, Any] | None = None) -> None:
    """Raise SpecError when trials cannot be flow runs: credentials in the open, no deployment, a pool without these files.

    EngineError when Prefect's API cannot be asked for the deployment.
    """
    from holdfast.flows.pooled import check_public

    told = check_public(spec, stored)
    from holdfast.flows.runners.deployed import check_deployment, reached

    with reached():
        check_deployment(spec.execution.deployment, told, spec.execution.job_variables)


def check_installed(runner: str) -> None:
    """Raise SpecError when the engine of ``runner`` is not installed."""
    module = EXTRAS.get(runner)
    if module is not None and (find_spec(module) is None or find_spec({"dask": "distributed"}.get(runner, runner)) is None):
        raise SpecError(f"execution.runner is {runner}, which is not installed; `pip install 'holdfast[{runner}]'`")


def _api_reasons() -> list[str]:
    url = api_url()
    if url is None:
        if names_api():
            return []  # somewhere that only Prefect reads
        return ["no Prefect API is named, and that of this process is reached from this machine alone; set PREFECT_API_URL"]
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in _LOOPBACK or host.startswith("127."):
        api = f"Prefect's API at {parts.netloc.rpartition('@')[2]}"  # without a user and a password
        return [f"{api} is reached from this machine alone; set PREFECT_API_URL to an address that all reach"]
    return []
