"""What ``search.options`` may hold for each of Optuna's engines, and what an engine needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.core.errors import SpecError


def check_options(engine: str, options: Mapping[str, Any]) -> None:
    """Check ``search.options``; SpecError when ``engine`` does not take them."""
    if options:
        raise SpecError(f"search.options.{next(iter(options))} is no option of the engine {engine}; its options: none")


def check_objectives(engine: str, count: int) -> None:
    """Check that ``engine`` can pursue ``count`` objectives at once."""


def check_libraries(engine: str) -> None:
    """Check that what ``engine`` imports is installed."""
    if engine != "tpe":
        raise SpecError(f"search.engine {engine!r} is not there yet")
