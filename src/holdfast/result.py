"""What a search or restore returns, and how it is read from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.core.ranking import best_of, candidates_of, front_of
from holdfast.core.resume import Planned
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ERRORED, Trial
from holdfast.locate import Opened
from holdfast.report.frames import results_df
from holdfast.report.restored import RestoreSummary, summary_of
from holdfast.storage.database.reads import Reader

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search or restore leaves: every trial of every status."""

    name: str
    path: Path | str
    trials: list[Trial]
    best: Trial | None
    reason: str
    """why it ended"""
    spec: ExperimentSpec = field(repr=False)
    fast_failed: bool = False
    ended: tuple[int, ...] = field(default=(), repr=False)
    """the numbers of the trials in the order in which they ended; with several objectives only"""
    restored: RestoreSummary | None = field(default=None, repr=False)
    """what a restore did with each trial, and the work that was lost; None for a fresh search"""

    @property
    def errors(self) -> list[Trial]:
        """The errored trials."""
        return [trial for trial in self.trials if trial.status in ERRORED]

    @property
    def failed(self) -> bool:
        """Whether the search as a whole failed: ``fail_fast`` ended it, or every trial errored."""
        return self.fast_failed or (bool(self.trials) and len(self.errors) == len(self.trials))

    def results_df(self) -> pd.DataFrame:
        """Return one row a trial; see :meth:`Experiment.results_df`."""
        return results_df(self.trials, self.spec, ended=self.ended)

    def pareto_front(self) -> list[Trial]:
        """Return the trials that no other one dominates; see :meth:`Experiment.pareto_front`."""
        return [candidate.trial for candidate in front_of(candidates_of(self.trials, self.spec), self.spec.goals)]


def ended_in(reader: Reader, spec: ExperimentSpec) -> tuple[int, ...]:
    """Return which trials ended, in order, where that is of use."""
    return tuple(number for number, _ in reader.ended_since(0)) if len(spec.objectives) > 1 else ()


def result_of(
    opened: Opened,
    reason: str,
    *,
    fast_failed: bool = False,
    plan: Sequence[Planned] | None = None,
    trials: Sequence[Trial] | None = None,
) -> SearchResult:
    """Return the result of an experiment as it stands.

    ``plan`` is that of the restore which led there, if one did; ``trials`` are its own as the caller has read them.
    """
    reader, spec = Reader(opened.database, opened.record.id), opened.spec
    trials = reader.trials() if trials is None else list(trials)
    return SearchResult(
        name=opened.record.name,
        path=opened.folder.place,
        trials=trials,
        best=best_of(trials, spec.goals, spec.feasible, spec.search.aggregate),
        reason=reason,
        spec=spec,
        fast_failed=fast_failed,
        ended=ended_in(reader, spec),
        restored=None if plan is None else summary_of(plan, trials),
    )
