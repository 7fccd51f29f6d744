"""What a sampler keeps with a trial, as bytes: a version, then compressed JSON.

CMA-ES keeps its optimizer as a pickle in hexadecimal digits, and its library unpickles it. A path may come from anybody, so
:func:`unpack` first loads that pickle itself, by a loader that knows the optimizers and arrays alone.
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

from holdfast.core.errors import Corrupt, NewerFormat

Attributes = dict[str, Any]

VERSION = 1
LARGEST = 1 << 28
"""Bytes of an unpacked state at most: an optimizer of 2,000 parameters has a quarter of it."""

_OPTIMIZER = ":optimizer:"
_OPTIMIZERS = {("cmaes._cma", "CMA"), ("cmaes._sepcma", "SepCMA"), ("cmaes._cmawm", "CMAwM")}
_ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.{module}", name)
    for core in ("_core", "core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


def pack(trial: Mapping[str, Any], study: Mapping[str, Any]) -> bytes | None:
    """Return what was written to the trial and to the study as bytes; None when that is nothing."""
    if not trial and not study:
        return None
    text = json.dumps([trial, study], separators=(",", ":"), sort_keys=True)
    return bytes([VERSION]) + zlib.compress(text.encode())


def unpack(state: bytes, whose: str) -> tuple[Attributes, Attributes]:
    """Return what :func:`pack` took; Corrupt, or NewerFormat, naming ``whose`` state it is."""
    if state[:1] and state[0] > VERSION:
        raise NewerFormat(f"the sampler's state of {whose} has version {state[0]}, this holdfast knows {VERSION}: upgrade it")
    try:
        if state[0] != VERSION:
            raise ValueError(f"version {state[0]}")
        loader = zlib.decompressobj()
        text = loader.decompress(state[1:], LARGEST)
        if not loader.eof:
            raise ValueError("cut off, or too large")
        trial, study = json.loads(text)
        if not isinstance(trial, dict) or not isinstance(study, dict):
            raise ValueError("no attributes")
        _vet(trial)
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, EOFError, zlib.error, pickle.UnpicklingError) as error:
        raise Corrupt(f"the sampler's state of {whose} is not what holdfast wrote: {error}") from None
    return trial, study


class _Loader(pickle.Unpickler):
    """Loads optimizers and the arrays in them, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _OPTIMIZERS | _ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _vet(trial: Attributes) -> None:
    """Refuse an optimizer that is none: what loads here cannot do anything else where it is loaded again."""
    parts = [name for name in trial if _OPTIMIZER in name or name.endswith(_OPTIMIZER[:-1])]
    if not parts:
        return
    prefix = parts[0].partition(_OPTIMIZER)[0] + _OPTIMIZER
    found = _Loader(io.BytesIO(bytes.fromhex("".join(trial[f"{prefix}{place}"] for place in range(len(parts)))))).load()
    if (type(found).__module__, type(found).__name__) not in _OPTIMIZERS:
        raise pickle.UnpicklingError(f"it holds a {type(found).__name__}")
