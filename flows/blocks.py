"""Prefect blocks that experiments are told of by name: storages, databases, saved specs; ``block:NAME`` refers to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import httpx
from prefect.blocks.core import Block
from prefect.client.schemas.objects import BlockDocument
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.types import SecretDict
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from holdfast.core.errors import EngineError, SpecError
from holdfast.flows.forms import one_line, secret_in
from holdfast.flows.prefect_runs import impatient_client
from holdfast.flows.serving import left_running
from holdfast.flows.watched_runs import has_api
from holdfast.references import PREFIX, Saved, is_reference
from holdfast.specfile import ExperimentSpec
from holdfast.storage.database.engine import parse_url, shown, with_password
from holdfast.storage.root import is_url

Kind = TypeVar("Kind", bound=Block)
_S3 = ("s3", "s3a")


class HoldfastStorage(Block):
    """Where experiments live: a folder, or a prefix of an object store with what it takes to reach it."""

    _block_type_name: ClassVar[str | None] = "Holdfast Storage"
    _block_type_slug: ClassVar[str | None] = "holdfast-storage"
    _description: ClassVar[str | None] = (
        "Where experiments live: a folder, or a prefix of an object store with its credentials. A spec names it as "
        "storage: block:NAME, and block:NAME/EXPERIMENT is an experiment in it."
    )
    _code_example: ClassVar[str | None] = """
```python
from holdfast.flows.blocks import HoldfastStorage

HoldfastStorage(location="s3://bucket/experiments", endpoint="https://s3.example.org", key="...", secret="...").save("lab")
```
then `storage: block:lab` in a spec, and `holdfast restore block:lab/digits`.
"""

    location: str = Field(
        title="Location",
        description="A folder by its absolute path, which is the same wherever experiments run, or s3://bucket/prefix.",
        examples=["s3://bucket/experiments", "/data/experiments"],
    )
    endpoint: str | None = Field(
        default=None, title="Endpoint", description="URL of the object store's service, if it is not the provider's own."
    )
    region: str | None = Field(default=None, title="Region", description="Of S3, such as eu-central-1.")
    key: SecretStr | None = Field(default=None, title="Access key", description="Of S3; else what the environment says.")
    secret: SecretStr | None = Field(default=None, title="Secret key", description="Of S3.")
    token: SecretStr | None = Field(default=None, title="Token", description="Of a session on S3, or of Google's storage.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        title="Further options",
        description='What else fsspec takes for such a store, as {"anon": true}. No credentials: everybody sees them.',
    )
    secret_options: SecretDict | None = Field(
        default=None,
        title="Further secret options",
        description='Options that nobody may see, such as {"account_key": "..."} of Azure.',
    )

    @field_validator("location")
    @classmethod
    def _some_place(cls, location: str) -> str:
        location = location.strip()
        if is_reference(location):
            raise ValueError(f"{location!r} refers to a block; name the folder or the URL itself")
        if not is_url(location) and not os.path.isabs(location):
            raise ValueError(
                f"{location!r} is neither an absolute path, such as /data/experiments, nor a URL such as s3://bucket"
            )
        if is_url(location) and "@" in location.partition("://")[2].partition("/")[0]:
            raise ValueError("a URL holds no credentials; write them into key, secret, token or secret_options")
        return location

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        if (found := secret_in(options)) is not None:
            raise ValueError(
                f"options holds {found!r}, which everybody would see; write it into secret_options, or its own field"
            )
        return options

    @model_validator(mode="after")
    def _fits(self) -> Self:
        kind = self.location.partition("://")[0] if is_url(self.location) else None
        own = ("endpoint", "region", "key", "secret", "token", "options", "secret_options")
        given = [name for name in own if getattr(self, name)]
        if kind is None and given:
            raise ValueError(f"{', '.join(given)} is for object stores, and {self.location} is a folder; leave it out")
        if kind is not None and kind not in _S3 and (given := [name for name in ("region", "key", "secret") if name in given]):
            raise ValueError(f"{', '.join(given)} is for s3://; write what {kind}:// takes into options and secret_options")
        return self

    def storage_options(self) -> dict[str, Any]:
        """Return the options of the storage as a spec would have them, credentials included: they stay in memory."""
        found: dict[str, Any] = {**self.options}
        if self.secret_options is not None:
            found |= self.secret_options.get_secret_value()
        if self.endpoint:
            found["endpoint_url"] = self.endpoint
        if self.region:
            found["client_kwargs"] = {**found.get("client_kwargs", {}), "region_name": self.region}
        for name in ("key", "secret", "token"):
            if (value := getattr(self, name)) is not None and value.get_secret_value():
                found[name] = value.get_secret_value()
        return found


class HoldfastDatabase(Block):
    """A database of experiments."""

    _block_type_name: ClassVar[str | None] = "Holdfast Database"
    _block_type_slug: ClassVar[str | None] = "holdfast-database"
    _description: ClassVar[str | None] = (
        "A database of experiments, such as PostgreSQL, with its password. A spec names it as database: block:NAME, as does "
        "--database block:NAME."
    )
    _code_example: ClassVar[str | None] = """
