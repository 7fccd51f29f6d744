"""What a receiver is configured to do: roots, hooks, limits. Read from YAML; every error says file, line, key and remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from holdfast.core.errors import SpecError
from holdfast.core.space import Section, Whole
from holdfast.core.spec import explain
from holdfast.deployments.webhook.places import BLOCK, is_block
from holdfast.deployments.webhook.templates import Template
from holdfast.flows.naming import RESTORE, SEARCH
from holdfast.specfile import mapping_in
from holdfast.storage.database.engine import parse_url
from holdfast.storage.root import absolute, is_url

Seconds = Annotated[float, Field(gt=0, le=366 * 86400, allow_inf_nan=False)]

BUDGETS = ("search.num_trials", "search.time_budget", "search.max_cost")
"""What a delivery may change of an experiment, where its hook lets it."""

OVERRIDES = (*BUDGETS, "search.seed", "search.max_concurrent", "search.target", "name", "description", "if_exists")
"""What a delivery may set of a spec, where its hook lets it: nothing that names code or a place."""

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CREDENTIAL = re.compile(r"(?i)secret|password|passwd|token|key|credential|sas|auth")


class Secret(Section):
    """Where a secret is: exactly one of an environment variable, a file, and a Secret block of Prefect."""

    env: str | None = Field(default=None, description="an environment variable")
    file: str | None = Field(default=None, description="a file that holds nothing else; one line break at its end is left out")
    block: str | None = Field(default=None, description="the name of a Secret block of Prefect")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, str):
            # What stands here most likely is the secret: it must not be shown.
            raise ValueError(
                "a secret is never written into the configuration, which is copied, committed and shown; say where it is: "
                "{env: NAME}, {file: /path} or {block: NAME}"
            )
        if isinstance(data, Mapping) and any(not isinstance(value, str | None) for value in data.values()):
            raise ValueError("env, file and block are names, in quotes if they are numbers")
        return data

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(given is not None for given in (self.env, self.file, self.block)) != 1:
            raise ValueError("say where the secret is, once: {env: NAME}, {file: /path} or {block: NAME}")
        if self.env is not None and not _VARIABLE.fullmatch(self.env):
            raise ValueError("env is no name of an environment variable (letters, digits and _); the value belongs into it")
        if self.block is not None and not is_block(BLOCK + self.block):
            raise ValueError("block is no name of a block (small letters, digits and dashes)")
        return self

    @property
    def source(self) -> str:
        """Where it is, in words."""
        if self.env is not None:
            return f"environment variable {self.env}"
        return f"file {self.file}" if self.file is not None else f"Secret block {self.block}"


class Root(Section):
    """A place whose experiments may be restored."""

    location: str = Field(min_length=1, description="a folder, an object store's URL, or block:NAME of a HoldfastStorage")
    database: str | None = Field(default=None, repr=False, description="as for holdfast restore --database; no password")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="such as endpoint_url; no credentials"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"location": data} if isinstance(data, str) else data

    @field_validator("location")
    @classmethod
    def _place(cls, location: str) -> str:
        if location.startswith(BLOCK):
            if not is_block(location):
                raise ValueError("a block is named block:NAME, of small letters, digits and dashes")
            return location
        if is_url(location):
            parts = urlsplit(location)
            if "@" in parts.netloc or parts.query or parts.fragment or "::" in location or ".." in location.split("/"):
                raise ValueError("a URL of a root has no credentials, no ?, # or ::, and no ..")
        return absolute(location)

    @field_validator("database")
    @classmethod
    def _no_password(cls, database: str | None) -> str | None:
        if database is not None and not database.startswith(BLOCK) and parse_url(database).password is not None:
            raise ValueError("a password is never written into the configuration; leave it to HOLDFAST_DATABASE_URL or a block")
        return database

    @field_validator("storage_options")
    @classmethod
    def _no_credentials(cls, options: dict[str, Any]) -> dict[str, Any]:
        bad = sorted(key for key in _keys(options) if _CREDENTIAL.search(key))
        if bad:
            raise ValueError(
                f"{', '.join(bad)}: credentials are never written into the configuration; leave them to the environment, such "
                "as AWS_SECRET_ACCESS_KEY, or to a block"
            )
        return options


def _keys(data: Any) -> list[str]:
    if isinstance(data, Mapping):
        return [*map(str, data), *(key for value in data.values() for key in _keys(value))]
    return []


def _one_or_more(given: Any) -> Any:
    return [given] if isinstance(given, str | Mapping) else given


def _listed(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


Many = BeforeValidator(lambda given: _listed(_one_or_more(given)))


class Allowed(Section):
    """What a delivery of a hook may ask for beside the experiment and how its trials are resumed."""

    force: bool = Field(default=False, description="take over from a process that drives the experiment and seems alive")
    new_trials: bool = Field(default=True, description="say whether new trials are proposed")
    changes: dict[str, float] = Field(
        default_factory=dict, description=f"budgets that it may change, and the most that it may set: {', '.join(BUDGETS)}"
    )
    overrides: Annotated[tuple[str, ...], Many] = Field(
        default=(), description=f"keys of a spec that it may set: {', '.join(OVERRIDES)}"
    )

    @field_validator("changes")
    @classmethod
    def _budgets(cls, changes: dict[str, float]) -> dict[str, float]:
        for key, most in changes.items():
            if key not in BUDGETS:
                raise ValueError(f"{key} cannot be allowed; allowed: {', '.join(BUDGETS)}")
            if not most > 0:
                raise ValueError(f"{key} needs the most that may be set, a number above 0")
        return changes

    @field_validator("overrides")
    @classmethod
    def _safe(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        bad = [key for key in overrides if key not in OVERRIDES]
        if bad:
            raise ValueError(
                f"{', '.join(bad)} cannot be allowed: it may name code or a place; allowed: {', '.join(OVERRIDES)}"
            )
        return overrides


class Hook(Section):
    """What happens when something is delivered to ``/hooks/NAME``."""

    signature: Literal["standard", "github"] = Field(description="how deliveries are signed")
    secrets: Annotated[tuple[Secret, ...], Many] = Field(
        description="where the secrets are; several, up to 5, while a sender changes its own"
    )
    tolerance: Seconds = Field(default=300.0, description="how far a timestamp may be off, in seconds (standard alone has one)")
    runs: Literal["restore", "search"] = Field(default="restore", description="what is started")
    deployment: str | None = Field(default=None, description=f"FLOW/DEPLOYMENT; {RESTORE} or {SEARCH} unless it is given")
    allow: Allowed = Allowed()
    when: str | None = Field(default=None, description="a template that says true or false; false: the delivery is ignored")
    parameters: dict[str, str | bool | int | float] | None = Field(
        default=None, description="a template for each parameter; without it the body itself has to name them"
    )
    defaults: dict[str, Any] = Field(
        default_factory=dict, description="parameters that stand unless the delivery says otherwise"
    )

    @field_validator("deployment")
    @classmethod
    def _two_parts(cls, deployment: str | None) -> str | None:
        if deployment is not None and not re.fullmatch(r"[^/]+/[^/]+", deployment):
            raise ValueError("a deployment is named FLOW/DEPLOYMENT, such as restore/restore")
        return deployment

    @model_validator(mode="after")
    def _whole(self) -> Self:
        from holdfast.deployments.webhook.requests import names_of

        if not 1 <= len(self.secrets) <= 5:
            raise ValueError("secrets needs 1 to 5 places of secrets, such as {env: NAME}")
        known = names_of(self)
        for section in ("parameters", "defaults"):
            bad = [key for key in getattr(self, section) or {} if key not in known]
            if bad:
                raise ValueError(f"{section}.{bad[0]} is no parameter of this hook; allowed: {', '.join(known)}")
        if self.runs == "search" and (self.allow.changes or self.allow.force):
            raise ValueError("allow.changes and allow.force are of restores; a search has allow.overrides")
        if self.runs == "restore" and self.allow.overrides:
            raise ValueError("allow.overrides is of searches; a restore has allow.changes")
        for key, text in self.templates():
            Template(text, key)
        return self

    def templates(self) -> list[tuple[str, str]]:
        """Return the templates, by their keys."""
        found = [] if self.when is None else [("when", self.when)]
        return [*found, *((f"parameters.{key}", str(text)) for key, text in (self.parameters or {}).items())]

    @property
    def target(self) -> str:
        """The deployment that is run."""
        return self.deployment or (RESTORE if self.runs == "restore" else SEARCH)


def _http_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a hook's name has 1 to 64 small letters, digits, - and _, and begins and ends with a letter or digit")
    return name


class Rate(Section):
    """How often something may happen."""

    times: Whole = Field(ge=1, le=10**9, description="in bursts as large")
    seconds: Seconds = Field(default=60.0, description="within which")


class Limits(Section):
    """What is taken at most."""

    body: Whole = Field(default=1 << 20, ge=1, le=64 << 20, description="bytes of a body")
    depth: Whole = Field(default=32, ge=1, le=200, description="levels of a body's JSON")
    body_seconds: Seconds = Field(default=10.0, description="for a body to come in")
    header_seconds: Seconds = Field(default=10.0, description="for the headers to come in (holdfast webhook)")
    connections: Whole = Field(default=500, ge=1, description="at once (holdfast webhook)")
    per_client: Rate = Field(default=Rate(times=120), description="calls of one address")
    per_hook: Rate = Field(default=Rate(times=60), description="deliveries to one hook whose signature is right")


class Memory(Section):
    """How deliveries are remembered, so that none counts twice."""

    database: str | None = Field(
        default=None, repr=False, description="URL; null: webhook.db in the user's data folder. Several receivers may share one"
    )
    retention: Seconds = Field(default=7 * 86400.0, description="seconds that a delivery is remembered")
    most: Whole = Field(
        default=100_000, ge=1, description="deliveries; a full store takes no more until old ones are forgotten"
    )

    _no_password = field_validator("database")(Root._no_password.__func__)  # type: ignore[attr-defined]


class WebhookConfig(Section):
    """A receiver: ``holdfast webhook CONFIG.yaml``."""

    roots: Annotated[tuple[Root, ...], Many] = Field(
        default=(), description="where experiments may be restored; a name is looked for in this order"
    )
    specs: Annotated[tuple[str, ...], Many] = Field(
        default=(), description="folders whose spec files may be searched by, block:NAME, or block:* for every saved spec"
    )
    hooks: dict[Annotated[str, AfterValidator(_http_name)], Hook] = Field(min_length=1, description="by name: /hooks/NAME")
    memory: Memory = Memory()
    limits: Limits = Limits()
    prefect_seconds: Seconds = Field(default=10.0, le=60, description="for one answer of Prefect's API")
    trusted_proxies: Annotated[tuple[str, ...], Many] = Field(
        default=(), description="addresses whose X-Forwarded-For is believed (holdfast webhook)"
    )

    @field_validator("specs")
    @classmethod
    def _places(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        for spec in specs:
            if spec.startswith(BLOCK) and spec != BLOCK + "*" and not is_block(spec):
                raise ValueError(f"{spec!r} is neither block:NAME nor block:*")
            if is_url(spec):
                raise ValueError("spec files lie in folders of this host; save those of an object store as blocks")
        return tuple(spec if spec.startswith(BLOCK) else os.path.abspath(spec) for spec in specs)

    @model_validator(mode="after")
    def _something(self) -> Self:
        kinds = {hook.runs for hook in self.hooks.values()}
        if "restore" in kinds and not self.roots:
            raise ValueError("roots is missing: say below which folders or URLs experiments may be restored")
        if "search" in kinds and not self.specs:
            raise ValueError("specs is missing: say which spec files or saved specs may be searched by")
        # A timestamp may be early or late by the tolerance: for so long a delivery can be sent again.
        least = 2 * max((hook.tolerance for hook in self.hooks.values() if hook.signature == "standard"), default=0.0)
        if self.memory.retention < least:
            raise ValueError(
                f"memory.retention is {self.memory.retention:g} s, but a delivery counts for up to {least:g} s, twice the "
                "tolerance of its hook: what is forgotten before could be sent again; remember it for longer"
            )
        return self

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a configuration; what is relative in it is taken from its folder. SpecError for what cannot be used."""
        data, locate = mapping_in(path)
        _make_absolute(data, Path(os.path.abspath(path)).parent)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError(explain(error, cls, source=locate)) from None


def _make_absolute(data: dict[str, Any], folder: Path) -> None:
    def place(given: Any) -> Any:
        if isinstance(given, str) and given.strip() and not is_url(given) and not given.startswith(BLOCK):
            return os.path.normpath(folder / os.path.expanduser(given))
        return given

    roots, specs, hooks = data.get("roots"), data.get("specs"), data.get("hooks")
    if roots is not None:
        several = roots if isinstance(roots, list) else [roots]
        data["roots"] = [
            {**one, "location": place(one.get("location"))} if isinstance(one, dict) else place(one) for one in several
        ]
    if specs is not None:
        data["specs"] = [place(one) for one in (specs if isinstance(specs, list) else [specs])]
    for hook in hooks.values() if isinstance(hooks, dict) else ():
        secrets = hook.get("secrets") if isinstance(hook, dict) else None
        for secret in secrets if isinstance(secrets, list) else [secrets]:
            if isinstance(secret, dict) and "file" in secret:
                secret["file"] = place(secret["file"])
