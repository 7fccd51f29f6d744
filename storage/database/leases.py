"""The lease in the database: taken by raising the epoch, renewed by its holder, judged by the database's clock."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from holdfast.core.errors import ExperimentNotFound, Fenced, LeaseHeld
from holdfast.core.values import Json, dumps
from holdfast.storage.database import statements as sql
from holdfast.storage.database.driver import add_audit
from holdfast.storage.database.engine import Database, Statement
from holdfast.storage.database.losses import repeatable


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How long a lease lasts, in seconds."""

    duration: float = 30.0
    """without a renewal"""
    renewal: float = 5.0
    """between renewals"""


TERMS = Terms()


def describe(holder: Mapping[str, Any]) -> str:
    """Say who a holder is."""
    return f"process {holder.get('pid')} on {holder.get('hostname')}"


def held(holder: Mapping[str, Any] | None, remaining: float) -> LeaseHeld:
    """Return the refusal that names a holder and its seconds; without a holder, it came and went while we looked."""
    if holder is None:
        return LeaseHeld("another process took the experiment at the same moment; nothing was changed")
    return LeaseHeld(
        f"{describe(holder)} drives the experiment; its lease runs {max(remaining, 0):.0f} s unless renewed; "
        "wait for it, end it with `holdfast stop`, or take over with `holdfast restore --force`"
    )


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Who drives an experiment, as the database says."""

    epoch: int
    holder: dict[str, Any] | None
    remaining: float
    """seconds until it ends, by the database's clock; 0 or less: it ended"""
    renewed: float
    """when it was last renewed, by the database's clock"""

    @property
    def is_held(self) -> bool:
        return self.holder is not None and self.remaining > 0


class Leases:
    """The lease of one experiment."""

    def __init__(self, database: Database, experiment: int, terms: Terms = TERMS) -> None:
        self._database = database
        self._duration = terms.duration
        self._experiment = experiment
        clock = database.clock
        self._look = Statement(
            text(
                f"SELECT epoch, holder, lease_expires - {clock}, COALESCE(lease_renewed, 0) FROM experiment"
                " WHERE id = :experiment"
            )
        )
        self._take = Statement(
            text(
                "UPDATE experiment SET seq = seq + 1, epoch = :epoch, holder = :holder, stop_requested = 0,"
                " told = 'continue', journaled = -1,"
                " ended = CASE WHEN :drives = 1 THEN NULL ELSE ended END,"
                f" lease_renewed = {clock}, lease_expires = {clock} + :duration"
                " WHERE id = :experiment AND epoch = :seen RETURNING seq"
            )
        )
        self._renew = Statement(
            text(
                f"UPDATE experiment SET lease_renewed = {clock}, lease_expires = {clock} + :duration,"
                " active_seconds = active_seconds + :active, journaled = COALESCE(:journaled, journaled)"
                " WHERE id = :experiment AND epoch = :epoch RETURNING seq, stop_requested, active_seconds"
            )
        )

    def look(self) -> Lease:
        """Return the lease as it stands; ExperimentNotFound when its experiment is gone."""
        return self._read(self._database.run(self._look, experiment=self._experiment))

    @staticmethod
    def _read(rows: Sequence[tuple[Any, ...]]) -> Lease:
        if not rows:
            raise ExperimentNotFound("the experiment's row is gone from the database; it was deleted meanwhile")
        epoch, holder, remaining, renewed = rows[0]
        return Lease(
            epoch=epoch,
            holder=json.loads(holder) if holder else None,
            remaining=float(remaining) if remaining is not None else 0.0,
            renewed=float(renewed),
        )

    @repeatable
    def take(
        self,
        *,
        seen: int,
        epoch: int,
        holder: Mapping[str, Json],
        action: str,
        detail: Mapping[str, Json],
        drives: bool = True,
    ) -> None:
        """Take the lease for ``epoch`` if its epoch still is ``seen``, with an audit row; LeaseHeld when it is not.

        Who does not drive leaves what ended the last drive as it is. What workers were told is forgotten.
        """
        with self._database.write() as tx:
            rows = tx.run(
                self._take,
                experiment=self._experiment,
                seen=seen,
                epoch=epoch,
                holder=dumps(dict(holder)),
                duration=self._duration,
                drives=int(drives),
            )
            if not rows:
                faster = self._read(tx.run(self._look, experiment=self._experiment))
                raise held(faster.holder, faster.remaining)
            add_audit(tx, self._experiment, rows[0][0], epoch, action, detail)

    def renew(self, *, epoch: int, active: float, journaled: int | None = None) -> tuple[int, bool, float]:
        """Renew the lease and add ``active`` seconds; return (seq, whether a stop is requested, all active seconds).

        ``journaled`` is the seq that the journal reaches, to be told to workers; None: as it was.
        """
        with self._database.write() as tx:
            rows = tx.run(
                self._renew,
                experiment=self._experiment,
                epoch=epoch,
                duration=self._duration,
                active=active,
                journaled=journaled,
            )
        if not rows:
            raise Fenced(f"epoch {epoch} is over: another process took the experiment over")
        return int(rows[0][0]), bool(rows[0][1]), float(rows[0][2])

    @repeatable
    def release(self, *, epoch: int, active: float, ended: str | None) -> None:
        """Give the lease back, noting why the drive ended."""
        with self._database.write() as tx:
            if not tx.run(sql.RELEASE, experiment=self._experiment, epoch=epoch, active=active, ended=ended):
                raise Fenced(f"epoch {epoch} is over: another process took the experiment over")
