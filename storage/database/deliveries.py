"""Deliveries that a webhook receiver has taken: who works on each, what was answered, and which experiment is being started.

Two small tables of their own, in a SQLite file or on a server; several receivers may share them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import text

from holdfast.core.values import Json
from holdfast.storage.atomic import make_folder
from holdfast.storage.database.engine import Location, Statement, connect, parse_url, sqlite_url
from holdfast.storage.database.losses import repeatable

Gone = Callable[[Mapping[str, Any]], bool]
"""Tells of a process that works on a delivery whether it is gone for certain."""


def _sql(body: str) -> Statement:
    return Statement(text(body))


# ``signed`` is what the signature covers of a delivery's identity: the digest of the body where it does not cover the id.
_TABLES = (
    _sql(
        "CREATE TABLE IF NOT EXISTS webhook_delivery (hook VARCHAR(200) NOT NULL, id VARCHAR(300) NOT NULL,"
        " digest VARCHAR(64) NOT NULL, signed VARCHAR(64), expires DOUBLE PRECISION NOT NULL, worker TEXT NOT NULL,"
        " until DOUBLE PRECISION NOT NULL, tries INTEGER NOT NULL, answer TEXT, PRIMARY KEY (hook, id), UNIQUE (hook, signed))"
    ),
    _sql("CREATE INDEX IF NOT EXISTS webhook_delivery_expires ON webhook_delivery (expires)"),
    _sql(
        "CREATE TABLE IF NOT EXISTS webhook_handover (place TEXT PRIMARY KEY, worker TEXT NOT NULL,"
        " until DOUBLE PRECISION NOT NULL)"
    ),
)
_LOCK = _sql("SELECT pg_advisory_xact_lock(7522537965568948036)")
_PURGE = _sql("DELETE FROM webhook_delivery WHERE expires < :now")
_COUNT = _sql("SELECT COUNT(*), MIN(expires) FROM webhook_delivery")
# Without a target: the id is taken, or the signed body is. On PostgreSQL the loser waits here for the winner's commit.
_ADD = _sql(
    "INSERT INTO webhook_delivery (hook, id, digest, signed, expires, worker, until, tries)"
    " VALUES (:hook, :id, :digest, :signed, :expires, :worker, :until, 1) ON CONFLICT DO NOTHING RETURNING tries"
)
_FIND = _sql("SELECT digest, worker, until, answer, tries FROM webhook_delivery WHERE hook = :hook AND id = :id")
_CLAIM = _sql(
    "UPDATE webhook_delivery SET worker = :worker, until = :until, tries = tries + 1"
    " WHERE hook = :hook AND id = :id AND answer IS NULL AND worker = :before RETURNING tries"
)
_ANSWER = _sql(
    "UPDATE webhook_delivery SET answer = :answer, until = 0 WHERE hook = :hook AND id = :id AND worker = :worker"
    " AND answer IS NULL RETURNING tries"
)
_RELEASE = _sql("UPDATE webhook_delivery SET until = 0 WHERE hook = :hook AND id = :id AND worker = :worker AND answer IS NULL")
_FORGET = _sql("DELETE FROM webhook_delivery WHERE hook = :hook AND id = :id AND worker = :worker AND answer IS NULL")
_HAND = _sql(
    "INSERT INTO webhook_handover (place, worker, until) VALUES (:place, :worker, :until)"
    " ON CONFLICT (place) DO UPDATE SET worker = excluded.worker, until = excluded.until"
    " WHERE webhook_handover.worker = excluded.worker OR webhook_handover.until < :now"
    " OR webhook_handover.worker = :dead RETURNING worker"
)
_HANDING = _sql("SELECT worker FROM webhook_handover WHERE place = :place")
_HANDED = _sql("DELETE FROM webhook_handover WHERE place = :place AND worker = :worker")
_ALL = _sql("SELECT hook, id, answer FROM webhook_delivery ORDER BY hook, id")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What came in, by its names alone: the body itself is not kept."""

    hook: str
    id: str
    digest: str
    """of the body"""
    signed: str | None = None
    """the digest again, where the signature covers the body and not the id: it counts once, whatever id it comes with"""


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """It is ours to answer."""

    tries: int
    """1 for a delivery that nobody has worked on before"""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """It was answered before."""

    answer: dict[str, Json]


@dataclass(frozen=True, kw_only=True)
class Busy:
    """Somebody else works on it at this moment."""

    seconds: float
    """until that one is given up"""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """It is not what it says: ``why`` is "other-body" (the id was another body's) or "replayed" (the body had another id)."""

    why: str


@dataclass(frozen=True, kw_only=True)
class Full:
    """No more deliveries can be remembered, so none can be taken."""

    seconds: float
    """until the oldest one is forgotten"""


Verdict = Claimed | Answered | Busy | Refused | Full


