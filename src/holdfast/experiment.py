"""The handle on a stored experiment: read and manage it without running anything."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from holdfast import upkeep
from holdfast.core.checkpoint import Checkpoint, check_step
from holdfast.core.errors import InvalidInput, LeaseHeld
from holdfast.core.objective import Objective, scores
from holdfast.core.ranking import candidates, candidates_of, front_of, ranked, reference_point, volume_of
from holdfast.core.space import Space
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ACTIVE, ERRORED, SCORED, Attempt, Trial, TrialStatus
from holdfast.core.values import Config, Json, Scalar
from holdfast.forking import fork_of
from holdfast.locate import Opened
from holdfast.report.frames import groups_df, history_df, results_df, telemetry_df
from holdfast.report.lineage import LineageRow, lineage_df, lineage_of
from holdfast.result import ended_in
from holdfast.standing import driven_elsewhere
from holdfast.storage.checkpoints.local import Loaded
from holdfast.storage.database import experiments, merging, queueing, requests, workers
from holdfast.storage.database.engine import Database
from holdfast.storage.database.leases import Lease
from holdfast.storage.database.loading import LoadedTrials, listed, load
from holdfast.storage.database.reads import ALL, AuditRow, Reader, ReportRow
from holdfast.transfer import export
from holdfast.upkeep import Collected

if TYPE_CHECKING:
    import pandas as pd


SCOPES = ("last", "best")
"""Which value of a trial decides what is best."""

LISTED = SCORED | ERRORED
"""What ``load`` lists."""


class Experiment:
    """A stored experiment. Closes its database connections when used as a context manager, or by :meth:`close`."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._reader = Reader(opened.database, opened.record.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the handle opens new ones when it is used again."""
        self._opened.close()

    @property
    def id(self) -> str:
        """The UUID, which never changes."""
        return self._opened.record.uuid

    @property
    def name(self) -> str:
        return self._opened.record.name

    @property
    def path(self) -> Path | str:
        """The folder, or the URL on an object store."""
        return self._opened.folder.place

    @property
    def spec(self) -> ExperimentSpec:
        return self._opened.spec

    @property
    def space(self) -> Space:
        return self.spec.space

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return self.spec.goals

    @property
    def description(self) -> str:
        return self.spec.description

    @property
    def spec_source(self) -> str | None:
        """The text of the file that the spec was read from, or None."""
        return self._opened.record.spec_source

    @property
    def lease(self) -> Lease:
        """Who drives the experiment now, or whose process was killed a moment ago: see :attr:`is_driven`."""
        return upkeep.lease_of(self._opened)

    @property
    def is_driven(self) -> bool:
        """Whether somebody drives it: not once the holder's process is gone from this host, whatever its lease says."""
        return upkeep.driven(self._opened)

    def workers(self, *, every: bool = False) -> list[workers.WorkerRow]:
        """Return the processes that run trials of the newest drive on their own, those that left too; or of every drive.

        The path does not tell of them: a database that was rebuilt from it knows none.
        """
        epoch = None if every else self.lease.epoch
        return workers.every(self._opened.database, self._opened.record.id, epoch=epoch)

    def loads(self) -> dict[int, tuple[int, int]]:
        """Return how many attempts each of :meth:`workers` has ended, and how many it runs, by the id of its row."""
        return workers.loads(self._opened.database, self._opened.record.id, self.lease.epoch)

    @property
    def ended(self) -> str | None:
        """Why the last drive ended; None while one is under way, after a crash, and before the first."""
        record = experiments.by_uuid(self._opened.database, self.id)
        return None if record is None else record.ended

    @property
    def trials(self) -> list[Trial]:
        """Every trial of its own in number order; merged ones come from :meth:`load`."""
        return self._reader.trials()

    def find(self, status: TrialStatus | str | Iterable[TrialStatus | str]) -> list[Trial]:
        """Return the trials of a status, or of one of several, in number order; InvalidInput for one that is none."""
        wanted = _statuses(status)
        found = queueing.active(self._reader) if wanted <= ACTIVE else self.trials
        return [trial for trial in found if trial.status in wanted]

    @property
    def status(self) -> str:
        """running, interrupted, stopped, completed or failed: derived from the lease and the trials, never stored."""
        ended, counts = self.ended, self._reader.counts()
        if upkeep.driven(self._opened):
            return "running"
        unfinished = sum(counts.get(status, 0) for status in ACTIVE)
        if ended is not None and ended.startswith("stopped"):
            return "stopped"
        if unfinished or ended is None or ended.startswith("interrupted"):
            return "interrupted"
        errored = sum(counts.get(status, 0) for status in ERRORED)
        return "failed" if errored and errored == sum(counts.values()) else "completed"

    def counts(self) -> dict[TrialStatus, int]:
        """Return how many trials have each status that occurs."""
        return self._reader.counts()

    def trial(self, number: int) -> Trial:
        """Return one trial; InvalidInput when there is none of that number."""
        found = self._reader.trial(number) if _is_number(number) else None
        if found is None:
            raise InvalidInput(f"there is no trial {number!r} in {self.name!r}; {self._range()}")
        return found

    def attempts(self, number: int) -> list[Attempt]:
        """Return every attempt of a trial, oldest first, with its original error and traceback; InvalidInput for no trial."""
        trial = self.trial(number).number
        return list(self._reader.attempts(first=trial, last=trial)[trial].values())

    def _range(self) -> str:
        count = sum(self.counts().values())
        return f"it has the trials 0 to {count - 1}" if count else "it has none yet"

    def best_trial(
        self, scope: str = "last", *, weights: Mapping[str, float] | None = None, scalarisation: str = "sum"
    ) -> Trial | None:
        """Return the COMPLETED or PRUNED trial with the best finite first objective (ties: the earliest), or None.

        Infeasible trials are none. Of repeats of one config the aggregate counts, and the first of them is returned. ``scope``
        says which value of a trial counts: ``last``, its final metrics (every objective has to be finite there); ``best``, the
        best one of its final metrics and its canonical reports.

        With ``weights`` all objectives count: from 0 (the best value among the candidates) to 1 (the worst one), weighted and
        made one number by their sum, or with ``scalarisation="chebyshev"`` by their maximum. InvalidInput for names that are
        no objectives, numbers below 0 or all 0, and with ``scope="best"``.
        """
        if scope not in SCOPES:
            raise InvalidInput(f"scope is {scope!r}; allowed: {', '.join(SCOPES)}")
        trials, spec = self.trials, self.spec
        if scope == "last":
            order = ranked(candidates_of(trials, spec), spec.goals, weights, scalarisation)
            return order[0][1].trial if order else None
        if weights is not None:
            raise InvalidInput("weights are for scope last: the best values of several objectives are of different steps")
        first = spec.goals[:1]
        reached = {trial.number: scores(trial.metrics, first) for trial in trials if trial.status in SCORED}
        for row in self.history():
            values = scores(row.metrics, first) if row.canonical and row.trial in reached else None
            before = reached.get(row.trial)
            if values is not None and (before is None or first[0].better(values[0], before[0])):
                reached[row.trial] = values
        best = candidates(trials, first, spec.feasible, spec.search.aggregate, values=lambda trial: reached.get(trial.number))
        return ranked(best, first)[0][1].trial if best else None

    def pareto_front(self) -> list[Trial]:
        """Return the COMPLETED and PRUNED trials that no other one dominates, in number order; equal ones are all kept.

        What counts is the final metrics; a trial that is infeasible, or lacks a finite value of an objective, is no candidate.
        Of repeats of one config the aggregates count, and the first of them is returned.
        """
        return [candidate.trial for candidate in front_of(candidates_of(self.trials, self.spec), self.objectives)]

    def reference_point(self) -> dict[str, float] | None:
        """Return up to which value of each objective the hypervolume counts: as the spec says, else the worst ones seen.

        None when the spec says nothing and some objective has no finite value yet.
        """
        point = reference_point(self.trials, self.spec)
        return None if point is None else dict(zip(self.spec.objectives, point, strict=True))

    def hypervolume(self) -> float:
        """Return the hypervolume of the Pareto front, exactly; 0 while it is empty."""
        trials = self.trials
        return volume_of(candidates_of(trials, self.spec), self.objectives, reference_point(trials, self.spec))

    def load(self, last_trial_id: int = -1) -> LoadedTrials:
        """Return the trials that have ended with or without scores, as four lists.

        COMPLETED and PRUNED ones have their metrics as scores, FAILED and TIMED_OUT ones None; others are not listed. Without
        ``last_trial_id`` the merged trials follow the experiment's own: under the numbers that they have where they come from
        (see ``.origins``), what their configs lack filled in from the defaults of the space; ``.left_out`` counts those
        that lack a parameter without default. With it, only own trials with higher numbers are listed.
        """
        if last_trial_id != -1 and not _is_number(last_trial_id):
            raise InvalidInput(f"last_trial_id is {last_trial_id!r}; it is a trial's number, or -1 for all")
        own = LoadedTrials(*load(self._reader, first=last_trial_id + 1))
        if last_trial_id >= 0:
            return own
        found = reversed(self._reader.trials(first=-ALL, last=-1))
        copies = [(trial, self.space.completed(trial.config)) for trial in found]
        merged = [replace(trial, config=config) for trial, config in copies if config is not None]
        return own.followed_by(listed(merged, left_out=len(copies) - len(merged)))

    def load_since(self, cursor: int = 0) -> LoadedTrials:
        """Return the own trials that ended after ``cursor``, in the order in which they ended, and with them the next cursor.

        A trial that ends late is not missed: ``loaded = e.load_since(loaded.cursor)`` returns each one once for each time
        that it ends (a restore can let an errored one run again). 0 is the beginning.
        """
        if not _is_number(cursor):
            raise InvalidInput(f"cursor is {cursor!r}; give 0, or the .cursor of the load before")
        order = self._reader.ended_since(cursor)
        changed = {trial.number: trial for trial in self._reader.trials(since=cursor)} if order else {}
        # What was ended a moment ago and runs again by now comes with its next end.
        ended = [changed[number] for number, _ in order if number in changed and changed[number].status in LISTED]
        return replace(listed(ended), cursor=order[-1][1] if order else cursor)

    def pending_trials(self, timestamp: datetime, *, running: bool) -> list[Trial]:
        """Return the waiting trials that are due at ``timestamp`` (inclusive; aware), with running ones when asked."""
        if not isinstance(timestamp, datetime):
            raise InvalidInput(f"timestamp is a {type(timestamp).__name__}; give a datetime with a time zone")
        if timestamp.utcoffset() is None:
            raise InvalidInput(f"timestamp {timestamp.isoformat()} has no time zone; add one")
        wanted = ACTIVE if running else {TrialStatus.PENDING}
        return [
            trial
            for trial in queueing.active(self._reader)
            if trial.status in wanted and (trial.ts_start is None or trial.ts_start <= timestamp)
        ]

    def new_trial(
        self,
        config: Mapping[str, Scalar],
        ts_start: datetime | None = None,
        metadata: Mapping[str, Json] | Iterable[tuple[str, Json]] | None = None,
    ) -> Trial:
        """Queue one trial of ``config`` and return it; see :meth:`enqueue`."""
        return self.enqueue(config, ts_start, metadata=metadata)[0]

    def enqueue(
        self,
        config: Mapping[str, Scalar],
        ts_start: datetime | None = None,
        repeats: int = 1,
        metadata: Mapping[str, Json] | Iterable[tuple[str, Json]] | None = None,
    ) -> list[Trial]:
        """Queue ``repeats`` trials of one config and return them: one group, separate trials with numbers of their own.

        The running search starts them before it proposes anything, the next restore if nobody drives; not before
        ``ts_start`` (aware). They count against ``num_trials``, and run also when it is used up. ``metadata`` is kept with
        each: JSON values by name, or pairs.

        Raises InvalidConfig for what is no config of the space, InvalidInput for a naive time, a key of the metadata that is
        given twice, a number of repeats below 1. Nothing is written then.
        """
        numbers = queueing.enqueue(
            self._writable(),
            self._opened.record.id,
            queueing.checked_config(self.space, config),
            seed=self._opened.record.seed,
            repeats=queueing.checked_repeats(repeats),
            ts_start=queueing.checked_start(ts_start),
            metadata=queueing.checked_metadata(metadata),
        )
        return self._reader.trials(first=numbers[0], last=numbers[-1])

    def merge(self, experiments: Iterable[str]) -> dict[str, int]:
        """Copy the finished trials of other experiments of the database into this one; return how many, by name.

        ``experiments`` are names or UUIDs. COMPLETED, PRUNED, FAILED and TIMED_OUT trials warm the proposer up, now and after
        every restore; they are none of this experiment's own trials and come from :meth:`load`. What was merged before is not
        merged again. A running search knows them as soon as it looks at its trials the next time.

        Raises InvalidInput for experiments that are not there, SpecError with the difference where parameters, values or
        objectives do not fit. Nothing is written then.
        """
        names = experiments if isinstance(experiments, str) else list(experiments)
        return merging.merge(self._writable(), self._opened.record.id, self.spec, self.id, names)

    def telemetry(self) -> list[tuple[int, datetime, str, Any]]:
        """Return every trial's measurements: (trial, UTC time, name, value), ordered by trial, time and name."""
        return self._reader.telemetry()

    def load_telemetry(self, trial: int) -> list[tuple[datetime, str, Any]]:
        """Return a trial's measurements: (UTC time, name, value), ordered by time and name; InvalidInput for no trial."""
        rows = self._reader.telemetry(first=trial, last=trial) if _is_number(trial) else []
        if not rows:
            self.trial(trial)
        return [row[1:] for row in rows]

    def load_config(self, config_id: int) -> Config:
        """Return the config of an id; InvalidInput when there is none."""
        found = self._reader.config(config_id) if _is_number(config_id) else None
        if found is None:
            raise InvalidInput(f"there is no config {config_id!r}; trials have .config_id")
        return found

    def checkpoints(self) -> list[Checkpoint]:
        """Return every checkpoint's row by trial, attempt and step."""
        return self._reader.checkpoints()

    def load_checkpoint(self, trial: int, step: int | None = None, *, strict: bool = False) -> Loaded:
        """Return the newest good checkpoint of a trial, or that of ``step``: ``.step .metrics .state .path``.

        It is one that a resumed attempt could continue from, verified while it is read. A bad one is logged as a warning, and
        the one before it is taken; with ``strict`` it raises. Files of the user's own may be pruned later: see :meth:`pin`.
        Raises CheckpointNotFound, CheckpointCorrupt or NotACheckpoint, and StorageError where disk or store refuse.
        """
        number = self.trial(trial).number
        return upkeep.load_checkpoint(self._opened, number, None if step is None else check_step(step), strict=strict)

    def pin(self, trial: int, step: int, attempt: int | None = None) -> None:
        """Keep a trial's checkpoint of a step whatever the rules of retention say; also while somebody drives.

        It is the newest valid one of that step that counts, or the one that ``attempt`` saved. CheckpointNotFound when there
        is none. Once this has returned, it is not pruned, and the path says so, whatever becomes of the database.
        """
        self._pin(trial, step, attempt, pinned=True)

    def unpin(self, trial: int, step: int, attempt: int | None = None) -> None:
        """Leave a checkpoint to the rules of retention again; see :meth:`pin`."""
        self._pin(trial, step, attempt, pinned=False)

    def _pin(self, trial: int, step: int, attempt: int | None, *, pinned: bool) -> None:
        self.trial(trial)
        if attempt is not None and not _is_number(attempt):
            raise InvalidInput(f"attempt is {attempt!r}; it is the number of an attempt, from 1, or None")
        self._writable()
        upkeep.pin(self._opened, trial, step, attempt, pinned=pinned)

    def gc(self, dry_run: bool = False, *, corrupt: bool = False) -> Collected:
        """Remove what dead attempts left: staged and half deleted checkpoints, those that no row names, temporary files.

        Foreign files stay, and so do pinned checkpoints and, unless ``corrupt``, those that were found bad. With ``dry_run``
        nothing is written. Raises LeaseHeld at once when somebody drives the experiment.
        """
        return upkeep.collect(self._opened, corrupt=corrupt, dry_run=dry_run)

    def history(self) -> list[ReportRow]:
        """Return every report by trial, step and attempt; superseded ones are flagged."""
        return self._reader.history()

    def audit(self) -> list[AuditRow]:
        """Return who did what to the experiment, oldest first."""
        return self._reader.audit()

    def lineage(self) -> list[LineageRow]:
        """Return who went on from whom in a population, by generation and trial; empty for other searches."""
        return lineage_of(self.audit())

    def lineage_df(self) -> pd.DataFrame:
        """Return one row a change of a member: generation, trial, attempt, from_trial, from_step, changes (text)."""
        return lineage_df(self.lineage())

    def results_df(self, *, aggregate: str | None = None) -> pd.DataFrame:
        """Return one row a trial: trial, status, group, repeat, config.<param>, metric.<name>, step, attempts, error.

        Every parameter of the space and every objective has its column, whether a trial has a value or not. With
        ``aggregate`` (mean, median, min, max, std) one row a group of repeats: group, the counts trials, scored and errored,
        config.<param>, and metric.<name> over the numbers of its COMPLETED and PRUNED trials (NaN is left out).

        A spec with conditions on metrics adds feasible (bool). Several objectives add pareto (bool, see :meth:`pareto_front`)
        and hypervolume: of the front when a trial had ended, in the order of their ends; ``.attrs["reference_point"]`` says
        up to where.
        """
        return results_df(self.trials, self.spec, aggregate=aggregate, ended=ended_in(self._reader, self.spec))

    def groups_df(self) -> pd.DataFrame:
        """Return one row a group of repeats: group, trials, scored, errored, config.<param>, and of each objective its
        metric.<name>.mean, .median, .std and .worst over the numbers of COMPLETED and PRUNED trials (NaN is left out).
        """
        return groups_df(self.trials, self.spec)

    def history_df(self) -> pd.DataFrame:
        """Return one row a report: trial, attempt, step, reported, canonical, metric.<name> columns."""
        return history_df(self.history(), self.spec)

    def telemetry_df(self) -> pd.DataFrame:
        """Return one row a measurement: trial, time (UTC), name, value."""
        return telemetry_df(self.telemetry())

    def _writable(self) -> Database:
        """Return the database, to ask for something in it; LeaseHeld when the experiment is driven with another one."""
        elsewhere = driven_elsewhere(self._opened.folder, self._opened.database, self._opened.record)
        if elsewhere is not None:
            raise LeaseHeld(f"{self.name} is driven with the database {elsewhere}; ask there, by --database")
        return self._opened.database

    def export(self, file: str | Path) -> int:
        """Write the rows into ``file``, for :func:`holdfast.import_experiment`; return how many trials it holds.

        One state of the experiment, also while it is driven; checkpoints and results stay where they are.
        """
        return export(self._opened, Path(file))

    def fork(self, name: str, **how: Any) -> Experiment:
        """Return a new experiment from the state of this one: at_trial, storage, changes as for :func:`holdfast.fork`."""
        return Experiment(fork_of(self._opened, name, **how))

    def stop(self, *, wait: float = 0.0) -> bool:
        """Ask the driver to save and stop; wait up to ``wait`` seconds. Return whether nobody drives it now.

        A driver of this host whose process is gone drives no more, whatever its lease says.
        """
        database = self._writable()
        if not upkeep.driven(self._opened):
            return True
        requests.request_stop(database, self._opened.record.id)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and upkeep.driven(self._opened):
            time.sleep(0.2)
        return not upkeep.driven(self._opened)

    def cancel(self, trial: int) -> None:
        """Ask for one waiting or running trial to be ended; Conflict when it has ended already."""
        requests.request_cancel(self._writable(), self._opened.record.id, trial)


def _is_number(value: object) -> bool:
    """Tell whether ``value`` can be the number of a row; merged trials have numbers below 0, which are nobody's business."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < ALL


def _statuses(given: TrialStatus | str | Iterable[TrialStatus | str]) -> frozenset[TrialStatus]:
    names = [given] if isinstance(given, str) else list(given)
    try:
        return frozenset(TrialStatus(name) for name in names)
    except ValueError:
        raise InvalidInput(f"status is {given!r}; allowed: {', '.join(TrialStatus)}") from None
