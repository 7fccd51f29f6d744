"""What runs on Prefect comes to be there: blocks, the work pool, deployments and automations; however often, also two at once.

Everything is found again by its name and compared, and only what differs is written. What a person changed is left alone
where it is not ours: a paused schedule, times, tags, limits, a disabled automation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker

from holdfast.core.errors import EngineError, SpecError, StorageError
from holdfast.core.values import Json
from holdfast.deployments import automations
from holdfast.deployments.catalogue import (
    HEARTBEAT_SECONDS,
    HEARTBEAT_VARIABLE,
    HEARTBEATS,
    LEAST_SILENCE_SECONDS,
    QUEUE,
    SILENCE_SECONDS,
    STORAGES,
    WATCH_SLUG,
    Entry,
    Schedule,
    catalogue,
    local_folders,
    pull_steps,
    version,
)
from holdfast.flows.blocks import BLOCKS, HoldfastSpec
from holdfast.flows.naming import POOL, WATCH
from holdfast.flows.prefect_runs import impatient_client
from holdfast.references import PREFIX, is_reference
from holdfast.storage.atomic import make_folder
from holdfast.storage.database.engine import shown
from holdfast.storage.root import is_url

POOL_TYPE = "process"
TIMES = 5
"""How often it is begun anew when somebody else changes the same things at the same moment."""

What = Literal["made", "changed", "as it was", "removed"]
_BLOCK_NAME = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be deployed."""

    storages: tuple[str, ...] = STORAGES
    """folders (relative to ``workdir``), URLs, or ``block:NAME``"""
    database: str | None = field(default=None, repr=False)
    pool: str = POOL
    workdir: str | None = None
    """the folder that runs work in; None: this one"""
    automations: bool = True
    silence: float = SILENCE_SECONDS
    """seconds without a heartbeat after which a run counts as dead"""
    specs: tuple[str, ...] = ()
    """files of specs that are saved as blocks"""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of one thing."""

    kind: str
    name: str
    what: What
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is wanted, checked."""

    wanted: Wanted
    workdir: str
    folders: tuple[Path, ...]
    specs: Mapping[str, HoldfastSpec]
    entries: tuple[Entry, ...]


def deploy(wanted: Wanted, say: Callable[[str], None]) -> list[Change]:
    """Make or change what is wanted; return what became of each thing.

    SpecError for what cannot be, EngineError when Prefect's API cannot be used: nothing is written then.
    """
    plan = _checked(wanted)
    _warn(wanted, say)
    with reached() as client:
        in_folder = _check_there(client, plan) == POOL_TYPE
        done: dict[tuple[str, str], Change] = {}
        for last in (False,) * (TIMES - 1) + (True,):
            try:
                for change in _carried_out(client, plan, in_folder=in_folder):
                    before = done.get((change.kind, change.name))
                    if before is None or before.what == "as it was":
                        done[change.kind, change.name] = change
                return list(done.values())
            except (ObjectNotFound, ObjectAlreadyExists):
                if last:
                    raise
            except PrefectHTTPStatusError as error:
                if last or error.response.status_code not in (404, 409, 500):
                    raise
        raise AssertionError("the last time returns or raises")


# Before anything is written


def _checked(wanted: Wanted) -> _Plan:
    """Check what is wanted, as far as that is possible without an API."""
    if not wanted.pool:
        raise SpecError("the name of the work pool is empty; leave --pool out, or name one")
    if not LEAST_SILENCE_SECONDS <= wanted.silence <= 30 * 86400:
        raise SpecError(
            f"silence is {wanted.silence:g} s; it must be from {LEAST_SILENCE_SECONDS:g} s to 30 days; a run says every "
            f"{HEARTBEAT_SECONDS} s that it is alive, so {SILENCE_SECONDS:g} is a good value"
        )
    if wanted.database is not None and not is_reference(wanted.database) and shown(wanted.database) != wanted.database:
        raise SpecError(
            f"the database {shown(wanted.database)} has a password, and Prefect keeps parameters; make a block "
            "HoldfastDatabase and give block:NAME, or leave --database out and set HOLDFAST_DATABASE_URL where the worker runs"
        )
    workdir = os.path.abspath(wanted.workdir or ".")
    if not os.path.isdir(workdir):
        raise SpecError(f"the folder {workdir} that runs are to work in does not exist; make it, or name another by --workdir")
    folders = local_folders(wanted.storages, workdir)
    specs = dict(_specs(wanted.specs))
    first = next(iter(specs), None)
    entries = catalogue(
        storages=wanted.storages,
        database=wanted.database,
        automations=wanted.automations,
        silence=wanted.silence,
        spec=None if first is None else f"{PREFIX}{first}",
    )
    return _Plan(wanted=wanted, workdir=workdir, folders=folders, specs=specs, entries=entries)


