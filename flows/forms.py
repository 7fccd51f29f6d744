"""The parameters of the flows: what Prefect's UI makes forms of, and what is checked before anything is done. No Prefect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from holdfast.core.errors import SpecError
from holdfast.core.resume import Rerun
from holdfast.core.spec import CHANGEABLE, explain
from holdfast.core.spec import ExperimentSpec as CoreSpec
from holdfast.flows.shaping import shape_spec
from holdfast.references import is_reference

_SECRET = r"(?i)^key$|secret|passw|token|credential|account_key|access_key|api_key|sas_|connection_string|private"
"""What the names of options that are credentials look like."""
_NO_PASSWORD = r"^(?![^/?]*//[^/@?]*:[^/@?]*@)(?!.*[?&](ssl)?password=)"
"""A URL without a password."""
SAVE_STORAGE = "Prefect keeps parameters: save the storage in a block HoldfastStorage, and name it as block:NAME"
SAVE_DATABASE = "Prefect keeps parameters: save the database in a block HoldfastDatabase, and name it as block:NAME"


def _shown(title: str, description: str, *examples: Any, **more: Any) -> Any:
    """Return what a form shows of a parameter. Prefect overwrites a field's own title, and leaves extras alone."""
    extra = {"title": title, "description": description, **({"examples": list(examples)} if examples else {}), **more}
    return Field(title=title, description=description, json_schema_extra=extra)


class _WithoutNull(dict[str, Any]):
    """A schema that takes no default of null: Prefect would refuse a null that is given, and its UI would send one."""

    def __setitem__(self, key: str, value: Any) -> None:
        if (key, value) != ("default", None):
            super().__setitem__(key, value)


class _Shape:
    """The JSON schema of a parameter where pydantic's own would make a worse form: an empty input is "not given" there.

    ``null`` is one more way not to give it, which Prefect allows by itself for what has neither a default nor to be there.
    """

    def __init__(self, **schema: Any) -> None:
        self._schema = schema

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _WithoutNull(self._schema)


