"""How an experiment stands before something is started for it: there or not, driven or not. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import references
from holdfast.core.errors import Corrupt, ExperimentNotFound, HoldfastError, SpecError
from holdfast.deployments.webhook.places import BLOCK, candidates, location_below, parts_below, spec_below
from holdfast.deployments.webhook.problems import Problem, later
from holdfast.deployments.webhook.requests import Wanted
from holdfast.holding import is_driven, is_driven_by_path
from holdfast.locate import database_url, experiment_path, folder_at, placed
from holdfast.settings import settings
from holdfast.specfile import ExperimentSpec, apply_overrides
from holdfast.storage.database.engine import connect
from holdfast.storage.database.experiments import by_uuid, has_schema
from holdfast.storage.database.leases import Leases, describe
from holdfast.storage.folder import Folder
from holdfast.storage.root import name_of, parent_of

if TYPE_CHECKING:
    from holdfast.deployments.webhook.config import Root, WebhookConfig


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be started."""

    place: str
    """the experiment's location, or for a saved spec its name: one thing at a time is started for it"""
    name: str
    """of the experiment, as far as it is known"""
    parameters: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an experiment really is. Its options may hold a block's secrets: they stay in memory."""

    folder: Folder = field(repr=False)
    database: str | None = field(default=None, repr=False)


def restore_of(wanted: Wanted, config: WebhookConfig) -> Target:
    """Return the restore that is wanted; a Problem (404) unless there is such an experiment below the roots."""
    for root, location in candidates(wanted.name, config.roots):
        with _readable():
            place = _found(root, location)
        if place is None:
            continue
        parameters = {"path": location, **wanted.flags}
        if root.storage_options:
            parameters["storage_options"] = root.storage_options
        if root.database:
            parameters["database"] = root.database
        if not wanted.forces:
            check_free(place.folder, place.database)
        return Target(place=location, name=name_of(location), parameters=parameters)
    raise Problem(404, "no-such-experiment", "there is no such experiment below the roots of this receiver")


@contextmanager
def _readable() -> Iterator[None]:
    """Make a Problem (503) of what cannot be looked up or read in the body."""
    try:
        yield
    except (HoldfastError, OSError, ValueError) as error:
        raise later(503, "storage", "the storage cannot be read; the receiver's log says why", 30.0) from error


def _found(root: Root, location: str) -> _Place | None:
    """Return where the experiment is, by the block that stands for its root if one does; None when there is none."""
    options: Mapping[str, Any] | None = root.storage_options
    if location.startswith(BLOCK):
        base, options = references.place(root.location, options)
        # The same checks as for a root that is named itself: the block may be a folder with links, or a URL.
        parts = parts_below(location.removeprefix(f"{root.location}/"), str(base))
        below = None if parts is None else location_below(str(base), parts)
        if below is None:
            return None
        location = below
    folder = folder_at(location, options)
    return _Place(folder=folder, database=_database(root.database)) if folder.exists() else None


def _database(given: str | None) -> str | None:
    """Return the URL of a database that was given, or of the environment's, with what a block says of it."""
    return references.database(given or settings().database_url)


def search_of(wanted: Wanted, config: WebhookConfig) -> Target:
    """Return the search that is wanted; a Problem unless its spec may be used and its experiment is free."""
    spec = spec_below(wanted.name, config.specs)
    if spec is None:
        raise Problem(404, "no-such-spec", "there is no such spec below the folders of this receiver, and no saved one")
    parameters = {"spec": spec, **({"overrides": list(wanted.overrides)} if wanted.overrides else {})}
    read = _read(spec, wanted.overrides)
    with _readable():
        placed_at = placed(read)  # secrets of its blocks: in memory alone
        location = experiment_path(placed_at)
        known = "{" not in read.name and read.if_exists != "new"
        folder = folder_at(location, placed_at.storage_options)
        exists = known and folder.exists()
        database = _database(read.database) if exists else None
    if exists and read.if_exists == "fail":
        raise Problem(409, "experiment-exists", "the experiment exists already, and its spec says if_exists: fail")
    if exists:
        check_free(folder, database)
    return Target(place=location, name=read.name, parameters=parameters)


def _read(spec: str, overrides: Sequence[str]) -> ExperimentSpec:
    """Return a spec from its file or its block, as the flow reads it."""
    saved = None
    if spec.startswith(BLOCK):
        with _readable():
            saved = references.saved_spec(spec)
    try:
        if saved is None:
            return ExperimentSpec.from_file(spec, overrides)
        return ExperimentSpec.parse(apply_overrides(saved.data, overrides, spec), source=spec)
    except SpecError as error:
        raise Problem(422, "spec", "the spec with these overrides is refused; the receiver's log says why") from error


def check_free(folder: Folder, database: str | None) -> None:
    """Raise a Problem (409) that names the holder and its expiry while somebody drives the experiment.

    Its path tells, and its database, where that can be asked from here: a lease is in both.
    """
    try:
        identity = folder.identity()
        lease = folder.lease()
    except ExperimentNotFound:
        raise Problem(404, "no-such-experiment", "there is no such experiment below the roots of this receiver") from None
    except Corrupt as error:
        raise Problem(409, "damaged", "the experiment's files are damaged; the receiver's log says how") from error
    except (HoldfastError, OSError) as error:
        raise later(503, "storage", "the storage cannot be read; the receiver's log says why", 30.0) from error
    if lease is not None and is_driven_by_path(lease, identity.uuid):
        raise _driven(lease.holder, lease.expires)
    with suppress(HoldfastError, OSError):  # it may be another host's
        url = database_url(parent_of(folder.location), database)
        if not isinstance(url, str) and not Path(str(url.database)).exists():
            return
        with closing(connect(url, readonly=True)) as opened:
            record = by_uuid(opened, identity.uuid) if has_schema(opened) else None
            found = None if record is None else Leases(opened, record.id).look()
        if found is not None and is_driven(found):
            raise _driven(found.holder, time.time() + found.remaining)


def _driven(holder: dict[str, Any] | None, expires: float) -> Problem:
    until = datetime.fromtimestamp(expires, UTC).isoformat(timespec="seconds")
    who = describe(holder or {})
    return later(
        409,
        "running",
        f"{who} drives the experiment; its lease runs until {until} unless it is renewed",
        max(expires - time.time(), 0.0),
        holder=who,
        expires=until,
    )
