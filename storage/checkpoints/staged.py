"""A staging directory as a path that is also a context manager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class StagedPath(type(Path())):  # type: ignore[misc]  # a path of this system
    """A directory to write a checkpoint's files into. As a context manager it is finalized at the end, or discarded."""

    _finalize: Callable[[Path], object] | None = None
    _discard: Callable[[Path], None] | None = None

    @classmethod
    def of(cls, path: Path, finalize: Callable[[Path], object], discard: Callable[[Path], None]) -> Self:
        """Return ``path`` with what is to be done at the end of a ``with`` block, after success and after an error."""
        staged = cls(path)
        staged._finalize, staged._discard = finalize, discard
        return staged

    def with_segments(self, *segments: Any) -> Path:
        """Return what is derived from it as a plain path (Python 3.12 and newer)."""
        return Path(*segments)

    def __enter__(self) -> Self:
        if self._finalize is None:
            raise TypeError(f"{self} lies within a staging directory; only the directory itself can be finalized")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._finalize is None or self._discard is None:
            return
        try:
            if kind is None:
                self._finalize(Path(self))
        finally:
            self._discard(Path(self))  # which does nothing once it is finalized