class _SpecShape:
    """The JSON schema of a spec as a form: titles, an order, and nothing that only files need."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        spec = handler.resolve_ref_schema(schema)
        shape_spec(spec, handler.resolve_ref_schema)
        spec["properties"]["storage_options"] |= _OPTIONS
        spec["properties"]["database"] |= {"pattern": _NO_PASSWORD}
        return schema


_TEXT = {"type": "string", "minLength": 1}
_OPTIONS = {
    "type": "object",
    "additionalProperties": True,
    "propertyNames": {"not": {"pattern": _SECRET}},
}
_RERUN = {"type": "string", "enum": [rule.value for rule in Rerun]}

Options = Annotated[
    dict[str, Any] | None,
    _Shape(**_OPTIONS),
    _shown(
        "Storage options",
        'Options of an object store, such as {"endpoint_url": "http://127.0.0.1:9000"}. No credentials, because Prefect keeps '
        "parameters: save those in a block HoldfastStorage, and write block:NAME for the storage.",
        {"endpoint_url": "http://127.0.0.1:9000"},
        position=90,
    ),
]
Database = Annotated[
    str | None,
    _Shape(**_TEXT, pattern=_NO_PASSWORD),
    _shown(
        "Database",
        "Empty: the one in the storage. Else block:NAME of a saved HoldfastDatabase, or a URL without a password, because "
        "Prefect keeps parameters.",
        "block:main",
        "postgresql+psycopg://user@host/name",
        position=80,
    ),
]

# restore
Experiment = Annotated[
    str,
    Field(min_length=1),
    _shown(
        "Experiment",
        "What to go on with: the experiment's folder, its URL on an object store, or block:NAME/EXPERIMENT in a saved storage.",
        "/data/experiments/digits",
        "s3://bucket/experiments/digits",
        "block:lab/digits",
    ),
]
ResumeUnfinished = Annotated[
    bool,
    _shown("Resume unfinished trials", "Go on with them from their newest checkpoints; off: leave them out."),
]
ResumeErrored = Annotated[
    bool,
    _shown("Resume errored trials", "Go on with them from their newest checkpoints; off: keep them as they are."),
]
RestartErrored = Annotated[
    bool,
    _shown("Restart errored trials", "Begin them again at step 0; off: keep them as they are. Only one of this and Resume."),
]
NewTrials = Annotated[bool, _shown("Propose new trials", "Up to the budget; off: only finish what was begun.")]
Force = Annotated[
    bool,
    _shown("Take over", "Even from a process that drives the experiment now and seems alive: its trials are cut off."),
]
Policy = Annotated[
    dict[str, str] | None,
    _Shape(
        type="object",
        additionalProperties=False,
        properties={
            "unfinished": {**_RERUN, "title": "Unfinished trials", "description": "Empty: resume.", "position": 0},
            "errored": {
                **_RERUN,
                "title": "Errored trials",
                "description": "Empty: skip, they stay as they are.",
                "position": 1,
            },
            "finished": {
                **_RERUN,
                "title": "Finished trials",
                "description": "Empty: skip, they stay as they are.",
                "position": 2,
            },
        },
    ),
    _shown(
        "Policy",
        "In place of the three switches above, which must be as they were then: what becomes of each kind of trial.",
        {"errored": "restart"},
        position=50,
    ),
]
Trainable = Annotated[
    str | None,
    _Shape(**_TEXT, pattern=r":[^\W\d]\w*$"),
    _shown(
        "Trainable",
        "Where the same trainable is now, if it was moved: /new/place/train.py:train or package.module:train.",
        "/new/place/train.py:train",
        position=60,
    ),
]
Changes = Annotated[
    dict[str, Any] | None,
    _Shape(type="object", additionalProperties=True, propertyNames={"enum": [*CHANGEABLE]}),
    _shown(
        "Changes",
        'New values of what a restore may change, by key, such as {"search.num_trials": 40}.',
        {"search.num_trials": 40},
        position=70,
    ),
]

# watch
Storages = Annotated[
    list[str],
    _Shape(type="array", items=_TEXT, minItems=1),
    _shown(
        "Storages",
        "Where experiments live: folders, URLs on object stores, or block:NAME of saved storages.",
        ["/data/experiments"],
        ["block:lab"],
    ),
]
DeploymentName = Annotated[
    str | None,
    _Shape(**_TEXT, pattern=r"^[^/]+/[^/]+$"),
    _shown(
        "Deployment",
        "A deployment of the flow restore, as FLOW/DEPLOYMENT, that restores run on; empty: they run where the watch runs.",
        "restore/restore",
        position=20,
    ),
]
AtOnce = Annotated[int, Field(ge=1), _shown("At once", "How many restores run here side by side at most.", 2)]
DryRun = Annotated[bool, _shown("Dry run", "Only say what would be done; nothing is written.")]

# collect
Verify = Annotated[
    bool, _shown("Verify", "Read every checkpoint, too, and mark those that are damaged: nothing continues from them.")
]
OnlyTell = Annotated[bool, _shown("Dry run", "Only say what would go; nothing is written.")]

# search
Overrides = Annotated[
    list[str] | None,
    _Shape(type="array", items={"type": "string", "pattern": r"^[^=\s]+\s*="}),
    _shown(
        "Overrides",
        "Changes to a spec that is read from a file or a block, each as KEY=VALUE, such as search.num_trials=50. Not for a "
        "spec that is filled in field by field.",
        ["search.num_trials=50", "search.seed=1"],
    ),
]
_SpecByName = Annotated[
    str,
    WithJsonSchema(
        {
            **_TEXT,
            "title": "File or saved spec",
            "description": "The path of a YAML file where the search runs, or block:NAME of a saved HoldfastSpec.",
            "examples": ["/data/specs/digits.yaml", "block:digits"],
        }
    ),
]
_SpecByField = Annotated[CoreSpec, _SpecShape()]
Spec = Annotated[
    _SpecByName | _SpecByField,
    _shown("Spec", "The search: by the path of its file, by the name of a saved spec, or field by field."),
]


# trial
_UNASKED = "Filled in by the search that starts this run; nobody else needs it."
TrialOf = Annotated[
    str,
    Field(min_length=1),
    _shown(
        "Not for people: the experiment of the search that starts this run",
        "A search whose spec says execution.runner: workpool starts these runs, one for each attempt of a trial; a run that no "
        "search waits for ends at once. To go on with a search, run restore/restore.",
        "/data/experiments/digits",
    ),
]
Identity = Annotated[str, Field(min_length=1), _shown("Identity", _UNASKED)]
Epoch = Annotated[int, Field(ge=1), _shown("Epoch", _UNASKED)]
TrialNumber = Annotated[int, Field(ge=0), _shown("Trial", _UNASKED)]
AttemptNumber = Annotated[int, Field(ge=1), _shown("Attempt", _UNASKED)]
Row = Annotated[int, Field(ge=1), _shown("Row", _UNASKED)]
DriveOf = Annotated[dict[str, Any] | None, _Shape(type="object", additionalProperties=True), _shown("Drive", _UNASKED)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class RestoreForm(_Form):
    """Restore an experiment; only the experiment has to be said."""

    path: Experiment
    resume_unfinished: ResumeUnfinished = True
    resume_errored: ResumeErrored = False
    restart_errored: RestartErrored = False
    new_trials: NewTrials = True
    force: Force = False
    storage_options: Options = None
    policy: Policy = None
    trainable: Trainable = None
    changes: Changes = None
    database: Database = None


class WatchForm(_Form):
    """Look for searches that were cut off."""

    storages: Storages
    database: Database = None
    deployment: DeploymentName = None
    at_once: AtOnce = 2
    dry_run: DryRun = False
    storage_options: Options = None


class CollectForm(_Form):
    """Remove what dead attempts left."""

    storages: Storages
    database: Database = None
    verify: Verify = False
    dry_run: OnlyTell = False
    storage_options: Options = None


class SearchForm(_Form):
    """Run a search."""

    spec: Any
    """a path, a reference, data, or a spec"""
    overrides: Overrides = None


class Drive(_Form):
    """What the drive that starts a trial's flow run says of itself."""

    name: str
    workdir: str
    trainable: str
    host: str
    code: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    references: dict[str, Any] | None = None


