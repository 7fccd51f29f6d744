"""Trainables that are Python callables: they travel by cloudpickle, and are kept with the experiment."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from holdfast.core.errors import TrainableError
from holdfast.storage.atomic import write_file
from holdfast.storage.folder import TRAINABLE as FILE

Function = Callable[..., Any]
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def spec_name(function: Function) -> str:
    """Return what stands in the spec for ``function``: ``pickle:trainable.pkl:train``."""
    name = getattr(function, "__name__", type(function).__name__)
    return f"pickle:{FILE}:{name if name.isidentifier() else 'trainable'}"


def dump(function: Function, *, whole: bool = False) -> bytes:
    """Return ``function`` as bytes; TrainableError when something that it refers to cannot travel.

    With ``whole`` they hold its code, too, wherever it was imported from, unless that is installed: nobody needs its file.
    """
    import cloudpickle

    try:
        if whole:
            with _by_value(function):
                return bytes(cloudpickle.dumps(function))
        return bytes(cloudpickle.dumps(function))
    except Exception as error:  # whatever the objects that it refers to raise
        raise TrainableError(
            f"the trainable {spec_name(function)} cannot be pickled ({type(error).__name__}: {error}); "
            "open what it needs inside of it, or put it into a file and name it as file.py:function"
        ) from error


@contextmanager
def _by_value(function: Function) -> Iterator[None]:
    """Let cloudpickle take the code of the function's own package, and of modules in the working directory, along."""
    import cloudpickle

    begun = [module for module in _own_modules(function) if module.__name__ not in cloudpickle.list_registry_pickle_by_value()]
    for module in begun:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in begun:
            cloudpickle.unregister_pickle_by_value(module)


def _own_modules(function: Function) -> list[ModuleType]:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__module__", None) or type(function).__module__
    own = {name, name.partition(".")[0]}
    here = os.path.realpath(os.getcwd()) + os.sep
    found = []
    for known, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module.__name__ != known or known == "__main__":
            continue
        file = getattr(module, "__file__", None)
        file = None if file is None else os.path.realpath(file)
        if not _is_installed(known, file) and (known in own or (file is not None and file.startswith(here))):
            found.append(module)
    return found


def _is_installed(name: str, file: str | None) -> bool:
    """Tell whether a module is there wherever holdfast is: Python's own, holdfast's, one of site-packages."""
    if name.partition(".")[0] in (*sys.builtin_module_names, *sys.stdlib_module_names, "holdfast"):
        return True
    if file is None:
        return False
    return any(file.startswith(place) for place in _places()) or bool(_INSTALLED.intersection(Path(file).parts))


@functools.cache
def _places() -> list[str]:
    paths = sysconfig.get_paths()
    return [os.path.realpath(paths[kind]) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib")]


def keep(pickled: bytes, folder: Path) -> None:
    """Write a pickled trainable into a folder where workers find it."""
    write_file(folder / FILE, pickled)
