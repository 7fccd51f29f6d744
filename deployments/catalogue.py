"""The deployments as data, and ``prefect.yaml``, which is written from them. Imports no Prefect."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from holdfast.core.errors import SpecError
from holdfast.core.values import Json
from holdfast.flows.naming import COLLECT, POOL, RESTORE, SEARCH, TAG, TRIAL, WATCH
from holdfast.references import is_reference
from holdfast.storage.root import is_url

STORAGES = ("./runs",)
"""Where experiments are when nothing else is said: below the folder that runs work in."""

QUEUE = "default"

PLACES = ("storages", "database")
"""Parameters that say where experiments are."""

HEARTBEAT_VARIABLE = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"

WORKDIR_STEP = "prefect.deployments.steps.set_working_directory"

HEARTBEAT_SECONDS = 180
"""Prefect's own: how often a flow run says that it is alive."""
LEAST_HEARTBEAT_SECONDS = 30
HEARTBEATS = 3
"""How many of them may be missing before a run counts as dead."""
SILENCE_SECONDS = 600.0
LEAST_SILENCE_SECONDS = 10.0
"""Prefect's own least time to wait for an event that does not come."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A schedule, known again by its slug; times are UTC."""

    slug: str
    cron: str
    active: bool
    parameters: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One deployment."""

    flow: str
    name: str
    entrypoint: str
    description: str
    parameters: Mapping[str, Json] = field(default_factory=dict)
    schedules: tuple[Schedule, ...] = ()
    job_variables: Mapping[str, Json] = field(default_factory=dict)
    tags: tuple[str, ...] = (TAG,)
    ours: tuple[str, ...] = ()
    """parameters that a deployment always has as they are here; a person may have set any other one"""

    @property
    def full_name(self) -> str:
        return f"{self.flow}/{self.name}"


SEARCH_TEXT = """\
Runs a hyperparameter search to the end of its budget, as its spec says.

* **New search**: give a spec, by path or by a saved name (`block:NAME`).
* **The same search again**: the spec's `if_exists` says what happens: `fail`, `restore` (a retried run goes on), or `new`.
* Killed, or its machine is gone? Run `restore/restore`, or let `watch/watch` do that.

The schedule `nightly` is an example and is not active: give it your spec, then switch it on. Its name holds `{date}`, so each
night is an experiment of its own; `if_exists=restore` lets a run that is retried within the same night go on.
"""

RESTORE_TEXT = """\
Goes on with an experiment that was interrupted; only its path is needed.

* Finished trials stay as they are; unfinished ones go on from their newest good checkpoints.
* Errored trials stay unless you say *resume* or *restart*.
* An experiment that somebody drives is refused at once: nobody ever drives twice.
"""

WATCH_TEXT = """\
Finds experiments whose process died, and restores each **once for each crash**, as the section `recovery` of its spec says: how
often, after which pause, and what becomes of errored trials.

* Automations run it when a flow run crashed or fell silent; where they are off, the schedule does, every five minutes.
* Restores run as flow runs of `restore/restore`, on whatever worker is free.
* A restore that is due later is a run of this deployment that is scheduled for then.
"""

COLLECT_TEXT = """\
Removes what dead attempts left behind, in every experiment of the storages that nobody drives.

* Foreign files, pinned checkpoints, and experiments that are being driven are left alone.
* `verify` also reads every checkpoint, and marks those that are damaged; `dry_run` only tells what would go.
"""

TRIAL_TEXT = """\
Runs one trial of a search whose spec says `execution.runner: workpool`. **The search starts its runs, not people**: one that
nobody waits for ends at once.

