"""Object stores as places for experiments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.core.errors import SpecError
from holdfast.storage.root import Root


def ObjectRoot(location: str, options: Mapping[str, Any]) -> Root:
    raise SpecError(f"{location} is an object store; this version keeps experiments in local folders only")
