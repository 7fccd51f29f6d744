"""Stopping rules where reports of one experiment come from several processes: decided within the report's transaction."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from holdfast.core.history import History
from holdfast.core.stopping import Rules
from holdfast.core.values import Metrics
from holdfast.storage.database import measures
from holdfast.storage.database.engine import Database, Transaction
from holdfast.storage.database.losses import repeatable
from holdfast.tasks.runtime import Judge

_GAP = 8
"""Trials that did not change are read along when so few lie between two that did: one statement costs more."""


class StoredJudge:
    """What the rules look at, as this process knows it, and brought up to date within each report's transaction.

    The fence has locked the experiment's row by then, so every report that counts is there to be read. Only trials that
    changed since the last look are read again. The first look, at everything, comes before the fence: others write meanwhile.
    """

    def __init__(self, database: Database, experiment: int, rules: Rules) -> None:
        self._database = database
        self._experiment = experiment
        self._rules = rules
        self._history = History(rules.metrics)
        self._seq = -1
        """up to which rows are known"""
        self._lock = threading.Lock()

    @contextmanager
    def judged(self, trial: int, step: int, metrics: Metrics) -> Iterator[Judge]:
        """Give what decides about a report; as ``Runtime.judged``, but it looks when it is called, again if it is repeated."""
        with self._lock:
            added = False
            if self._seq < 0:
                self._catch_up()

            def judge(tx: Transaction) -> str | None:
                nonlocal added
                if added:
                    self._history.withdraw(trial, step)
                self._look(tx)
                self._history.add(trial, step, metrics)
                added = True
                return self._rules.decide(self._history, trial, step)

            try:
                yield judge
            except BaseException:
                if added:
                    self._history.withdraw(trial, step)
                raise
            if added:
                self._seq += 1  # the transaction's own

    @repeatable
    def _catch_up(self) -> None:
        with self._database.snapshot() as state:
            self._look(state)

    def _look(self, tx: Transaction) -> None:
        since = self._seq
        seq, changed = measures.changed(tx, self._experiment, since)
        ranges = list(_ranges(sorted(changed))) if since >= 0 else [(0, measures.ALL)]
        found = [measures.measured(tx, self._experiment, self._rules.metrics, first, last) for first, last in ranges]
        self._seq = -1  # what is cut off here begins anew
        if since < 0:
            self._history = History(self._rules.metrics)
        for (first, last), by_metric in zip(ranges, found, strict=True):
            for number in range(first, last + 1) if since >= 0 else ():
                self._history.forget(number)
            for metric, rows in by_metric.items():
                self._history.load(metric, rows)
        self._seq = seq


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of runs of rising numbers."""
    if not numbers:
        return
    first = numbers[0]
    for before, number in pairwise(numbers):
        if number - before > _GAP:
            yield first, before
            first = number
    yield first, numbers[-1]
