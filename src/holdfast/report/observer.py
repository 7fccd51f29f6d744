"""Whoever watches a search from outside: the command line's progress display, a notebook, nobody."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

from holdfast.core.resume import Planned
from holdfast.core.trial import Trial
from holdfast.experiment import SearchResult
from holdfast.locate import Opened


class Observer:
    """Told of what happens, in the thread of the search; this one does nothing. Its methods must not block."""

    def say(self, text: str) -> None:
        """A sentence for a person."""

    def preparing(self) -> None:
        """The input is good and there is work: an API will be needed."""

    def opened(self, opened: Opened, *, restored: bool) -> None:
        """The experiment is ours: its path is known, nothing runs yet."""

    def planned(self, plan: Sequence[Planned]) -> None:
        """What a restore does with each stored trial."""

    def running(self, api_url: str | None) -> None:
        """Prefect's API answers; trials start now."""

    def trial(self, trial: Trial) -> None:
        """A trial's row changed."""

    def ended(self, result: SearchResult) -> None:
        """The search ended, on its own accord or interrupted."""


watching: ContextVar[Observer | None] = ContextVar("holdfast_observer", default=None)


def observer() -> Observer:
    """Return the observer of the running search."""
    return watching.get() or Observer()
