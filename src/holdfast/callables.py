"""Trainables that are Python callables: they travel by cloudpickle, and are kept with the experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.core.errors import TrainableError
from holdfast.storage.atomic import write_file
from holdfast.storage.folder import TRAINABLE as FILE

Function = Callable[..., Any]


def spec_name(function: Function) -> str:
    """Return what stands in the spec for ``function``: ``pickle:trainable.pkl:train``."""
    name = getattr(function, "__name__", type(function).__name__)
    return f"pickle:{FILE}:{name if name.isidentifier() else 'trainable'}"


def dump(function: Function) -> bytes:
    """Return ``function`` as bytes; TrainableError when something that it refers to cannot travel."""
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(function))
    except Exception as error:  # whatever the objects that it refers to raise
        raise TrainableError(
            f"the trainable {spec_name(function)} cannot be pickled ({type(error).__name__}: {error}); "
            "open what it needs inside of it, or put it into a file and name it as file.py:function"
        ) from error


def keep(pickled: bytes, folder: Path) -> None:
    """Write a pickled trainable into a folder where workers find it."""
    write_file(folder / FILE, pickled)