```python
from holdfast.flows.blocks import HoldfastDatabase

HoldfastDatabase(url="postgresql+psycopg://holdfast@db.example.org/holdfast", password="...").save("main")
```
then `database: block:main` in a spec, or `--database block:main`.
"""

    url: str = Field(
        title="URL",
        description="SQLAlchemy URL without the password.",
        examples=["postgresql+psycopg://user@host/name", "sqlite:////data/holdfast.db"],
    )
    password: SecretStr | None = Field(default=None, title="Password", description="Of the URL's user.")

    @field_validator("url")
    @classmethod
    def _a_url(cls, url: str) -> str:
        url = url.strip()
        if is_reference(url):
            raise ValueError(f"{url!r} refers to a block; write the database's own URL")
        parsed = parse_url(url)
        if parsed.password is not None or shown(url) != url:
            raise ValueError("the URL holds a password, which everybody would see; write it into password")
        if parsed.get_backend_name() == "sqlite" and not os.path.isabs(parsed.database or ""):
            raise ValueError("a SQLite file needs its absolute path, with four slashes: sqlite:////data/holdfast.db")
        return url

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.password is not None and self.password.get_secret_value():
            parsed = parse_url(self.url)
            if parsed.get_backend_name() == "sqlite":
                raise ValueError("SQLite has no passwords; leave password out")
            if not parsed.username:
                raise ValueError("the URL names no user whose password this is; write postgresql+psycopg://user@host/name")
        return self

    def full_url(self) -> str:
        """Return the URL with its password: it stays in memory."""
        secret = None if self.password is None else self.password.get_secret_value()
        return with_password(self.url, secret) if secret else self.url


class HoldfastSpec(Block):
    """A saved spec."""

    _block_type_name: ClassVar[str | None] = "Holdfast Spec"
    _block_type_slug: ClassVar[str | None] = "holdfast-spec"
    _description: ClassVar[str | None] = (
        "A spec of a search, checked and saved under a name: run it as block:NAME, with overrides such as search.num_trials=50."
    )
    _code_example: ClassVar[str | None] = """
```python
from holdfast.flows.blocks import HoldfastSpec

HoldfastSpec.from_file("digits.yaml").save("digits")
```
then `holdfast run block:digits --set search.num_trials=50`, or `block:digits` as the spec of the deployment search/search.
"""

    spec: dict[str, Any] = Field(title="Spec", description="The keys of a spec's file, with absolute paths.")
    workdir: str | None = Field(
        default=None,
        title="Working folder",
        description="The absolute path of the folder that the trainable is imported from; empty: where the search runs.",
    )

    @field_validator("spec")
    @classmethod
    def _a_spec(cls, spec: dict[str, Any]) -> dict[str, Any]:
        checked = ExperimentSpec.parse(spec)
        if (found := secret_in(checked.storage_options)) is not None:
            raise ValueError(f"storage_options holds {found!r}, which everybody would see; save it in a block {_STORAGE}")
        if checked.database is not None and not is_reference(checked.database) and shown(checked.database) != checked.database:
            raise ValueError(f"database holds a password, which everybody would see; save it in a block {_DATABASE}")
        return spec

    @field_validator("workdir")
    @classmethod
    def _absolute(cls, workdir: str | None) -> str | None:
        if workdir and not os.path.isabs(workdir):
            raise ValueError(f"{workdir!r} is no absolute path")
        return workdir or None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Return a block with the spec of a YAML file, its relative paths made absolute; SpecError as for the file."""
        checked = ExperimentSpec.from_file(path)
        data = {**checked.model_dump(mode="json", exclude_unset=True), "storage": checked.storage}
        try:
            return cls(spec=data, workdir=str(Path(path).absolute().parent))
        except ValidationError as error:
            raise SpecError(f"{path}: {_reasons(error)}") from None


