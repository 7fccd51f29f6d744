"""Checkpoints: which ones an attempt may continue from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from holdfast.core.errors import InvalidStep
from holdfast.core.trial import Attempt
from holdfast.core.values import Metrics


class CheckpointStatus(StrEnum):
    VALID = "valid"
    CORRUPT = "corrupt"
    DELETED = "deleted"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A published checkpoint, as its row says. ``path`` is relative to the experiment's."""

    id: int
    trial: int
    attempt: int
    step: int
    path: str
    digest: str
    """of the manifest, so that exchanged directories are noticed"""
    bytes: int
    status: CheckpointStatus = CheckpointStatus.VALID
    reason: str = ""
    pinned: bool = False
    lent: bool = False
    """whether a member of a population goes on from it, and has no checkpoint of its own yet: it stays, like a pinned one"""
    verified: bool = False
    """whether its files were read back and found good; no row says that"""
    metrics: Metrics = field(default_factory=dict)


def check_step(step: object) -> int:
    """Return ``step`` if it is a whole number from 0; InvalidStep otherwise (True and 2.0 are refused)."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
        raise InvalidStep(f"step is {step!r}; it must be a whole number from 0, below 2^63")
    return step


def chain(current: int, attempts: Mapping[int, Attempt]) -> list[tuple[int, int | None]]:
    """Return the attempts whose checkpoints count for attempt ``current``, newest first, each with its last eligible step.

    An attempt without a parent ends the chain: a restarted trial's old checkpoints are history. None means every step.
    """
    links: list[tuple[int, int | None]] = []
    number: int | None = current
    limit: int | None = None
    while number is not None and all(number != seen for seen, _ in links):
        links.append((number, limit))
        attempt = attempts[number]
        number = attempt.parent
        if attempt.parent_step is not None:
            limit = attempt.parent_step if limit is None else min(limit, attempt.parent_step)
    return links


def eligible(
    current: int,
    attempts: Mapping[int, Attempt],
    checkpoints: Iterable[Checkpoint],
    borrowed: Mapping[int, Checkpoint] | None = None,
) -> list[Checkpoint]:
    """Return the valid checkpoints on the chain of attempt ``current``, the one to resume from first.

    ``borrowed`` are other trials' checkpoints, by the number of the attempt that goes on from each: it comes after what that
    attempt has saved itself, and before what its own trial had before.
    """
    order = {number: (place, limit) for place, (number, limit) in enumerate(chain(current, attempts))}
    found = [
        checkpoint
        for checkpoint in checkpoints
        if checkpoint.status is CheckpointStatus.VALID
        and checkpoint.attempt in order
        and ((limit := order[checkpoint.attempt][1]) is None or checkpoint.step <= limit)
    ]
    found.sort(key=lambda checkpoint: (order[checkpoint.attempt][0], -checkpoint.step))
    if not borrowed:
        return found
    others = {number: checkpoint for number, checkpoint in borrowed.items() if checkpoint.status is CheckpointStatus.VALID}
    every: dict[int, Checkpoint] = {}
    for number in order:
        every |= {checkpoint.id: checkpoint for checkpoint in found if checkpoint.attempt == number}
        if number in others:  # several attempts may have begun from the same one
            every.setdefault(others[number].id, others[number])
    return list(every.values())
