"""Whether this process can run trials of an experiment: every reason why it cannot, in words."""

from __future__ import annotations

import platform
import socket
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import urlsplit

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from holdfast.core.errors import HoldfastError, MissingLibrary, SpecError
from holdfast.settings import settings
from holdfast.storage.database import experiments
from holdfast.storage.database.engine import connect, shown
from holdfast.storage.database.experiments import open_database
from holdfast.storage.folder import Folder
from holdfast.storage.root import is_url
from holdfast.tasks.place import Place
from holdfast.tasks.workers.processes import same_host

_PACKAGES = ("holdfast", "prefect", "sqlalchemy", "cloudpickle")
_MUST_AGREE = ("holdfast", "prefect")
_API_SECONDS = 10.0


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a worker shares with its driver, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def probe(place: Place) -> list[str]:
    """Return why this process cannot run trials of ``place``: what was found, what is needed, what to do. None: it can."""
    found = [*_versions(place), *_database(place), *_path(place), *_api()]
    return [" ".join(reason.split()) for reason in found]  # what libraries say may have several lines


def folder_of(place: Place) -> Folder:
    """Return the experiment's folder, without a local folder to work in."""
    return Folder.at(place.location, options=options_of(place))


def options_of(place: Place) -> dict[str, object] | None:
    """Return the options of the experiment's object store: the driver's, else what this process's environment says."""
    return dict(place.options) or (settings().storage_options if is_url(place.location) else None)


def _versions(place: Place) -> list[str]:
    here = versions()
    found: list[str] = []
    theirs = place.versions.get("python")
    if theirs is not None and theirs.split(".")[:2] != here["python"].split(".")[:2]:
        found.append(
            f"Python is {here['python']} here and {theirs} at the driver, which must agree in their first two numbers; "
            "start workers with the driver's Python"
        )
    return found + [
        f"{name} is {here[name]} here and {place.versions[name]} at the driver, which must be the same; "
        f"install {name}=={place.versions[name]} here"
        for name in _MUST_AGREE
        if name in place.versions and place.versions[name] != here[name]
    ]


def _database(place: Place) -> list[str]:
    label = shown(place.database)
    try:
        with closing(connect(place.database, readonly=True)) as looked:
            local = looked.file is not None
        if local and place.host != same_host():
            return [
                f"database {label} is a SQLite file, which is good on the driver's own host only, and this is "
                f"{socket.gethostname()}; set database to a PostgreSQL URL"
            ]
        with closing(open_database(place.database)) as database:
            record = experiments.by_uuid(database, place.uuid)
    except SpecError as error:
        return [str(error)]
    except (HoldfastError, OSError) as error:
        return [f"database {label} cannot be used from {socket.gethostname()}: {error}; let workers reach it"]
    if record is None or record.id != place.experiment:
        return [f"database {label} does not have the experiment {place.name!r} of the driver; name the driver's database"]
    return []


def _path(place: Place) -> list[str]:
    if not is_url(place.location) and place.host != same_host():
        return [
            f"the path {place.location} is a folder, which is good on the driver's own host only, and this is "
            f"{socket.gethostname()}; set storage to an object store"
        ]
    try:
        folder = folder_of(place)
        identity = folder.identity()
        if identity.uuid != place.uuid:
            return [
                f"{place.location} holds another experiment here (UUID {identity.uuid}) than at the driver ({place.uuid}); "
                "let storage mean the same place on every host"
            ]
        folder.write_probe()
    except SpecError as error:
        return [str(error)]
    except MissingLibrary as error:
        return [f"the path {place.location}: {error}"]
    except (HoldfastError, OSError, ImportError) as error:
        return [f"the path {place.location} cannot be used from {socket.gethostname()}: {error}; let workers read and write it"]
    return []


def _api() -> list[str]:
    """Look for Prefect's API as this process is configured; without one, Prefect makes one in the process itself."""
    url = PREFECT_API_URL.value()
    if not url:
        return []
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings={"timeout": _API_SECONDS}) as client,
    ):
        error = client.api_healthcheck()
    if error is None:
        return []
    return [
        f"Prefect's API {_without_user(url)} cannot be reached from {socket.gethostname()} ({type(error).__name__}); "
        "set PREFECT_API_URL to an address that workers reach, and what it asks for"
    ]


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
