"""Retention: which checkpoints are kept. Small policies, each with one pure method; what is kept is their union."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from holdfast.core.checkpoint import Checkpoint
from holdfast.core.checkpoint_config import CheckpointConfig
from holdfast.core.objective import Direction, Objective, score
from holdfast.core.values import Json


class Policy(Protocol):
    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        """Return the ids to keep of ``checkpoints``, which come oldest first."""
        ...


@dataclass(frozen=True)
class KeepAll:
    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return {checkpoint.id for checkpoint in checkpoints}


@dataclass(frozen=True)
class KeepLast:
    count: int

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return {checkpoint.id for checkpoint in checkpoints[-self.count :]}


@dataclass(frozen=True)
class KeepBest:
    """Keep the best ``count`` by a metric; NaN, infinite and missing values never count, ties go to the newest."""

    count: int
    objective: Objective

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        order = best(checkpoints, self.objective)[: self.count]
        return {checkpoint.id for checkpoint in order if rank(checkpoint.metrics, self.objective) < math.inf}


@dataclass(frozen=True)
class KeepPinned:
    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return {checkpoint.id for checkpoint in checkpoints if checkpoint.pinned or checkpoint.lent}


@dataclass(frozen=True)
class KeepEvery:
    period: int

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return {checkpoint.id for checkpoint in checkpoints if checkpoint.step % self.period == 0}


@dataclass(frozen=True)
class KeepVerified:
    """Keep the newest that was read back and found good: what is newer may turn out bad."""

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return {checkpoint.id for checkpoint in [each for each in checkpoints if each.verified][-1:]}


def policies(config: CheckpointConfig, objective: Objective | None, *, latest: bool = True) -> list[Policy]:
    """Return the policies that ``config`` asks for; the newest checkpoint is always among what they keep.

    ``objective`` is what best means when the config names no metric; without either the newest are the best. Without
    ``latest`` the newest one must be kept by a rule, too.
    """
    chosen: list[Policy] = []
    goal = ranking(config, objective)
    if not config.saves or (config.mode in ("all", "gap") and not config.rules):
        chosen.append(KeepAll())
    if config.mode == "gap_and_last":
        chosen.append(KeepEvery(config.save_period))
    if config.keep_every is not None:
        chosen.append(KeepEvery(config.keep_every))
    if config.keep_top_k is not None:
        chosen.append(KeepLast(config.keep_top_k) if goal is None else KeepBest(config.keep_top_k, goal))
    elif goal is not None and config.metric_name is not None and config.mode not in ("last", "gap_overwrite"):
        chosen.append(KeepBest(1, goal))  # whoever names a metric wants to find the best by it
    if latest or config.keep_last is not None or not chosen:
        chosen.append(KeepLast(config.keep_last or 1))
    return [*chosen, KeepVerified(), KeepPinned()]


def ranking(config: CheckpointConfig, objective: Objective | None) -> Objective | None:
    """Return what checkpoints are ranked by: the config's metric and direction, else ``objective``; None without either."""
    name = config.metric_name or (objective.name if objective else None)
    if name is None:
        return None
    direction = objective.direction if objective else Direction.MIN
    if config.higher_is_better is not None:
        direction = Direction.MAX if config.higher_is_better else Direction.MIN
    return Objective(name=name, direction=direction)


def best(checkpoints: Sequence[Checkpoint], goal: Objective | None) -> list[Checkpoint]:
    """Return ``checkpoints`` (oldest first), the best first; those without a finite value come last, the newest of them first.

    Without a ``goal`` the newest is the best.
    """
    newest_first = list(reversed(checkpoints))
    if goal is None:
        return newest_first
    return sorted(newest_first, key=lambda checkpoint: rank(checkpoint.metrics, goal))


def rank(metrics: Mapping[str, Json], goal: Objective) -> float:
    """Return by what checkpoints are ordered, the lowest best: infinite for NaN, infinite and missing values."""
    value = score(metrics, goal)
    if value is None or not math.isfinite(value):
        return math.inf
    return value if goal.direction is Direction.MIN else -value


def surplus(checkpoints: Sequence[Checkpoint], chosen: Sequence[Policy]) -> list[Checkpoint]:
    """Return what no policy keeps of ``checkpoints`` (oldest first), oldest first."""
    kept = set().union(*(policy.keeps(checkpoints) for policy in chosen)) if chosen else set()
    return [checkpoint for checkpoint in checkpoints if checkpoint.id not in kept]