def _specs(files: Sequence[str]) -> Iterator[tuple[str, HoldfastSpec]]:
    """Read the specs that are to be saved, by the names of their blocks."""
    seen: dict[str, str] = {}
    for file in files:
        name = _BLOCK_NAME.sub("-", Path(file).stem.lower()).strip("-")
        if not name or name in seen:
            where = (
                f"{seen[name]} is saved as {name!r} already" if name in seen else "its file has no letter or digit in its name"
            )
            raise SpecError(f"{file} cannot be saved: {where}; rename the file")
        seen[name] = file
        yield name, HoldfastSpec.from_file(file)


def _warn(wanted: Wanted, say: Callable[[str], None]) -> None:
    if wanted.automations and wanted.silence < HEARTBEATS * HEARTBEAT_SECONDS:
        say(
            f"silence of {wanted.silence:g} s is less than {HEARTBEATS} heartbeats of Prefect's {HEARTBEAT_SECONDS} s: runs of "
            f"these deployments beat faster; where others run, set {HEARTBEAT_VARIABLE}, or they are called Crashed while "
            "they live"
        )


@contextmanager
def reached() -> Iterator[SyncPrefectClient]:
    """Return a client of the API that Prefect's settings name; EngineError when there is none, or it cannot be used."""
    url = PREFECT_API_URL.value()
    if not url:
        raise EngineError(
            "Prefect's settings name no API; set PREFECT_API_URL, such as http://127.0.0.1:4200/api, or log in to Prefect Cloud"
        )
    try:
        with impatient_client() as asking:
            asking.request("POST", "/work_pools/filter", json={"limit": 1})
        with get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            words = "set PREFECT_API_AUTH_STRING as the server has it, or PREFECT_API_KEY for Prefect Cloud"
            raise EngineError(f"{url} does not let us in (HTTP {status}); {words}") from error
        raise EngineError(f"{url} refused a request (HTTP {status}): {error.response.text[:500]}") from error
    except StorageError:
        raise  # an OSError, too, and not the API's
    except (httpx.HTTPError, OSError) as error:
        raise EngineError(
            f"{url} does not answer ({type(error).__name__}: {error}); start the server (`prefect server start`), or mend "
            "PREFECT_API_URL"
        ) from error


def _check_there(client: SyncPrefectClient, plan: _Plan) -> str:
    """Refuse what the server has and we cannot use, or lacks and we need; return the type of the work pool."""
    pool = plan.wanted.pool
    try:
        kind = client.read_work_pool(pool).type
    except ObjectNotFound:
        kind = POOL_TYPE
    relative = [place for place in plan.wanted.storages if not (is_url(place) or is_reference(place) or os.path.isabs(place))]
    if kind != POOL_TYPE and relative:
        raise SpecError(
            f"work pool {pool!r} is of type {kind}, where no folder of this machine is, and the storage {relative[0]} lies in"
            " one; give --storage s3://bucket/prefix, block:NAME, or the absolute path of a volume that every job mounts"
        )
    given = [*plan.wanted.storages, *([plan.wanted.database] if plan.wanted.database else ())]
    for reference in (one for one in given if is_reference(one)):
        name = reference.removeprefix(PREFIX).partition("/")[0]
        if not any(_has_block(client, name, block.get_block_type_slug()) for block in BLOCKS):
            raise SpecError(f"there is no block {name!r}, which {reference} names; make it first, or mend the name")
    return kind


def _has_block(client: SyncPrefectClient, name: str, kind: str) -> bool:
    try:
        client.read_block_document_by_name(name, kind)
    except ObjectNotFound:
        return False
    return True


# What is written


