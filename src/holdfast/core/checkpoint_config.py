"""Which steps are saved, which saved ones are kept, and how: the settings that a trial and a store of its own share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from holdfast.core.space import Number, Section, Whole

Mode = Literal["all", "last", "gap", "gap_overwrite", "gap_and_last", "none"]

_DURATION = re.compile(r"(?:(?:(?P<days>\d+):)?(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+(?:\.\d+)?)")
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def _seconds(value: Any) -> Any:
    """Read ``[[days:]hours:]minutes:seconds``, as batch systems write their limits."""
    if not isinstance(value, str):
        return value
    found = _DURATION.fullmatch(value.strip())
    if found is None:
        return value  # it may be a number in quotes; anything else is refused as none
    return sum(_SECONDS[unit] * float(count or 0) for unit, count in found.groupdict().items())


Duration = Annotated[Number, BeforeValidator(_seconds)]
"""Seconds, also written as ``hours:minutes:seconds``."""


class CheckpointConfig(Section):
    """Which steps are saved, and which saved ones are kept.

    The mode and each ``keep_*`` that is given are rules; what any of them keeps is kept. Without a rule everything is. The
    newest checkpoint, the newest that was read back and found good, and pinned ones are always kept.
    """

    enabled: bool = Field(default=True, description="false: nothing is saved")
    directory: str | None = Field(default=None, description="of a CheckpointStore; a search keeps its checkpoints in its path")
    mode: Mode = Field(
        default="all",
        description="all, gap: each save_period-th step; last: every step, only the newest is kept; gap_overwrite: each"
        " save_period-th, only the newest is kept; gap_and_last: each save_period-th, and the newest; none: off",
    )
    save_period: Whole = Field(default=1, ge=1, description="save each step that it divides")
    keep_top_k: Whole | None = Field(default=None, ge=1, description="keep the best k by metric_name; null: not a rule")
    keep_last: Whole | None = Field(default=None, ge=1, description="keep the newest n; null: not a rule")
    keep_every: Whole | None = Field(default=None, ge=1, description="keep each step that it divides; null: not a rule")
    metric_name: str | None = Field(
        default=None, description="what best means; null: the first objective, or in a store of its own the newest"
    )
    higher_is_better: bool | None = Field(
        default=None, description="null: as the objective of that name says, else the first one; in a store of its own false"
    )
    serializer: Literal["safe", "cloudpickle"] = Field(
        default="safe", description="safe: JSON values, bytes, numpy arrays, tensors; cloudpickle: anything, by pickle"
    )
    asynchronous: bool = Field(default=False, description="write in the background, from a copy of the state")
    save_before: Duration | None = Field(
        default=None,
        gt=0,
        description="seconds after the start, or hours:minutes:seconds, before which one more step is saved, due or not",
    )

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.mode == "last" and self.save_period != 1:
            raise ValueError(
                f"mode last saves every step, and save_period is {self.save_period}; leave it at 1, or use mode gap_overwrite"
            )
        if self.mode == "gap_overwrite" and self.save_period < 2:
            raise ValueError("mode gap_overwrite needs a save_period of 2 or more; for every step use mode last")
        return self

    @property
    def saves(self) -> bool:
        """Whether anything is saved."""
        return self.enabled and self.mode != "none"

    @property
    def due_period(self) -> int:
        """Every how many steps one is saved."""
        return 1 if self.mode == "gap_and_last" else self.save_period

    def is_due(self, step: int) -> bool:
        """Tell whether ``step`` is to be saved."""
        return self.saves and step % self.due_period == 0

    @property
    def rules(self) -> bool:
        """Whether any ``keep_*`` is given."""
        return any(rule is not None for rule in (self.keep_top_k, self.keep_last, self.keep_every))


SEARCH_DEFAULTS = {"keep_top_k": 1, "keep_last": 2}
"""What a search keeps of each trial unless its spec says otherwise; ``null`` takes a rule away."""


def for_search(value: Any) -> Any:
    """Fill in what a spec's ``checkpoints`` leaves out, where its mode is ``all``; a config made in Python is complete."""
    if isinstance(value, dict) and value.get("mode", "all") == "all":
        return {**SEARCH_DEFAULTS, **value}
    return value