* Cancel a run, and its trial is cancelled; the search goes on.
* What a job of this pool needs (an image with the search's versions, credentials in its environment): docs/deploying.md.
"""

NIGHTLY = "0 1 * * *"
EVERY_FIVE_MINUTES = "*/5 * * * *"
WATCH_SLUG = "every-five-minutes"


def catalogue(
    *,
    storages: Sequence[str] = STORAGES,
    database: str | None = None,
    automations: bool = False,
    silence: float = SILENCE_SECONDS,
    spec: str | None = None,
) -> tuple[Entry, ...]:
    """Return the deployments.

    Relative ``storages`` mean the folder that runs work in. Without ``automations`` the schedule of ``watch`` is active.
    ``silence``: seconds without a heartbeat after which a run counts as dead; runs beat often enough for it.
    ``spec``: what the example of a nightly search runs, such as ``block:digits``.
    """
    places: dict[str, Json] = {"storages": list(storages), **({"database": database} if database else {})}
    night: dict[str, Json] = {"overrides": ["name=nightly-{date}", "if_exists=restore"]}
    if spec is not None:
        night["spec"] = spec
    common: dict[str, Any] = {"job_variables": _job_variables(silence) if automations else {}}
    return (
        Entry(
            **_place(SEARCH),
            description=SEARCH_TEXT,
            schedules=(Schedule(slug="nightly", cron="0 2 * * *", active=False, parameters=night),),
            **common,
        ),
        Entry(**_place(RESTORE), description=RESTORE_TEXT, **common),
        Entry(
            **_place(WATCH),
            description=WATCH_TEXT,
            parameters={**places, "deployment": RESTORE},
            ours=PLACES,
            schedules=(Schedule(slug=WATCH_SLUG, cron=EVERY_FIVE_MINUTES, active=not automations),),
            **common,
        ),
        Entry(
            **_place(COLLECT),
            description=COLLECT_TEXT,
            parameters=places,
            ours=PLACES,
            schedules=(Schedule(slug="nightly", cron=NIGHTLY, active=True),),
            **common,
        ),
        Entry(**_place(TRIAL), description=TRIAL_TEXT, **common),
    )


def local_folders(storages: Sequence[str], workdir: str) -> tuple[Path, ...]:
    """Return the storages that are folders; SpecError for none at all, and for what is no folder and cannot become one."""
    if not storages or not all(storages):
        raise SpecError(f"storages is {list(storages)!r}; name at least one folder or URL that holds experiments")
    folders = tuple(Path(workdir, place) for place in storages if not is_url(place) and not is_reference(place))
    for folder in folders:
        there = next(part for part in (folder, *folder.parents) if os.path.lexists(part))
        if not there.is_dir():
            where = f"is {_kind(there)}" if there == folder else f"cannot be made: {there} is {_kind(there)}"
            raise SpecError(f"storage {folder} {where}; name a folder, which is made if it is not there")
    return folders


def _kind(place: Path) -> str:
    return "a file" if place.exists() else "a link to nothing"


def _place(full_name: str) -> dict[str, Any]:
    flow, _, name = full_name.partition("/")
    return {"flow": flow, "name": name, "entrypoint": f"holdfast.flows.{flow}.{flow}"}


def _job_variables(silence: float) -> dict[str, Json]:
    """Let runs say that they are alive often enough: silence is meant to be some heartbeats that are missing."""
    if silence >= HEARTBEATS * HEARTBEAT_SECONDS:
        return {}
    beat = max(LEAST_HEARTBEAT_SECONDS, int(silence / (HEARTBEATS + 1)))
    return {"env": {HEARTBEAT_VARIABLE: str(beat)}}


def version() -> str:
    """Return the version of the deployments: the program's own."""
    return metadata.version("holdfast")


def pull_steps(workdir: str) -> list[dict[str, Any]]:
    """Return what a run does before it begins: the program is installed, so only the folder is set."""
    return [{WORKDIR_STEP: {"directory": workdir}}]


HEADER = """\
# The deployments, for `prefect --no-prompt deploy --all`. Written by `holdfast deploy --print-yaml`.
# They need a work pool: prefect work-pool create holdfast --type process
# Runs work in the folder that this is deployed from: relative paths mean that folder. This makes no automations, so `watch`
# has an active schedule; `holdfast deploy` makes pool, deployments and automations at once.
"""


def prefect_yaml() -> str:
    """Return the text of ``prefect.yaml``."""
    data = {"name": "holdfast", "deployments": [_yaml_entry(entry) for entry in catalogue()]}
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return f"{HEADER}{text}"


def _yaml_entry(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "version": version(),
        "description": entry.description,
        "entrypoint": entry.entrypoint,
        "tags": list(entry.tags),
        "parameters": dict(entry.parameters),
        "enforce_parameter_schema": True,
        "work_pool": {"name": POOL, "work_queue_name": QUEUE, "job_variables": dict(entry.job_variables)},
        "schedules": list(_yaml_schedules(entry)),
    }


def _yaml_schedules(entry: Entry) -> Iterator[dict[str, Any]]:
    for schedule in entry.schedules:
        found: dict[str, Any] = {"slug": schedule.slug, "cron": schedule.cron, "timezone": "UTC", "active": schedule.active}
        if schedule.parameters:
            found["parameters"] = dict(schedule.parameters)
        yield found


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and everything where it belongs."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
