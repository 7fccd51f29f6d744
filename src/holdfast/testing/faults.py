"""The crash laboratory: die at a named point, or at any moment.

``holdfast.core.faults.POINTS`` names every moment at which a crash leaves something half-done. ``HOLDFAST_FAULT=NAME`` (or
``NAME:3``, for the third pass) makes a ``holdfast`` command die there by SIGKILL, as if the power had failed.
"""

from __future__ import annotations

import os
import signal
import threading

from holdfast.core import faults
from holdfast.core.errors import SpecError


def parse(fault: str) -> tuple[str, int]:
    """Return the point and the pass that ``fault`` names; SpecError for an unknown point."""
    name, _, count = fault.partition(":")
    if name not in faults.POINTS:
        raise SpecError(f"there is no crash point {name!r}; there are {', '.join(faults.POINTS)}")
    if count and not (count.isdecimal() and int(count)):
        raise SpecError(f"crash point {fault!r}: the pass is {count!r}; it must be a whole number from 1")
    return name, int(count or 1)


def install(fault: str) -> None:
    """Die by SIGKILL at the point, and the pass of it, that ``fault`` names."""
    name, count = parse(fault)
    passed = 0
    lock = threading.Lock()

    def hook(point: str) -> None:
        nonlocal passed
        if point != name:
            return
        with lock:
            passed += 1
            if passed == count:
                os.kill(os.getpid(), signal.SIGKILL)

    faults.install(hook)
