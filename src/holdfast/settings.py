"""Settings from the environment: the only module that reads it."""

from __future__ import annotations

import os
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """``HOLDFAST_...`` variables; every field has a working default."""

    model_config = SettingsConfigDict(env_prefix="HOLDFAST_", extra="ignore")

    database_url: str | None = Field(default=None, description="database of whatever names none: a URL, or block:NAME")
    storage_options: dict[str, Any] | None = Field(
        default=None, repr=False, description="options of object stores where none are given, as JSON"
    )
    grace_seconds: float = Field(default=15.0, gt=0, description="seconds that running trials get to save after a signal")
    fault: str | None = Field(default=None, description="NAME or NAME:N: die by SIGKILL at the N-th pass of a crash point")
    cache_folder: Path = Field(
        default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast",
        description="what can be made again: copies of checkpoints, what is being uploaded, shipped code",
    )
    cache_bytes: int = Field(
        default=10 << 30,
        ge=0,
        description="what copies of checkpoints on object stores may take on a host, but for those in use; and as much again "
        "for shipped code",
    )
    data_folder: Path = Field(
        default_factory=lambda: Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "holdfast",
        description="databases of experiments on object stores that name none; what `holdfast up` keeps",
    )


@lru_cache(maxsize=1)
def settings() -> Settings:
    """Return the settings of this process, read once."""
    return Settings()


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a child process: ours with ``changes``."""
    return {**os.environ, **changes}


def variable(name: str) -> str | None:
    """Return an environment variable that a configuration names, such as one that holds a secret."""
    return os.environ.get(name)


def environment_of_a_restore(**changes: str) -> dict[str, str]:
    """Return the environment of a search that this process starts: without what Prefect tells this flow run of itself."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}, **changes}


def visible_gpus(*, needed: int) -> list[str]:
    """Return the devices that this process may use; SpecError when there are fewer than ``needed``."""
    from holdfast.core.errors import SpecError

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        found = [device for device in given.split(",") if device.strip()]
    else:
        root = Path("/proc/driver/nvidia/gpus")
        found = [str(index) for index, _ in enumerate(sorted(root.iterdir()))] if root.is_dir() else []
    if len(found) < needed:
        raise SpecError(
            f"execution.resources.gpu and search.max_concurrent need {needed} devices, {len(found)} are visible; "
            "lower one of them, or set CUDA_VISIBLE_DEVICES"
        )
    return found


def names_api() -> bool:
    """Guess, without importing Prefect, whether its settings name an API: by the environment, a profile, a project file."""
    return _is_named("api_url")


def names_password() -> bool:
    """Guess, as :func:`names_api` does, whether Prefect's settings hold what a protected API asks for."""
    return _is_named("api_auth_string")


def api_url() -> str | None:
    """Return the URL of Prefect's API where it can be read without importing Prefect: the environment, the active profile."""
    given = os.environ.get("PREFECT_API_URL")
    if given:
        return given
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    try:
        known = tomllib.loads(Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").read_text())
        found = known["profiles"][os.environ.get("PREFECT_PROFILE") or known["active"]]["PREFECT_API_URL"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def use_api(url: str) -> None:
    """Let Prefect, which is not imported yet, and what this process starts use an API."""
    os.environ["PREFECT_API_URL"] = url


def hush_ray() -> None:
    """Keep Ray, and what it starts, from sending usage statistics and from warning about it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _is_named(setting: str) -> bool:
    if os.environ.get(f"PREFECT_{setting.upper()}"):
        return True
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    candidates = (profiles, Path(".env"), Path("prefect.toml"), Path("pyproject.toml"))
    return any(setting in file.read_text(errors="replace").lower() for file in candidates if file.is_file())


def hush_prefect() -> None:
    """Keep Prefect's own log off the console (it still goes to the API); call it before Prefect is imported."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
