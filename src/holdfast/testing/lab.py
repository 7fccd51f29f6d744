"""An experiment in a database, driven by hand; and what it takes to see that nothing in it changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from sqlalchemy import select

from holdfast.core.trial import Attempt, ErrorInfo, Outcome, Trial, TrialStatus
from holdfast.storage.database import experiments
from holdfast.storage.database.attempts import AttemptWriter, Saved
from holdfast.storage.database.driver import Driver, Ending, add_trial
from holdfast.storage.database.engine import Database
from holdfast.storage.database.experiments import Record
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.reads import Reader
from holdfast.storage.database.requests import begin_request
from holdfast.storage.database.schema import metadata
from holdfast.testing.samples import sample_spec

TYPED: dict[str, Any] = {
    "int": 3,
    "float": 0.1,
    "whole": 3.0,
    "true": True,
    "text": "3",
    "empty": "",
    "none": None,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-0": -0.0,
    "tiny": 5e-324,
    "exact": 2**53 + 1,
    "large": 2**60,
    "huge": -(10**40),
    "nested": {"a": [1, 1.0, True, None, {"b": math.nan}], "ü": "ß"},
    "list": [],
    "null byte": "a\0b",
    "surrogate": "caf\udce9",
    "surrogates": ["caf\udce9"],
    "'; DROP TABLE trial; --": 1,
}
"""Every kind of value that a metric can have."""


def dump(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of every table."""
    with database.read() as connection:
        return {
            name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
            for name, table in metadata.tables.items()
        }


def same(left: Any, right: Any) -> bool:
    """Compare with types, and NaN with itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right or (left != left and right != right))


@dataclass
class Lab:
    """One experiment, driven by hand."""

    database: Database
    record: Record
    epoch: int = 1

    @classmethod
    def new(cls, database: Database, name: str) -> Self:
        """Create an experiment, and take its lease for epoch 1."""
        spec = sample_spec(name=name)
        record = experiments.create(database, spec, uuid=f"uuid-{name}", location=f"/nowhere/{name}", seed=7, workdir="/")
        Leases(database, record.id).take(seen=0, epoch=1, holder={"pid": 1}, action="started", detail={})
        return cls(database, record)

    @property
    def id(self) -> int:
        return self.record.id

    @property
    def driver(self) -> Driver:
        return Driver(self.database, self.id, self.epoch, seed=self.record.seed)

    @property
    def reader(self) -> Reader:
        return Reader(self.database, self.id)

    def take_over(self) -> None:
        """Let somebody else take the lease."""
        leases = Leases(self.database, self.id)
        leases.take(seen=self.epoch, epoch=self.epoch + 1, holder={"pid": 2}, action="restored", detail={})

    def row(self, number: int) -> int:
        return self.reader.trial_ids()[number]

    def trial(self, number: int) -> Trial:
        found = self.reader.trial(number)
        assert found is not None
        return found

    def attempts(self, number: int) -> dict[int, Attempt]:
        return self.reader.attempts(first=number, last=number)[number]

    def queue(self, start: datetime | None) -> int:
        """Add a trial as a person does, to be started at ``start``; return its number."""
        with self.database.write() as tx:
            seq, _ = begin_request(tx, self.id)
            return add_trial(tx, self.id, seq, {"x": 0.5}, seed=7, source="queued", ts_start=start)

    def claim(self, number: int, *, token: str = "token") -> AttemptWriter:
        return AttemptWriter.claim(self.database, self.id, self.epoch, self.trial(number).attempt.id, token=token)

    def writer(self, number: int) -> AttemptWriter:
        """Return the writer of a trial's running attempt, which was claimed with the token of :meth:`claim`."""
        return AttemptWriter(
            database=self.database,
            experiment=self.id,
            epoch=self.epoch,
            attempt=self.trial(number).attempt.id,
            trial=self.row(number),
            number=self.trial(number).attempt.number,
            token="token",
        )

    def started(self, x: float = 0.5) -> AttemptWriter:
        """Propose a trial and claim its attempt."""
        return self.claim(self.driver.propose({"x": x}))

    def end(self, writer: AttemptWriter, outcome: Outcome = Outcome.COMPLETED, **metrics: Any) -> TrialStatus:
        return self.driver.end(writer.attempt, Ending(outcome=outcome, metrics=metrics or None))

    def save(self, writer: AttemptWriter, step: int, **metrics: Any) -> None:
        """Report a step and its checkpoint."""
        path = f"trials/000000/checkpoints/step_{step:08d}-a{writer.number}-0000"
        writer.report(step, metrics or {"loss": float(step)}, saved=Saved(path=path, digest="d", bytes=1))


ERROR = ErrorInfo(kind="ValueError", message="bad", traceback="Traceback ...")
FAILED = Ending(outcome=Outcome.FAILED, error=ERROR)
