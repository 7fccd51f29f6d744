"""What a trial's flow run on a work pool is told: names and references, nothing secret, since Prefect keeps it. No Prefect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from holdfast import references
from holdfast.core.errors import Fenced, NotStorable, SpecError
from holdfast.core.spec import ExperimentSpec
from holdfast.core.values import dumps, plain
from holdfast.flows.forms import TrialForm, secret_in
from holdfast.flows.serving import left_running
from holdfast.locate import database_url, experiment_path
from holdfast.settings import names_api, settings
from holdfast.storage.database.engine import parse_url, shown
from holdfast.storage.database.experiments import by_uuid, open_database
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.reads import Reader
from holdfast.storage.root import absolute, is_url, parent_of
from holdfast.tasks.place import Place, own_references

_SECRETS = ("HOLDFAST_STORAGE_OPTIONS", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY")
"""Variables that are secret whatever stands in them."""
_PASSWORD = re.compile(r"://[^/?#\s]*:[^/?#\s]*@|[?&](ssl)?password=")
"""What a URL with a password in it has, wherever it stands in a text."""
_BLOCK = "save it in Prefect in a block {kind} and name it as block:NAME"


@dataclass(frozen=True)
class Told:
    """Where an experiment is, as everybody may read it."""

    path: str
    database: str | None
    """a reference or a URL without a password; None: the environment of whoever runs a trial names it"""
    options: Mapping[str, Any]

    @property
    def is_local(self) -> bool:
        """Whether path or database are files, which are on one machine."""
        return bool(self.local())

    def local(self) -> list[str]:
        """Return the settings that lie in files of one machine, each with what mends it."""
        found = []
        if not (is_url(self.path) or references.is_reference(self.path)):
            found.append(f"the storage {parent_of(self.path)} is a folder (storage: s3://bucket/prefix, or block:NAME of one)")
        if self.database is not None and self.database.startswith("sqlite"):
            found.append(
                f"the database {self.database} is a file (database: postgresql+psycopg://user@host/name, or block:NAME)"
            )
        return found


def check_public(spec: ExperimentSpec, stored: Mapping[str, Any] | None = None) -> Told:
    """Return what the runs of a spec's trials would be told of its place.

    SpecError when that would hold a secret, or when no worker could ask Prefect's API of this search. ``stored`` are the
    references that are stored already; None: those of ``spec`` are about to be.
    """
    if not names_api() and left_running() is None:
        raise SpecError(
            "execution.runner is workpool, and Prefect's settings name no API: nobody polls the private server that a search "
            "starts for itself; set PREFECT_API_URL to your server's, log in to Prefect Cloud, or start `holdfast up`"
        )
    if (where := _open_secret(spec.execution.job_variables, "execution.job_variables")) is not None:
        raise SpecError(
            f"{where[0]} holds {where[1]}, which Prefect would keep and show; write "
            '"{{ prefect.blocks.secret.NAME }}" for its value, or set it where the jobs run'
        )
    _check_references(spec, stored)
    url = database_url(parent_of(experiment_path(spec)), spec.database)
    text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    return told_of(experiment_path(spec), spec.storage_options, text)


def _check_references(spec: ExperimentSpec, stored: Mapping[str, Any] | None) -> None:
    """Raise SpecError when trials would be handed references, in place of stored ones, that Prefect may not or cannot keep."""
    try:
        known = spec.model_dump(mode="json", include={"references"})["references"] if stored is None else stored
    except ValueError:  # pydantic's, of what is no JSON
        known = {}
    own = own_references(spec.references, known)
    if (found := secret_in(own)) is not None:
        raise SpecError(
            f"references holds the credential {found!r}, and Prefect keeps what a trial's flow run is told; set it in the "
            "environment of the pool's jobs, or save it in a block, and let the trainable read it there"
        )
    try:
        json.dumps(plain(own, "references"), allow_nan=False)
    except (NotStorable, ValueError) as error:
        raise SpecError(
            f"references cannot be told to a trial's flow run, since Prefect keeps JSON ({error}); give strings, finite "
            "numbers, true, false, null, and lists and mappings of them"
        ) from None


def _open_secret(value: object, where: str, *, is_env: bool = False) -> tuple[str, str] | None:
    """Return where in job variables a credential stands, and its name; None when there are references to blocks alone."""
    if isinstance(value, str):
        return (where, "a URL with a password") if _PASSWORD.search(value) and not _is_template(value) else None
    if isinstance(value, Mapping):
        variables = [*value.items()] if is_env else []
        if isinstance(value.get("name"), str) and "value" in value:  # as Kubernetes and ECS write a variable
            variables = [(value["name"], value["value"])]
        for name, each in variables:
            if not _is_template(each) and _is_secret(str(name), each):
                return where, str(name)
        inner = [(each, f"{where}.{key}", key in ("env", "environment")) for key, each in value.items()]
    else:
        inner = [(each, where, False) for each in value] if isinstance(value, (list, tuple)) else []
    return next((found for each, at, env in inner if (found := _open_secret(each, at, is_env=env)) is not None), None)


def _is_template(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{{")


def _is_secret(name: str, value: object) -> bool:
    """Tell whether an environment variable is one that nobody may see."""
    if name == "HOLDFAST_DATABASE_URL":
        return isinstance(value, str) and not references.is_reference(value) and shown(value) != value
    return secret_in({name: value}) is not None or (name in _SECRETS and bool(value))


def told_of(location: str, options: Mapping[str, Any], database: str) -> Told:
    """Return what may be told of a place; SpecError when its credentials can be neither referred to nor left to workers."""
    path = references.name_of_location(absolute(location))
    if is_url(path) and "@" in urlsplit(path).netloc:
        raise SpecError(
            f"the storage holds credentials in its URL, and Prefect keeps what a trial's flow run is told; {_mend()}"
        )
    return Told(path, _database(database), _options(path, options))


def _options(path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the storage options that a worker does not find by itself."""
    known = (references.place(path)[1] if references.is_reference(path) else settings().storage_options) or {}
    own = {name: value for name, value in options.items() if name not in known or known[name] != value}
    if (found := secret_in(own)) is not None:
        raise SpecError(
            f"storage_options holds the credential {found!r}, and Prefect keeps what a trial's flow run is told; {_mend()}"
        )
    try:
        json.dumps(own)
    except (TypeError, ValueError):
        raise SpecError(
            f"storage_options ({', '.join(own)}) cannot be told to a trial's flow run: Prefect keeps JSON; {_mend()}"
        ) from None
    return own


