"""The Prefect server that ``holdfast up`` runs: where it says so, and whether it still does. Imports no Prefect."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from holdfast.holding import holder, liveness
from holdfast.settings import names_api, settings, use_api
from holdfast.storage.atomic import make_folder, write_file

HEALTH_SECONDS = 1.0
"""What a server of this host gets to say that it is well: a busy one takes some 100 ms."""


@dataclass(frozen=True)
class Serving:
    """What ``holdfast up`` says of itself."""

    url: str
    """of Prefect's API"""
    ui: str
    is_protected: bool
    """whether the API asks for a password (PREFECT_API_AUTH_STRING)"""
    logs: str
    process: Mapping[str, object]
    """which one it is; see :func:`holdfast.holding.holder`"""

    @classmethod
    def here(cls, url: str, ui: str, *, is_protected: bool, logs: Path) -> Serving:
        """Return what this process says."""
        return cls(url, ui, is_protected, str(logs), holder())

    @property
    def pid(self) -> int:
        return int(str(self.process.get("pid") or 0))

    @property
    def hostname(self) -> str:
        return str(self.process.get("hostname"))

    def is_alive(self) -> bool:
        """Tell whether its process runs on this host."""
        return liveness(self.process) is True

    def write(self) -> None:
        """Say it, durably."""
        make_folder(state_file().parent)
        write_file(state_file(), json.dumps(asdict(self), indent=2).encode())

    def withdraw(self) -> None:
        """Say it no longer, unless somebody else does by now."""
        if read() == self:
            state_file().unlink(missing_ok=True)


def state_file() -> Path:
    """Return where ``holdfast up`` says where its server is."""
    return settings().data_folder / "up.json"


def read() -> Serving | None:
    """Return what the state file says, true or not; None where there is none that can be read."""
    with suppress(OSError, ValueError, TypeError):
        data = json.loads(state_file().read_bytes())
        found = Serving(**data)
        if isinstance(found.process, Mapping) and isinstance(found.url, str) and found.url.startswith("http"):
            return found
    return None


def is_healthy(url: str, *, seconds: float = HEALTH_SECONDS) -> bool:
    """Tell whether a Prefect API answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this host's own
    with suppress(OSError, urllib.error.URLError, ValueError), opener.open(f"{url}/health", timeout=seconds) as answer:
        return bool(answer.status == 200)
    return False


def left_running() -> Serving | None:
    """Return the server that ``holdfast up`` runs on this host, if it answers: a dead one costs no request."""
    found = read()
    return found if found is not None and found.is_alive() and is_healthy(found.url) else None


def adopt() -> str | None:
    """Let this process use the server of ``holdfast up``, unless Prefect's settings name one; return its URL if so.

    To be called before Prefect is imported.
    """
    if names_api():
        return None
    found = left_running()
    if found is None:
        return None
    use_api(found.url)
    return found.url