class TrialForm(_Form):
    """Run an attempt of a trial for a search that waits for it."""

    path: TrialOf
    uuid: Identity
    epoch: Epoch
    trial: TrialNumber
    attempt: AttemptNumber
    row: Row
    drive: Drive
    database: Database = None
    storage_options: Options = None


OverStorages = TypeVar("OverStorages", WatchForm, CollectForm)


def restore_form(parameters: Mapping[str, Any]) -> RestoreForm:
    """Return the checked parameters of a restore; SpecError says in a sentence what is wrong with them."""
    form = _checked(RestoreForm, _plain(parameters, "path"))
    _refuse_secrets(form.storage_options, form.database)
    return form


def watch_form(parameters: Mapping[str, Any]) -> WatchForm:
    """Return the checked parameters of a watch; SpecError says in a sentence what is wrong with them."""
    return _of_storages(WatchForm, parameters)


def collect_form(parameters: Mapping[str, Any]) -> CollectForm:
    """Return the checked parameters of a collection; SpecError says in a sentence what is wrong with them."""
    return _of_storages(CollectForm, parameters)


def trial_form(parameters: Mapping[str, Any]) -> TrialForm:
    """Return the checked parameters of a trial's flow run; SpecError says in a sentence what is wrong with them."""
    if parameters.get("drive") is None:
        raise SpecError(
            "runs of this flow are started by searches with execution.runner: workpool; to run one, use search/search"
        )
    form = _checked(TrialForm, _plain(parameters, "path"))
    _refuse_secrets(form.storage_options, form.database)
    return form


def _of_storages(kind: type[OverStorages], parameters: Mapping[str, Any]) -> OverStorages:
    form = _checked(kind, parameters)
    for storage in form.storages:
        _refuse_url(storage, "storages")
    _refuse_secrets(form.storage_options, form.database)
    return form


def search_form(parameters: Mapping[str, Any]) -> SearchForm:
    """Return the checked parameters of a search, the spec's own keys aside; SpecError says in a sentence what is wrong."""
    form = _checked(SearchForm, _plain(parameters, "spec"))
    spec = form.spec
    if isinstance(spec, CoreSpec):
        _refuse_secrets(spec.storage_options, spec.database)
        _refuse_url(spec.storage, "storage")
    elif isinstance(spec, dict):
        options, database = spec.get("storage_options"), spec.get("database")
        _refuse_secrets(options if isinstance(options, Mapping) else None, database if isinstance(database, str) else None)
        _refuse_url(str(spec.get("storage")), "storage")
    elif not isinstance(spec, str):
        raise SpecError(f"spec is {spec!r:.60}; give the path of a file, block:NAME of a saved spec, or a spec's keys")
    elif not spec.strip():
        raise SpecError("spec is empty; name a file, or block:NAME of a saved spec")
    for override in form.overrides or ():
        key, _, value = override.partition("=")
        section, _, rest = key.strip().partition(".")
        if section == "database":
            _refuse_secrets(None, value.strip().strip("'\""))
        if section == "storage_options" and (re.search(_SECRET, rest) or re.search(r"(?i)secret|passw|token", value)):
            raise SpecError(f"the override {key.strip()} holds a credential; {SAVE_STORAGE}")
    return form


def _plain(parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return parameters with a path as text."""
    given = dict(parameters)
    if isinstance(given.get(name), Path):
        given[name] = str(given[name])
    return given


Form = TypeVar("Form", bound=_Form)


def _checked(kind: type[Form], parameters: Mapping[str, Any]) -> Form:
    try:
        return kind.model_validate(dict(parameters))
    except ValidationError as error:
        raise SpecError(one_line(explain(error, kind, source="parameters"))) from None


def secret_in(options: object) -> str | None:
    """Return the name of the first option that is a credential by its name, or None."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            if isinstance(name, str) and re.search(_SECRET, name) and value not in (None, "", {}):
                return name
            if (found := secret_in(value)) is not None:
                return f"{name}.{found}"
    elif isinstance(options, Sequence) and not isinstance(options, str):
        for value in options:
            if (found := secret_in(value)) is not None:
                return found
    return None


def _refuse_secrets(options: Mapping[str, Any] | None, database: str | None) -> None:
    if (found := secret_in(options)) is not None:
        raise SpecError(f"storage_options holds the credential {found!r}; {SAVE_STORAGE}")
    if database is not None and not is_reference(database):
        from holdfast.storage.database.engine import parse_url, shown

        parse_url(database)  # what is no URL is refused here, too
        if shown(database) != database:
            raise SpecError(f"database holds a password; {SAVE_DATABASE}, or leave the password to HOLDFAST_DATABASE_URL")


def _refuse_url(location: str, name: str) -> None:
    try:
        authority = urlsplit(location).netloc if "://" in location else ""
    except ValueError:
        authority = ""
    if "@" in authority:
        raise SpecError(f"{name} holds credentials in its URL; {SAVE_STORAGE}")


def one_line(text: str) -> str:
    """Return what may be several lines as one sentence."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