class Deliveries:
    """The deliveries of all hooks of one or several receivers.

    A delivery is claimed by one worker at a time, for ``seconds``; a worker of this host whose process is ``gone`` has no
    claim. An answer is stored once and never changed. Each is remembered for ``retention`` seconds by the database's clock,
    at most ``most`` of them: forgetting one early would let it be replayed, so a full store takes no more.
    """

    def __init__(
        self,
        location: Location | Path,
        *,
        retention: float = 7 * 86400.0,
        most: int = 100_000,
        seconds: float = 60.0,
        gone: Gone = lambda who: False,
    ) -> None:
        place: Location = sqlite_url(location) if isinstance(location, Path) else location
        url = parse_url(place) if isinstance(place, str) else place
        if url.get_backend_name() == "sqlite":
            make_folder(Path(str(url.database)).absolute().parent)
        self._database = connect(url, create=True)
        self._retention, self._most, self._seconds, self._gone = retention, most, seconds, gone
        self._now = Statement(text(f"SELECT {self._database.clock}"))
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    @property
    def label(self) -> str:
        """Where they are, without passwords."""
        return self._database.label

    @repeatable
    def _make(self) -> None:
        with self._database.read():
            pass  # makes a SQLite file that is not there yet
        with self._database.write() as tx:
            if not self._database.is_sqlite:
                tx.run(_LOCK)  # IF NOT EXISTS alone races there
            for statement in _TABLES:
                tx.run(statement)

    @repeatable
    def claim(self, delivery: Delivery, worker: Mapping[str, Json]) -> Verdict:
        """Claim a delivery for ``worker``, which says who works on it and is unlike any other's; or say why that cannot be."""
        key: dict[str, Any] = {"hook": delivery.hook, "id": delivery.id}
        me = json.dumps(worker, sort_keys=True)
        with self._database.write() as tx:
            now = float(tx.run(self._now)[0][0])
            tx.run(_PURGE, now=now)
            found = tx.run(_FIND, **key)
            if not found:
                count, oldest = tx.run(_COUNT)[0]
                if count >= self._most:
                    return Full(seconds=max(float(oldest) - now, 1.0))
                expires, until = now + self._retention, now + self._seconds
                add = {"digest": delivery.digest, "signed": delivery.signed, "expires": expires, "worker": me, "until": until}
                if tx.run(_ADD, **key, **add):
                    return Claimed(tries=1)
                found = tx.run(_FIND, **key)
                if not found:
                    return Refused(why="replayed")
            digest, other, until, answer, _ = found[0]
            if digest != delivery.digest:
                return Refused(why="other-body")
            if answer is not None:
                return Answered(answer=json.loads(answer))
            if until > now and not self._gone(json.loads(other)):
                return Busy(seconds=until - now)
            claimed = tx.run(_CLAIM, **key, worker=me, until=now + self._seconds, before=other)
            return Claimed(tries=int(claimed[0][0])) if claimed else Busy(seconds=self._seconds)

    @repeatable
    def answer(self, delivery: Delivery, worker: Mapping[str, Json], answer: Mapping[str, Json]) -> dict[str, Json]:
        """Store the answer unless there is one already; return the one that stands."""
        key = {"hook": delivery.hook, "id": delivery.id}
        with self._database.write() as tx:
            tx.run(_ANSWER, **key, worker=json.dumps(worker, sort_keys=True), answer=json.dumps(answer))
            found = tx.run(_FIND, **key)
        stands = found[0][3] if found else None
        return dict(answer) if stands is None else json.loads(stands)

    @repeatable
    def release(self, delivery: Delivery, worker: Mapping[str, Json], *, forget: bool = False) -> None:
        """Let a delivery that was not carried out be repeated; ``forget`` it when nothing can have come of it."""
        with self._database.write() as tx:
            tx.run(
                _FORGET if forget else _RELEASE,
                hook=delivery.hook,
                id=delivery.id,
                worker=json.dumps(worker, sort_keys=True),
            )

    @repeatable
    def hand(self, place: str, worker: Mapping[str, Json]) -> bool:
        """Become the one who starts something for the experiment at ``place``; False while somebody else does."""
        with self._database.write() as tx:
            now = float(tx.run(self._now)[0][0])
            found = tx.run(_HANDING, place=place)
            dead = found[0][0] if found and self._gone(json.loads(found[0][0])) else ""
            me = json.dumps(worker, sort_keys=True)
            return bool(tx.run(_HAND, place=place, worker=me, until=now + self._seconds, now=now, dead=dead))

    @repeatable
    def handed(self, place: str, worker: Mapping[str, Json]) -> None:
        """Let others start something for the experiment again."""
        with self._database.write() as tx:
            tx.run(_HANDED, place=place, worker=json.dumps(worker, sort_keys=True))

    def stored(self) -> list[tuple[str, str, dict[str, Json] | None]]:
        """Return hook, id and answer of every delivery that is remembered."""
        return [(hook, id, None if answer is None else json.loads(answer)) for hook, id, answer in self._database.run(_ALL)]

    def close(self) -> None:
        """Close the database."""
        self._database.close()