def _carried_out(client: SyncPrefectClient, plan: _Plan, *, in_folder: bool) -> Iterator[Change]:
    """Make or change one thing after the other, and yield what became of each; ``in_folder``: runs work on this machine."""
    for folder in plan.folders if in_folder else ():
        there = folder.is_dir()
        make_folder(folder)
        yield Change(kind="storage", name=str(folder), what="as it was" if there else "made")
    yield from _block_types(client)
    for name, spec in plan.specs.items():
        yield _saved(name, spec)
    yield _pool(client, plan.wanted.pool)
    lacking = automations.missing(client)
    watch: dict[str, Any] = {}
    for entry in plan.entries:
        found, change = _deployment(client, entry, plan, pull_steps(plan.workdir) if in_folder else [])
        watch = found if entry.full_name == WATCH else watch
        yield change
    yield from _healing(client, plan.wanted, watch, lacking)


def _block_types(client: SyncPrefectClient) -> Iterator[Change]:
    for block in BLOCKS:
        slug = block.get_block_type_slug()
        try:
            client.read_block_type_by_slug(slug)
            what: What = "as it was"
        except ObjectNotFound:
            what = "made"
        block.register_type_and_schema()
        yield Change(kind="block type", name=str(slug), what=what)


def _saved(name: str, spec: HoldfastSpec) -> Change:
    what: What = "made"
    try:
        there: Any = HoldfastSpec.load(name)
        if (there.spec, there.workdir) == (spec.spec, spec.workdir):
            return Change(kind="spec", name=f"{PREFIX}{name}", what="as it was")
        what = "changed"
    except ValueError:  # as Prefect says that there is none
        pass
    spec.save(name, overwrite=True)
    return Change(kind="spec", name=f"{PREFIX}{name}", what=what)


def _pool(client: SyncPrefectClient, name: str) -> Change:
    """Make the work pool; one that is there may have limits and variables that somebody gave it."""
    from prefect.client.schemas.actions import WorkPoolCreate

    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type=POOL_TYPE, base_job_template=template))
        return Change(kind="work pool", name=name, what="made", detail=f"type {POOL_TYPE}")
    return Change(kind="work pool", name=name, what="as it was", detail=f"type {POOL_TYPE}")


def _deployment(
    client: SyncPrefectClient, entry: Entry, plan: _Plan, steps: list[dict[str, Any]]
) -> tuple[dict[str, Any], Change]:
    """Make a deployment, or change what is ours of it; return it as it is now."""
    flow: Flow[Any, Any] = load_flow_from_entrypoint(entry.entrypoint)
    body: dict[str, Any] = {
        "version": version(),
        "description": entry.description,
        "entrypoint": entry.entrypoint,
        "tags": list(entry.tags),
        "parameters": dict(entry.parameters),
        "parameter_openapi_schema": parameter_schema(flow).model_dump(mode="json", exclude_unset=True),
        "enforce_parameter_schema": True,
        "pull_steps": steps,
        "job_variables": dict(entry.job_variables),
        "work_pool_name": plan.wanted.pool,
        "work_queue_name": QUEUE,
    }
    try:
        found = _read(client, entry)
    except ObjectNotFound:
        identity = client.create_flow_from_name(entry.flow)
        made = {**body, "name": entry.name, "flow_id": str(identity), "schedules": [_schedule(one) for one in entry.schedules]}
        client.request("POST", "/deployments/", json=made)
        return _read(client, entry), Change(kind="deployment", name=entry.full_name, what="made")
    body["tags"] = [*found["tags"], *(tag for tag in entry.tags if tag not in found["tags"])]
    body["parameters"] = _parameters(entry, found["parameters"], body["parameter_openapi_schema"])
    body["job_variables"] = _variables(entry, found["job_variables"] or {})
    differing = [key for key, value in body.items() if found[key] != value]
    if "work_pool_name" not in differing and found["work_queue_name"]:
        differing = [key for key in differing if key != "work_queue_name"]  # a person chose another queue of the pool
    if differing:
        changed = {key: body[key] for key in differing}
        client.request("PATCH", "/deployments/{id}", path_params={"id": found["id"]}, json=changed)
    slugs = _schedules(client, entry, found)
    detail = ", ".join([*differing, *slugs])
    what: What = "changed" if detail else "as it was"
    now = _read(client, entry) if detail else found
    return now, Change(kind="deployment", name=entry.full_name, what=what, detail=detail)


