"""The spec's sections ``failure`` and ``recovery``: what happens when a trial fails, and when a search is cut off."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field, field_validator

from holdfast.core.resume import Rerun, ResumePolicy
from holdfast.core.space import Number, Section, Whole
from holdfast.core.trial import Outcome

Cause = Literal["lost", "terminated", "failed"]
"""How a drive was cut off: its process died without a word; SIGTERM ended it; storage, database or Prefect failed."""


_ENDS = (Outcome.CRASHED.value, Outcome.TIMED_OUT.value)
"""What ``retry_on`` calls attempts that ended without an exception."""


def a_list(given: Any, example: str) -> Any:
    """Return what was given for a list; ValueError for a single word."""
    if isinstance(given, str):
        raise ValueError(f"{given!r} is a single word; give a list, such as {example}")
    return given


class FailureSection(Section):
    """What happens to a trial that fails."""

    max_failures: Whole = Field(default=0, ge=0, description="failures that are retried; 2 allows 3 attempts")
    retry_on: tuple[str, ...] | None = Field(
        default=None,
        description="retry only these: names of exceptions (their subclasses count, too), crashed, timed_out; null: every one",
    )
    retry_delay: Number = Field(default=0.0, ge=0, description="seconds before the first retry of a trial")
    retry_backoff: Number = Field(default=2.0, ge=1, description="each further retry of it waits so many times as long")
    max_retry_delay: Number = Field(default=600.0, ge=0, description="seconds that a retry waits at most")
    fail_fast: bool = Field(default=False, description="the first errored trial ends the search")
    trial_timeout: Number | None = Field(default=None, gt=0, description="seconds that one attempt may take")

    @field_validator("retry_on", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return a_list(given, "[OSError, crashed]")

    @field_validator("retry_on")
    @classmethod
    def _names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if name.lower() in _ENDS and name not in _ENDS:
                raise ValueError(f"retry_on holds {name!r}, which no exception is called; write {name.lower()}")
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(
                    f"retry_on holds {name!r}; name exceptions, such as OSError or package.module.Error, or crashed, timed_out"
                )
        return names

    def retries(self, outcome: Outcome, names: Collection[str]) -> bool:
        """Tell whether an attempt that failed so is one to be retried, as long as the budget lasts.

        ``names`` are those of its exception: plain and qualified ones, its base classes' included.
        """
        if self.retry_on is None:
            return True
        known = {outcome.value} if outcome in (Outcome.CRASHED, Outcome.TIMED_OUT) else set(names)
        return not known.isdisjoint(self.retry_on)

    def delay(self, failures: int) -> float:
        """Return how many seconds the next attempt waits after ``failures`` (from 1) that used up the retry budget."""
        try:
            grown = self.retry_delay * self.retry_backoff ** (failures - 1)
        except OverflowError:
            return self.max_retry_delay
        return min(grown, self.max_retry_delay)


class RecoverySection(Section):
    """What the flow ``watch`` does with a search that was cut off."""

    after: tuple[Cause, ...] = Field(
        default=("lost",),
        description="restore after these: lost (its process died), terminated (SIGTERM), failed (storage, database, Prefect)",
    )
    unfinished: Literal["resume", "restart"] = Field(default="resume", description="what becomes of unfinished trials")
    errored: Literal["skip", "resume", "restart"] = Field(default="skip", description="what becomes of errored trials")
    max_restores: Whole = Field(default=5, ge=0, description="restores in a row that got nothing done; 0: never restore")
    delay: Number = Field(
        default=60.0, ge=0, description="seconds before the second restore in a row; it doubles with each one"
    )
    max_delay: Number = Field(default=3600.0, ge=0, description="seconds that a restore waits at most")

    @field_validator("after", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return a_list(given, "[lost, terminated]")

    @property
    def policy(self) -> ResumePolicy:
        return ResumePolicy(unfinished=Rerun(self.unfinished), errored=Rerun(self.errored))
