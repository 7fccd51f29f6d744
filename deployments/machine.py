"""What the parts of ``holdfast up`` are given: addresses, a socket, a database, the environment."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.core.errors import Contention, InvalidInput, StorageError
from holdfast.deployments.catalogue import STORAGES, local_folders
from holdfast.flows.server import template_file
from holdfast.flows.serving import read
from holdfast.settings import environment, settings
from holdfast.storage.atomic import make_folder

SERVER_DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    # Searches on a schedule leave runs for years; what counts is in holdfast's database. Ended runs go after 90 days.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
}
WORKER_DEFAULTS = {
    "PREFECT_WORKER_QUERY_SECONDS": "2",  # the server is this machine's own, and asked by nobody else
}
"""Used where neither the environment nor Prefect's profile says something else."""


@dataclass(frozen=True)
class Up:
    """What ``holdfast up`` is asked for."""

    storages: tuple[str, ...] = ()
    """where experiments are looked after; what `holdfast deploy` takes for none"""
    database: str | None = None
    host: str = "127.0.0.1"
    port: int = 4200
    """0: any that is free"""
    webhook: Path | None = None
    webhook_port: int = 4280
    worker: bool = True
    automations: bool = True


@dataclass(frozen=True)
class Addresses:
    """Where the server listens, and how it is reached."""

    host: str
    port: int

    @property
    def is_private(self) -> bool:
        """Whether this machine alone can reach it."""
        if self.host == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False

    @property
    def origin(self) -> str:
        """Where processes of this machine reach it."""
        return f"http://{_in_url(_here(self.host))}:{self.port}"

    @property
    def shown(self) -> str:
        """Where browsers reach it."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{_in_url(host)}:{self.port}"


def _here(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class PrefectSettings:
    """What Prefect's own settings say: its environment variables, its profile, its files."""

    database: str | None
    """how the database that they name may be shown, or None"""
    password: str | None
    """what the server asks for"""
    client_password: str | None
    api: str | None
    ui_api: str | None
    given: frozenset[str]
    """the settings of our tables of defaults that they name"""

    @classmethod
    def read(cls) -> PrefectSettings:
        """Read them; imports a part of Prefect."""
        from prefect.settings import get_current_settings

        from holdfast.storage.database.engine import shown

        now = get_current_settings()
        server = now.server
        named = "connection_url" in server.database.model_fields_set or server.database.driver is not None
        url = server.database.connection_url
        given = now.to_environment_variables(exclude_unset=True)
        return cls(
            database=shown(url.get_secret_value()) if named and url is not None else None,
            password=server.api.auth_string.get_secret_value() if server.api.auth_string else None,
            client_password=now.api.auth_string.get_secret_value() if now.api.auth_string else None,
            api=now.api.url,
            ui_api=server.ui.api_url if "api_url" in server.ui.model_fields_set else None,
            given=frozenset(given) & {*SERVER_DEFAULTS, *WORKER_DEFAULTS},
        )


def folder() -> Path:
    """Return where `holdfast up` keeps its database and its logs."""
    return settings().data_folder / "up"