def _read(client: SyncPrefectClient, entry: Entry) -> dict[str, Any]:
    names = {"flow_name": entry.flow, "deployment_name": entry.name}
    try:
        answer = client.request("GET", "/deployments/name/{flow_name}/{deployment_name}", path_params=names)
    except PrefectHTTPStatusError as error:
        if error.response.status_code == 404:
            raise ObjectNotFound(http_exc=error) from error
        raise
    found: dict[str, Any] = answer.json()
    return found


def _parameters(entry: Entry, theirs: Mapping[str, Json], schema: Mapping[str, Any]) -> dict[str, Json]:
    """Return the parameters that a person chose, but for ours, and for those that the flow does not have any more."""
    known = schema.get("properties", {})
    kept = {key: value for key, value in theirs.items() if key in known and key not in entry.ours}
    return {**entry.parameters, **kept}


def _variables(entry: Entry, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job variables that a person chose; of the environment, one variable is ours."""
    environment = {key: value for key, value in (theirs.get("env") or {}).items() if key != HEARTBEAT_VARIABLE}
    own = entry.job_variables.get("env")
    environment |= own if isinstance(own, dict) else {}
    found = {**theirs, "env": environment}
    if not environment and not theirs.get("env"):
        found = {key: value for key, value in found.items() if key != "env" or key in theirs}
    elif not environment:
        del found["env"]
    return found


def _schedule(one: Schedule) -> dict[str, Any]:
    return {
        "slug": one.slug,
        "schedule": {"cron": one.cron, "timezone": "UTC", "day_or": True},
        "active": one.active,
        "parameters": dict(one.parameters),
    }


def _schedules(client: SyncPrefectClient, entry: Entry, found: Mapping[str, Any]) -> list[str]:
    """Make the schedules that are not there; of those that are, only parameters that nobody gave are filled in."""
    slugs = []
    there = {one["slug"]: one for one in found["schedules"]}
    for schedule in entry.schedules:
        place = {"id": found["id"]}
        if schedule.slug not in there:
            client.request("POST", "/deployments/{id}/schedules", path_params=place, json=[_schedule(schedule)])
            slugs.append(f"schedule {schedule.slug}")
            continue
        theirs = there[schedule.slug]
        if lacking := {key: value for key, value in schedule.parameters.items() if key not in theirs["parameters"]}:
            _change_schedule(client, found["id"], theirs, parameters={**lacking, **theirs["parameters"]})
            slugs.append(f"schedule {schedule.slug}")
    return slugs


def _change_schedule(client: SyncPrefectClient, deployment: str, schedule: Mapping[str, Any], **changes: Any) -> None:
    places = {"id": deployment, "schedule_id": schedule["id"]}
    client.request("PATCH", "/deployments/{id}/schedules/{schedule_id}", path_params=places, json=changes)


def _healing(client: SyncPrefectClient, wanted: Wanted, watch: Mapping[str, Any], lacking: Sequence[str]) -> Iterator[Change]:
    """Let automations look after runs, or the schedule of ``watch``: that one is switched when the way changes, and only then.

    What is switched off goes last: what dies in between leaves both on, which is harmless, and the next time mends it.
    """
    if not wanted.automations:
        if len(lacking) < len(automations.NAMES):
            yield from _switch(client, watch, active=True)
        yield from (Change(kind="automation", name=name, what="removed") for name in automations.remove(client))
        return
    *first, last = automations.wanted(watch["id"], wanted.silence)
    for automation in first:
        yield Change(kind="automation", name=automation.name, what=automations.ensure(client, automation))
    if lacking:
        yield from _switch(client, watch, active=False)
    yield Change(kind="automation", name=last.name, what=automations.ensure(client, last))


def _switch(client: SyncPrefectClient, watch: Mapping[str, Any], *, active: bool) -> Iterator[Change]:
    for schedule in watch["schedules"]:
        if schedule["slug"] == WATCH_SLUG and schedule["active"] is not active:
            _change_schedule(client, watch["id"], schedule, active=active)
            detail = "active" if active else "not active: automations see to it"
            yield Change(kind="schedule", name=f"{WATCH} {WATCH_SLUG}", what="changed", detail=detail)