_STORAGE, _DATABASE, _SPEC = HoldfastStorage.__name__, HoldfastDatabase.__name__, HoldfastSpec.__name__
BLOCKS: tuple[type[Block], ...] = (HoldfastStorage, HoldfastDatabase, HoldfastSpec)
"""What is registered with a server before it can be saved in its UI."""


def register() -> None:
    """Make the types of blocks known to the server, or bring them up to date there."""
    for kind in BLOCKS:
        kind.register_type_and_schema()


class Lookup:
    """Looks blocks up on the server that Prefect's settings name, else on that of ``holdfast up``."""

    def storage(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return the location of a storage, and its options, credentials included."""
        block = _made(HoldfastStorage, name, _data(HoldfastStorage, name))
        return block.location, block.storage_options()

    def database(self, name: str) -> str:
        """Return the URL of a database, with its password."""
        return _made(HoldfastDatabase, name, _data(HoldfastDatabase, name)).full_url()

    def spec(self, name: str) -> Saved:
        """Return a saved spec."""
        block = _made(HoldfastSpec, name, _data(HoldfastSpec, name))
        return Saved(data=block.spec, workdir=block.workdir)


def _made(kind: type[Kind], name: str, data: Mapping[str, Any]) -> Kind:
    """Return the block; the server has not checked more than the shape of what somebody saved in its UI."""
    try:
        return kind(**data)
    except ValidationError as error:
        raise SpecError(f"{PREFIX}{name}: {_reasons(error)}; edit the block {kind.__name__} {name!r} in Prefect") from None


def _reasons(error: ValidationError) -> str:
    """Return what is wrong, without what was given: that may be a secret."""
    found = error.errors(include_url=False, include_input=False)
    words = [
        f"{'.'.join(map(str, one['loc']))}{': ' if one['loc'] else ''}{one['msg'].removeprefix('Value error, ')}"
        for one in found
    ]
    return one_line("\n".join(words))


def _data(kind: type[Block], name: str) -> dict[str, Any]:
    """Return what is saved under a name; SpecError when there is no such block, EngineError when no API says so."""
    reference = f"{PREFIX}{name}"
    try:
        with _api(reference), impatient_client() as client:
            try:
                return dict(client.read_block_document_by_name(name, kind.get_block_type_slug()).data)
            except ObjectNotFound:
                saved = {other: _names(client, other) for other in BLOCKS}
    except (httpx.HTTPError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise EngineError(
            f"{reference} cannot be looked up: Prefect's API at {_without_user(str(PREFECT_API_URL.value()))} does not answer "
            f"({type(error).__name__}); look after the server, then try again"
        ) from None
    others = [other.__name__ for other, names in saved.items() if name in names]
    known = ", ".join(f"{PREFIX}{one}" for one in saved[kind]) or "none"
    there = f"is a {others[0]}, and a {kind.__name__} is needed here" if others else f"names no block {kind.__name__}"
    raise SpecError(f"{reference} {there}; saved ones: {known}; save it in Prefect under Blocks, or from Python")


@contextmanager
def _api(reference: str) -> Iterator[None]:
    """Let the body ask the API that Prefect's settings name, else the server that ``holdfast up`` left running."""
    if has_api():
        yield
        return
    found = left_running()
    if found is None:
        raise EngineError(
            f"{reference} cannot be looked up: Prefect's settings name no API; set PREFECT_API_URL to that of the server "
            "that has the block, start `holdfast up`, or name the folder or the URL itself"
        )
    with temporary_settings({PREFECT_API_URL: found.url}):
        yield


def _without_user(url: str) -> str:
    scheme, between, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{between}{authority.rpartition('@')[2]}{slash}{path}"


def _names(client: Any, kind: type[Block]) -> list[str]:
    try:
        found: list[BlockDocument] = client.read_block_documents_by_type(kind.get_block_type_slug(), include_secrets=False)
    except ObjectNotFound:
        return []
    except PrefectHTTPStatusError as error:
        if error.response.status_code == 404:  # the type is not registered here
            return []
        raise
    return [document.name for document in found if document.name]
