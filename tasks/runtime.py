"""What running trials of one experiment share in a process: found by the experiment's identity, not passed to tasks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from holdfast.core.errors import HoldfastError
from holdfast.core.history import History
from holdfast.core.spec import ExperimentSpec
from holdfast.core.stopping import Rules, make
from holdfast.core.values import Metrics
from holdfast.storage.checkpoints.ports import Checkpoints
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.engine import Database, Transaction
from holdfast.storage.database.reads import Reader
from holdfast.storage.folder import Folder
from holdfast.storage.journal import JournalWriter
from holdfast.tasks.workers.messages import Decision
from holdfast.tasks.workers.pool import WorkerPool

Judge = Callable[[Transaction], str | None]
"""Says, within the transaction that commits a report, why the trial ends after it, or None."""


@dataclass
class Runtime:
    """One experiment's running side."""

    uuid: str
    experiment: int
    epoch: int
    spec: ExperimentSpec
    workdir: str
    database: Database
    reader: Reader
    folder: Folder
    checkpoints: Checkpoints
    pool: WorkerPool | None
    """None with ``isolation: inline``"""
    journal: JournalWriter | None = None
    held: Callable[[], None] = lambda: None
    """raises when the lease is somebody else's by now: the database alone does not know who took over by the path"""
    tags: Callable[[int], tuple[str, ...]] = lambda trial: ()
    """the tags of the task runs of a trial in Prefect"""
    cancelled: set[int] = field(default_factory=set)
    """numbers of trials that somebody asked to cancel"""
    lost: HoldfastError | None = None
    worker: int | None = None
    """row of the worker that this process is to the driver; None in the driver's own"""
    began: float = field(default_factory=time.monotonic)
    """the moment of this process's monotonic clock from which the deadlines of this drive count"""
    borrowed: Counter[int] = field(default_factory=Counter)
    """how many attempts here use a local copy of another trial's checkpoint, by that trial's number; under ``borrowing``"""
    borrowing: threading.Lock = field(default_factory=threading.Lock)
    _order: Decision = Decision.CONTINUE
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _judging: threading.Lock = field(default_factory=threading.Lock)
    _rules: Rules = field(init=False)
    _history: History = field(init=False)

    def __post_init__(self) -> None:
        self._rules = make(self.spec.stopping, self.spec.goals)
        self._history = History(self._rules.metrics)

    def learn(self) -> None:
        """Take in the stored reports that stopping rules look at; called before anything runs."""
        if self._rules:
            with self._judging:
                self._history = stored_history(self.reader, self._rules)

    @contextmanager
    def judged(self, trial: int, step: int, metrics: Metrics) -> Iterator[Judge]:
        """Give what says why a trial ends after a report; the block commits it, before anybody else's is decided about.

        So the order of decisions is the order in which reports were committed. A report whose block raises does not count.
        """
        if not self._rules:
            yield _goes_on
            return
        with self._judging:
            self._history.add(trial, step, metrics)
            try:
                reason = self._rules.decide(self._history, trial, step)
                yield lambda _: reason
            except BaseException:
                self._history.withdraw(trial, step)
                raise

    @contextmanager
    def changing(self, trial: int) -> Iterator[None]:
        """Take in, after the block, which reports of a trial count then: an attempt begins in it, or ends and is followed."""
        if not self._rules:
            yield
            return
        with self._judging:
            yield
            found = self.reader.measured(self._rules.metrics, first=trial, last=trial)
            self._history.forget(trial)
            for metric, rows in found.items():
                self._history.load(metric, rows)

    def order(self, decision: Decision) -> None:
        """Tell every running attempt what to do at its next chance: PREEMPT, then KILL."""
        with self._lock:
            self._order = decision

    def decision(self, trial: int, attempt: int | None = None) -> Decision:
        """Return what a running attempt (row id, None before it is claimed) of ``trial`` is to do now."""
        if self._order is Decision.CONTINUE and trial in self.cancelled:
            return Decision.CANCEL
        return self._order

    def journaled(self) -> int:
        """Return the seq up to which the journal in the path is known to reach."""
        return self.journal.end if self.journal is not None else -1

    def fail(self, error: HoldfastError) -> None:
        """Note what is no fault of a trial's: the search is interrupted by it, and a restore goes on."""
        self.lost = self.lost or error

    def claimed(self, writer: AttemptWriter) -> None:
        """Take note of an attempt that runs here from now on."""

    def let_go(self, writer: AttemptWriter) -> None:
        """Take note that nothing is done here for an attempt any more."""


def _goes_on(_: Transaction) -> None:
    """End no trial."""


def stored_history(reader: Reader, rules: Rules) -> History:
    """Return the history that ``rules`` look at, from rows."""
    history = History(rules.metrics)
    for metric, rows in reader.measured(rules.metrics).items():
        history.load(metric, rows)
    return history


_runtimes: dict[str, Runtime] = {}


def register(runtime: Runtime) -> None:
    """Make ``runtime`` known to the tasks of this process."""
    _runtimes[runtime.uuid] = runtime


def unregister(runtime: Runtime) -> None:
    """Forget ``runtime``."""
    _runtimes.pop(runtime.uuid, None)


def find(uuid: str) -> Runtime:
    """Return the runtime of the experiment ``uuid``; HoldfastError outside a search or restore flow."""
    try:
        return _runtimes[uuid]
    except KeyError:
        raise HoldfastError(
            f"no search of experiment {uuid} runs in this process; trials are run by the flows search and restore"
        ) from None
