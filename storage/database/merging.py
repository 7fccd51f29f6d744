"""Merging: finished trials of other experiments of the database, copied into one as what its proposer already knows.

A copy has a number below 0 (its own trials are dense from 0), one closed attempt, and a final record with the metrics that
its original had. It keeps the original's config: what that lacks in this space is filled in when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import text

from holdfast.core.errors import InvalidConfig, InvalidInput, SpecError
from holdfast.core.seeding import derive
from holdfast.core.space import Space
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ERRORED, SCORED, Trial
from holdfast.core.values import dumps
from holdfast.storage.database import experiments
from holdfast.storage.database import statements as sql
from holdfast.storage.database.driver import add_audit
from holdfast.storage.database.engine import Database, Statement, Transaction
from holdfast.storage.database.experiments import Record
from holdfast.storage.database.reads import Reader
from holdfast.storage.database.requests import begin_request
from holdfast.storage.database.rows import FINAL_STEP, add_metrics, micros, now, storable

SHOWN = 8
"""How many lines of a difference an error shows."""


def _sql(body: str) -> Statement:
    return Statement(text(body))


_ORIGINS = _sql("SELECT origin FROM trial WHERE experiment_id = :experiment AND number < 0")

_LOWEST = _sql("SELECT COALESCE(MIN(number), 0) FROM trial WHERE experiment_id = :experiment AND number < 0")

_ADD_TRIAL = _sql(
    "INSERT INTO trial (experiment_id, number, config_id, status, seq, ended_seq, current_attempt, seed, repeat, created,"
    " source, origin, metadata, cancel_requested)"
    " VALUES (:experiment, :number, :config, :status, :seq, :seq, 1, :seed, 0, :created,"
    " 'merged', :origin, :metadata, 0) RETURNING id"
)

_ADD_ATTEMPT = _sql(
    "INSERT INTO attempt (trial_id, number, config_id, reason, note, created, ended, outcome, error_kind, error, traceback)"
    " VALUES (:trial, 1, :config, 'first', :note, :created, :ended, :outcome, :error_kind, :error, :traceback) RETURNING id"
)


@dataclass(frozen=True)
class Source:
    """An experiment to be merged, with its finished trials; found to be compatible."""

    record: Record
    trials: Sequence[Trial]


@dataclass(frozen=True)
class Origin:
    """Which trial a merged one is a copy of."""

    name: str
    number: int
    uuid: str

    def __str__(self) -> str:
        return f"{self.name}#{self.number}@{self.uuid}"

    @classmethod
    def parse(cls, text: str) -> Origin:
        """Read what ``str`` wrote; a name may hold any of its signs."""
        rest, _, uuid = text.rpartition("@")
        name, _, number = rest.rpartition("#")
        return cls(name, int(number), uuid)


def sources(database: Database, spec: ExperimentSpec, names: Sequence[str], *, uuid: str | None = None) -> list[Source]:
    """Find experiments by name or UUID, and check that their finished trials fit ``spec``; changes nothing.

    InvalidInput for a name that the database does not know, or the experiment's own (``uuid``); SpecError with the difference
    where objectives, parameters or values do not fit.
    """
    if isinstance(names, str):
        raise InvalidInput(f"merge takes a list of experiments, not the text {names!r}; write [{names!r}]")
    found: dict[str, Record] = {}
    for name in names:
        record = experiments.by_name(database, str(name)) or experiments.by_uuid(database, str(name))
        if record is None:
            known = ", ".join(repr(other.name) for other in experiments.every(database) if other.uuid != uuid)
            raise InvalidInput(f"merge: there is no experiment {name!r} in {database.label}; it has {known or 'no other'}")
        if record.uuid == uuid:
            raise InvalidInput(f"merge: {name!r} is this experiment itself; name others")
        found[record.uuid] = record
    return [_source(database, spec, record) for record in found.values()]


def _source(database: Database, spec: ExperimentSpec, record: Record) -> Source:
    theirs = ExperimentSpec.parse(record.spec, source=f"stored spec of {record.name}")
    trials = [trial for trial in Reader(database, record.id).trials() if trial.status in SCORED | ERRORED]
    lines = _objective_lines(spec, theirs) + _space_lines(spec.space, theirs.space) + _value_lines(spec.space, trials)
    if lines:
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        shown = "\n".join(lines[:SHOWN] + more)
        raise SpecError(f"merge: {record.name!r} does not fit (this experiment's / its own); nothing was merged:\n{shown}")
    return Source(record, trials)


def _objective_lines(ours: ExperimentSpec, theirs: ExperimentSpec) -> list[str]:
    if ours.objectives == theirs.objectives:  # in any order: scores have names
        return []
    left, right = (
        "{" + ", ".join(f"{name}: {direction}" for name, direction in spec.objectives.items()) + "}" for spec in (ours, theirs)
    )
    return [f"objectives: {left} / {right}"]


def _space_lines(ours: Space, theirs: Space) -> list[str]:
    unknown = set(theirs.parameters) - set(ours.parameters)
    return [line for line in ours.difference(theirs) if line.partition(":")[0] in unknown]


def _value_lines(space: Space, trials: Sequence[Trial]) -> list[str]:
    lines = []
    for trial in trials:
        known = {name: value for name, value in trial.config.items() if name in space.parameters}  # others are named once
        try:
            space.completed(known)
        except InvalidConfig as error:
            lines.append(f"its trial {trial.number}: {str(error).removeprefix('config: ')}")
    return lines


def merge(database: Database, experiment: int, spec: ExperimentSpec, uuid: str, names: Sequence[str]) -> dict[str, int]:
    """Copy the finished trials of other experiments that are not there yet; return how many were added, by name.

    Needs no lease. One transaction: what is refused leaves nothing; see :func:`sources` for what is.
    """
    found = sources(database, spec, names, uuid=uuid)
    with database.write() as tx:
        seq, epoch = begin_request(tx, experiment)
        added = add_sources(tx, experiment, seq, spec, found)
        detail = [
            {"name": source.record.name, "uuid": source.record.uuid, "trials": added[source.record.name]} for source in found
        ]
        add_audit(tx, experiment, seq, epoch, "merged", {"experiments": detail})
    return added


def add_sources(tx: Transaction, experiment: int, seq: int, spec: ExperimentSpec, found: Sequence[Source]) -> dict[str, int]:
    """Insert the copies into an open transaction; return how many, by the name of the experiment."""
    origins = [Origin.parse(row[0]) for row in tx.run(_ORIGINS, experiment=experiment)]
    there = {(origin.uuid, origin.number) for origin in origins}
    number = int(tx.run(_LOWEST, experiment=experiment)[0][0])
    added = {}
    for source in found:
        fresh = [trial for trial in source.trials if (source.record.uuid, trial.number) not in there]
        for trial in fresh:
            number -= 1
            _add_copy(tx, experiment, seq, number, trial, Origin(source.record.name, trial.number, source.record.uuid))
        added[source.record.name] = len(fresh)
    return added


def _add_copy(tx: Transaction, experiment: int, seq: int, number: int, trial: Trial, origin: Origin) -> None:
    created = now()
    row = tx.run(
        _ADD_TRIAL,
        experiment=experiment,
        number=number,
        config=trial.config_id,
        status=trial.status.value,
        seq=seq,
        seed=derive(trial.seed, "merged"),
        created=created,
        origin=str(origin),
        metadata=dumps(trial.metadata),
    )[0][0]
    error, ended, outcome = trial.error, trial.attempt.ended, trial.attempt.outcome
    assert outcome is not None  # the current attempt of a trial that has ended is closed
    attempt = tx.run(
        _ADD_ATTEMPT,
        trial=row,
        config=trial.config_id,
        note=f"merged from {storable(str(origin))}",
        created=created,
        ended=created if ended is None else micros(ended),
        outcome=outcome.value,
        error_kind=error.kind if error else None,
        error=error.message if error else None,
        traceback=error.traceback if error else None,
    )[0][0]
    if trial.metrics:
        report = tx.run(sql.ADD_REPORT, attempt=attempt, step=FINAL_STEP, seq=seq, reported=created, decision="final")
        add_metrics(tx, report[0][0], trial.metrics)