def check(wanted: Up, prefect: PrefectSettings) -> None:
    """Raise InvalidInput for what cannot be started as asked."""
    local_folders(wanted.storages or STORAGES, os.getcwd())
    if wanted.webhook is not None and not wanted.webhook.is_file():
        raise InvalidInput(f"--webhook is {str(wanted.webhook)!r}, and there is no such file; name a YAML file")
    if wanted.webhook is not None and wanted.webhook_port == wanted.port:
        raise InvalidInput(f"--port and --webhook-port are both {wanted.port}; name two ports")
    if not Addresses(wanted.host, wanted.port).is_private and prefect.password is None:
        raise InvalidInput(
            f"--host {wanted.host} lets everybody who reaches this machine start programs on it: Prefect's server asks for no "
            "password; set PREFECT_SERVER_API_AUTH_STRING=USER:PASSWORD, or keep to --host 127.0.0.1 behind a proxy that asks"
        )


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let one `holdfast up` of a data folder run at a time; Contention says where the other one is."""
    try:
        make_folder(folder())
        opened = (folder() / "lock").open("ab")
    except OSError as error:
        raise StorageError(
            f"the data folder {settings().data_folder} cannot be written ({error.strerror or error}); mend its permissions, or "
            "name another one by HOLDFAST_DATA_FOLDER"
        ) from None
    with opened as lock:  # given back when this process ends, however it does
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            found = read()
            where = f"process {found.pid} of {found.hostname}; its UI is at {found.ui}" if found else "it is just starting"
            raise Contention(
                f"`holdfast up` runs already ({where}); end that one by Ctrl-C or SIGTERM, "
                f"or give this one a data folder of its own: HOLDFAST_DATA_FOLDER (now {settings().data_folder})"
            ) from None
        yield


def listening(host: str, port: int, option: str) -> socket.socket:
    """Return a socket that listens; InvalidInput when the port is in use, or the host is none of ours."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise InvalidInput(f"--host {host}: {error}; name an address of this machine, such as 127.0.0.1") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(256)
    except (OSError, OverflowError) as error:
        listener.close()
        words = getattr(error, "strerror", None) or error
        raise InvalidInput(
            f"{option} {port} of {host} cannot be used ({words}); end what uses it, or name another one by {option}"
        ) from None
    return listener


@dataclass(frozen=True)
class ServerDatabase:
    """Where Prefect's server keeps what it knows."""

    label: str
    environment: dict[str, str]

    @classmethod
    def choose(cls, wanted: Up, prefect: PrefectSettings) -> ServerDatabase:
        """Return the one that Prefect's settings name, else one beside holdfast's on PostgreSQL, else a SQLite file.

        DatabaseError when a PostgreSQL server cannot be reached, or does not let us make a database.
        """
        if prefect.database is not None:
            return cls(prefect.database, {})
        url = wanted.database or settings().database_url
        if url is not None:
            from holdfast.storage.database.beside import database_beside, is_server

            if is_server(url):
                found = database_beside(url)
                made = {**found.environment, "PREFECT_SERVER_DATABASE_CONNECTION_URL": found.url}
                return cls(found.label, made)
        file = folder() / "prefect.db"
        _copy_template(file)
        return cls(str(file), {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{file}"})


def _copy_template(file: Path) -> None:
    """Let a new database start as a copy of one in which nothing ran yet: making the tables takes some seconds."""
    if file.exists() or not template_file().exists():
        return
    draft = file.with_suffix(".draft")
    with contextlib.suppress(OSError):
        shutil.copyfile(template_file(), draft)
        os.replace(draft, file)


@dataclass(frozen=True)
class Environments:
    """The environment of each part."""

    server: dict[str, str]
    others: dict[str, str]

    @classmethod
    def make(cls, wanted: Up, at: Addresses, prefect: PrefectSettings, database: ServerDatabase) -> Environments:
        """Return them; passwords are here, and on no command line."""
        url = f"{at.origin}/api"
        common = {"PREFECT_API_URL": url, "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}
        if prefect.password is not None and prefect.client_password is None:
            common["PREFECT_API_AUTH_STRING"] = prefect.password
        ui = prefect.ui_api or f"{at.shown}/api"
        server = {
            **{name: value for name, value in SERVER_DEFAULTS.items() if name not in prefect.given},
            "PREFECT_SERVER_UI_API_URL": ui,
            "PREFECT_UI_URL": at.shown,
            "PREFECT_SERVER_API_HOST": wanted.host,
            "PREFECT_SERVER_API_PORT": str(at.port),
            **database.environment,
        }
        others = {name: value for name, value in WORKER_DEFAULTS.items() if name not in prefect.given}
        if wanted.database is not None:
            others["HOLDFAST_DATABASE_URL"] = wanted.database
        return cls(_without_ours(environment(**common, **server)), _without_ours(environment(**common, **others)))


def _without_ours(variables: dict[str, str]) -> dict[str, str]:
    """Leave out what a flow run was told of itself, should `up` have been started by one."""
    return {name: value for name, value in variables.items() if not name.startswith("PREFECT__")}


def at_port(wanted: Up, listener: socket.socket) -> Addresses:
    """Return the addresses of a socket that listens, whose port may have been chosen by the system."""
    return Addresses(wanted.host, replace(wanted, port=int(listener.getsockname()[1])).port)
