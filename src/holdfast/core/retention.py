"""Retention: which checkpoints are kept. Small policies, each with one pure method; what is kept is their union."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from holdfast.core.checkpoint import Checkpoint
from holdfast.core.objective import Direction, Objective, score
from holdfast.core.spec import CheckpointConfig


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
        sign = 1.0 if self.objective.direction is Direction.MIN else -1.0
        ranked = sorted(
            (sign * value, -place, checkpoint.id)
            for place, checkpoint in enumerate(checkpoints)
            if (value := score(checkpoint.metrics, self.objective)) is not None and math.isfinite(value)
        )
        return {identity for _, _, identity in ranked[: self.count]}


@dataclass(frozen=True)
class KeepPinned:
    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return {checkpoint.id for checkpoint in checkpoints if checkpoint.pinned}


def policies(config: CheckpointConfig, objective: Objective) -> list[Policy]:
    """Return the policies that ``config`` asks for; the newest checkpoint is always among what they keep."""
    if config.mode == "last":
        return [KeepLast(1), KeepPinned()]
    if config.keep_last is None and config.keep_top_k is None:
        return [KeepAll()]
    chosen: list[Policy] = [KeepLast(config.keep_last or 1), KeepPinned()]
    if config.keep_top_k is not None:
        chosen.append(KeepBest(config.keep_top_k, ranking(config, objective)))
    return chosen


def ranking(config: CheckpointConfig, objective: Objective) -> Objective:
    """Return what checkpoints are ranked by: the config's metric and direction, else the first objective."""
    direction = objective.direction
    if config.higher_is_better is not None:
        direction = Direction.MAX if config.higher_is_better else Direction.MIN
    return Objective(name=config.metric_name or objective.name, direction=direction)


def surplus(checkpoints: Sequence[Checkpoint], chosen: Sequence[Policy]) -> list[Checkpoint]:
    """Return what no policy keeps of ``checkpoints`` (oldest first), oldest first."""
    kept = set().union(*(policy.keeps(checkpoints) for policy in chosen)) if chosen else set()
    return [checkpoint for checkpoint in checkpoints if checkpoint.id not in kept]