def _mend() -> str:
    return (
        f"{_BLOCK.format(kind='HoldfastStorage')}, or leave it out and set HOLDFAST_STORAGE_OPTIONS (or AWS_...) both here and "
        "in the environment of the pool's jobs"
    )


def _database(url: str) -> str | None:
    parsed = parse_url(url)
    full = parsed.render_as_string(hide_password=False)
    label = shown(full)
    known = references.name_of_database(label)
    if references.is_reference(known):
        return known
    if label == full:
        return full
    given = settings().database_url
    if given and not references.is_reference(given) and parse_url(given) == parsed:
        return None
    raise SpecError(
        f"the database {label} is given with its password, and Prefect keeps what a trial's flow run is told; "
        f"{_BLOCK.format(kind='HoldfastDatabase')}, or leave it out and set HOLDFAST_DATABASE_URL both here and in the "
        "environment of the pool's jobs"
    )


def parameters(place: Place, told: Told, *, trial: int, attempt: int, row: int) -> dict[str, Any]:
    """Return the parameters of the flow run of an attempt."""
    return {
        "path": told.path,
        "uuid": place.uuid,
        "epoch": place.epoch,
        "trial": trial,
        "attempt": attempt,
        "row": row,
        "drive": {
            "name": place.name,
            "workdir": place.workdir,
            "trainable": place.trainable,
            "host": place.host,
            "code": place.code,
            "versions": dict(place.versions),
            **({"references": plain(place.references, "references")} if place.references is not None else {}),
        },
        **({"database": told.database} if told.database is not None else {}),
        **({"storage_options": dict(told.options)} if told.options else {}),
    }


def place_of(form: TrialForm) -> tuple[Place, str]:
    """Return where the experiment of a trial's flow run is, as this environment reaches it, and the attempt's config.

    Fenced, with the reason in a sentence, when no search waits for that run; nothing is written.
    """
    location, options = references.place(form.path, form.storage_options)
    where = absolute(location)
    url = database_url(parent_of(where), form.database)
    database = open_database(url)
    try:
        record = by_uuid(database, form.uuid)
        if record is None:
            raise Fenced(f"the database {database.label} does not have the experiment {form.drive.name!r} that this run is for")
        lease = Leases(database, record.id).look()
        if lease.epoch != form.epoch or not lease.is_held:
            raise Fenced(f"the search that started this run does not drive {record.name!r} any more")
        trial = Reader(database, record.id).trial(form.trial)
        if trial is None or trial.attempt.id != form.row:
            raise Fenced(f"attempt {form.attempt} of trial {form.trial} is over: a later one took its place")
        if trial.attempt.outcome is not None:
            raise Fenced(f"attempt {form.attempt} of trial {form.trial} is over: {trial.attempt.outcome.value}")
        if trial.attempt.claimed:
            raise Fenced(f"attempt {form.attempt} of trial {form.trial} was begun already, by another run or process")
    finally:
        database.close()
    place = Place(
        uuid=form.uuid,
        name=record.name,
        experiment=record.id,
        epoch=form.epoch,
        location=where,
        options=dict(options or settings().storage_options or {}) if is_url(where) else {},
        database=url if isinstance(url, str) else url.render_as_string(hide_password=False),
        workdir=form.drive.workdir,
        code=form.drive.code,
        trainable=form.drive.trainable,
        host=form.drive.host,
        versions=form.drive.versions,
        references=form.drive.references,
    )
    return place, dumps(dict(trial.config))
