"""Seed the global random generators, so that every attempt of a trial draws the same numbers."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import random
import sys
from collections.abc import Sequence
from types import ModuleType

_MODULE = "numpy.random"


def seed_everything(seed: int) -> None:
    """Seed Python's generator and numpy's; the latter, when nothing has imported it yet, the moment something does."""
    random.seed(seed)
    module = sys.modules.get(_MODULE)
    if module is not None:
        module.seed(seed % 2**32)
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Seeding):
            finder.seed = seed
            return
    sys.meta_path.insert(0, _Seeding(seed))


class _Seeding(importlib.abc.MetaPathFinder):
    """Let numpy.random be found as ever, and seed it once it is loaded: importing numpy for nobody costs 0.1 s."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader, finder: _Seeding) -> None:
        self._inner = inner
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner  # its data files are read by the loader it expects
        self._inner.exec_module(module)
        module.seed(self._finder.seed % 2**32)
