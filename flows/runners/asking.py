"""Workers are asked before the first trial: which are there, and what they say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from holdfast.core.errors import Infrastructure

WORKERS_SECONDS = 60.0
"""How long the first worker is waited for."""
ANSWER_SECONDS = 120.0
"""How long a worker may take to answer: it imports everything first, from a cold disk and on a busy machine."""
_PAUSE_SECONDS = 0.25

T = TypeVar("T")


def first_workers(look: Callable[[], T | None], nobody: Callable[[], str], *, seconds: float = WORKERS_SECONDS) -> T:
    """Return what ``look`` finds as soon as it finds something; Infrastructure, with what ``nobody`` says, after a while."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise Infrastructure(f"{nobody()}; waited for {seconds:g} s, nothing was begun")
        time.sleep(_PAUSE_SECONDS)
    return found


def refuse_unfit(answers: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Raise Infrastructure with every reason for which a worker cannot run trials; alike ones are said once."""
    hosts: dict[str, list[str]] = {}
    for name, reasons in answers:
        for reason in reasons:
            hosts.setdefault(reason, []).append(name)
    if not hosts:
        return
    lines = [f"  {', '.join(sorted(set(names)))}: {reason}" for reason, names in hosts.items()]
    raise Infrastructure("workers cannot run trials of this search; nothing was begun:\n" + "\n".join(lines))


def lacking(needed: dict[str, float], offered: Iterable[dict[str, float]]) -> bool:
    """Tell whether none of the workers has what a trial needs."""
    return not any(all(worker.get(name, 0) >= amount for name, amount in needed.items()) for worker in offered)
