"""The trials of an experiment as they stand, read once: from then on only what may have changed."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.core.trial import Trial, TrialStatus
from holdfast.storage.database.reads import ALL, Reader


class Followed:
    """Every trial of an experiment, merged ones too, for whoever looks at them again and again.

    What ended never changes without a new seq. Reports do not change a trial's row, so trials that run are read each time.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._trials: dict[int, Trial] = {}
        self._running: dict[int, int] = {}
        """seq of each trial that ran when it was looked at, by number"""
        self._seq = -1
        self._is_ordered = True

    def look(self) -> list[Trial]:
        """Return the trials as they stand now, in number order; those below number 0 were merged from other experiments."""
        since = min([self._seq, *(seq - 1 for seq in self._running.values())])
        self.take(self._reader.trials(since=since, first=-ALL))
        if not self._is_ordered:  # what was merged meanwhile comes before the rest
            self._trials = dict(sorted(self._trials.items()))
            self._is_ordered = True
        return list(self._trials.values())

    def take(self, trials: Sequence[Trial]) -> None:
        """Take in every trial that changed since the last look, as somebody else has read them: they are not read again."""
        for trial in trials:
            self._is_ordered = self._is_ordered and (self._seq < 0 or trial.number in self._trials)
            self._trials[trial.number] = trial
            if trial.status is TrialStatus.RUNNING:
                self._running[trial.number] = trial.seq
            else:
                self._running.pop(trial.number, None)
        self._seq = max([self._seq, *(trial.seq for trial in trials)])

    def own(self) -> list[Trial]:
        """Return the experiment's own trials as they stand now, in number order."""
        return [trial for trial in self.look() if trial.number >= 0]
