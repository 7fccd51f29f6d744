"""One owner: taking the lease in the database and in the path, keeping it, giving it back."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from holdfast.core import faults
from holdfast.core.errors import Contention, Corrupt, DatabaseError, Fenced, HoldfastError, Infrastructure
from holdfast.core.values import Json
from holdfast.storage.database.engine import Database
from holdfast.storage.database.leases import TERMS, Leases, Terms, describe, held
from holdfast.storage.folder import Folder, PathLease

Liveness = Callable[[Mapping[str, Any]], bool | None]
"""Tells of a holder: True, its process lives on this host; False, it is gone; None, it cannot be seen from here."""

_LONG_GONE = 86400.0
"""Seconds after which another host's lease is over whatever its clock says: more than any wrong time zone makes."""

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def elapsed() -> float:
    """Return seconds since some moment, by a clock that goes on while the host sleeps: leases run out meanwhile.

    ``time.monotonic`` stands still then, on Linux. Elsewhere the system's own monotonic clock counts the sleep, too.
    """
    return time.clock_gettime(_CLOCK)


@dataclass(frozen=True, kw_only=True)
class Claimant:
    """Who wants to drive, and how to judge others."""

    holder: dict[str, Json]
    liveness: Liveness
    say: Callable[[str], None]
    force: bool = False
    terms: Terms = TERMS
    pause: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = elapsed
    drives: bool = True
    """whether its time counts as active, and what ended the last drive is forgotten"""


@dataclass(frozen=True)
class _Sight:
    """One look at a lease, in the database or in the path."""

    source: str
    epoch: int
    holder: Mapping[str, Any] | None
    remaining: float
    renewed: float


def _look(leases: Leases, folder: Folder, uuid: str) -> tuple[int, int, list[_Sight]]:
    """Return the epochs of the database and the path, and both leases."""
    stored = leases.look()
    sights = [_Sight("database", stored.epoch, stored.holder, stored.remaining, stored.renewed)]
    path = _own(folder.lease(), uuid)
    if path is not None:
        sights.append(_Sight("path", path.epoch, path.holder, path.expires - time.time(), path.renewed))
    return stored.epoch, path.epoch if path is not None else 0, sights


def _await_silence(leases: Leases, folder: Folder, claimant: Claimant, uuid: str) -> tuple[int, int]:
    """Return the epochs once nobody holds either lease; LeaseHeld as soon as a holder is seen alive."""
    first: dict[str, _Sight] = {}
    began = claimant.clock()
    said = False
    while True:
        database_epoch, path_epoch, sights = _look(leases, folder, uuid)
        if claimant.force or not any(_blocks(sight, first, claimant, claimant.clock() - began) for sight in sights):
            return database_epoch, path_epoch
        for sight in sights:
            first.setdefault(sight.source, sight)
        if not said:
            longest = max(sight.remaining for sight in sights)
            holder = next(sight.holder for sight in sights if sight.holder is not None)
            longest = max(longest, 2 * claimant.terms.renewal)
            claimant.say(f"{describe(holder)} held the experiment; waiting up to {longest:.0f} s for a sign of life")
            said = True
        claimant.pause(0.5)


def _blocks(sight: _Sight, first: Mapping[str, _Sight], claimant: Claimant, waited: float) -> bool:
    """Tell whether a lease is still in the way; LeaseHeld when its holder lives."""
    if sight.holder is None:
        return False
    alive = claimant.liveness(sight.holder)
    if alive is False:
        return False
    before = first.get(sight.source)
    renewed = before is not None and sight.renewed != before.renewed
    if renewed or (alive and sight.remaining > 0):
        raise held(sight.holder, sight.remaining)
    if sight.source == "path" and alive is None:
        # Written by another host's clock: silence for two renewals counts, not what our clock makes of the expiry.
        terms = claimant.terms
        silent = waited >= 2 * terms.renewal and sight.remaining <= 0
        return sight.remaining > -_LONG_GONE and not silent and waited < terms.duration + terms.renewal
    return sight.remaining > 0


class Keeper:
    """A lease that is held: renewed in a thread of its own until it is released or lost."""

    def __init__(
        self,
        database: Database,
        experiment: int,
        folder: Folder,
        lease: PathLease,
        terms: Terms = TERMS,
        *,
        drives: bool = True,
        clock: Callable[[], float] = elapsed,
        journaled: Callable[[], int] | None = None,
    ) -> None:
        self.epoch = lease.epoch
        self.token = lease.token
        self.stop_requested = False
        self.active_seconds = 0.0
        self.journaled = journaled
        """gives the seq that the journal reaches: each renewal tells it to workers"""
        self._terms = terms
        self._drives = drives
        self._leases = Leases(database, experiment, terms)
        self._folder = folder
        self._lease = lease
        self._lost: HoldfastError | None = None
        self._released = False
        self._on_lost: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        self._losing = threading.Lock()
        self._ended = threading.Event()
        self._clock = clock
        """of the lease's age; how long the process worked, or asked in vain, leaves the sleep of its host out"""
        self._renewed, self._counted = clock(), time.monotonic()
        self._asked: float | None = None
        """since when a renewal has been asked for in vain"""
        self._refusal: HoldfastError | None = None
        """why the last renewal failed"""
        self._thread = threading.Thread(target=self._beat, name="holdfast-lease", daemon=True)

    def start(self, on_lost: Callable[[], None]) -> None:
        """Begin to renew; ``on_lost`` is called once, from the renewing thread, when the lease is lost."""
        self._on_lost = on_lost
        self._renew()
        self._thread.start()
        threading.Thread(target=self._watch, name="holdfast-lease-watch", daemon=True).start()

    def check(self) -> None:
        """Raise what ended the lease, if it was lost."""
        if self._lost is not None:
            raise self._lost
        if self._clock() - self._renewed > self._terms.duration:
            # Suspended and continued, or the whole host slept: somebody may have taken over meanwhile.
            self._renew()

    def _beat(self) -> None:
        while not self._ended.wait(self._terms.renewal):
            self._asked = self._asked or time.monotonic()
            try:
                self._renew()
                self._asked = self._refusal = None
            except Contention as error:
                self._lose(error)
                return
            except HoldfastError as error:
                self._refusal = error
                # Stop writing before the lease runs out, or another host might drive at the same time.
                if self._clock() - self._renewed > self._terms.duration - 2 * self._terms.renewal:
                    self._lose(error)
                    return

    def _watch(self) -> None:
        """Give the lease up in time when a renewal does not come back: a call to a server that hangs may take minutes."""
        patience = self._terms.duration - 3 * self._terms.renewal
        awake = looked = time.monotonic()
        while not self._ended.wait(self._terms.renewal / 5):
            now, asked = time.monotonic(), self._asked
            if now - looked > patience / 2:
                awake = now  # suspended meanwhile: that no answer came by now says nothing of the database
            looked = now
            if self._lost is not None:
                return
            if asked is not None and now - max(asked, awake) > patience:
                silence = f"database {self._lease.database} has not answered for {now - asked:.0f} s"
                self._lose(self._refusal or DatabaseError(f"{silence}; look after it, then restore"))
                return

    def _lose(self, error: HoldfastError) -> None:
        with self._losing:
            if self._lost is not None:
                return
            self._lost = error
        self._on_lost()

    def _active(self) -> float:
        now = time.monotonic()
        active, self._counted = now - self._counted, now
        return active if self._drives else 0.0

    def _renew(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            moment = self._clock()
            active = self._active()
            try:
                journaled = None if self.journaled is None else self.journaled()
                _, stop, self.active_seconds = self._leases.renew(epoch=self.epoch, active=active, journaled=journaled)
            except BaseException:
                self._counted -= active
                raise
            self._write(self._lease)
            self.stop_requested = self.stop_requested or stop
            self._renewed = moment

    def _write(self, lease: PathLease) -> None:
        with self._folder.changing_lease() as file:
            found = _own(file.found, lease.uuid)
            later = found is not None and (
                found.epoch > self.epoch or (found.epoch == self.epoch and found.token != self.token)
            )
            if found is not None and later:
                raise Fenced(f"epoch {self.epoch} is over: the lease in {self._folder.location} is of epoch {found.epoch}")
            now = time.time()
            file.write(replace(lease, expires=now + self._terms.duration, renewed=now))

    def release(self, ended: str | None) -> None:
        """Give the lease back, noting why the drive ended; Fenced when it was lost meanwhile. Once is enough."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            if self._released:
                return
            self._leases.release(epoch=self.epoch, active=self._active(), ended=ended)
            self._released = True
            self._write(replace(self._lease, holder=None))

    def release_quietly(self, ended: str | None) -> None:
        """Give the lease back if it still is ours to give."""
        with suppress(Contention, Infrastructure, Corrupt):
            self.release(ended)

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    def active_seconds_now(self) -> float:
        """Return the experiment's active time up to this moment."""
        return self.active_seconds + time.monotonic() - self._counted

    def abandon(self) -> None:
        """Stop renewing without giving the lease back (it was lost, or the database is gone)."""
        self._ended.set()


def take(
    database: Database,
    experiment: int,
    folder: Folder,
    claimant: Claimant,
    *,
    action: str,
    detail: Mapping[str, Json],
    uuid: str = "",
    check: Callable[[], None] = lambda: None,
    journaled: Callable[[], int] | None = None,
) -> Keeper:
    """Take the lease of an experiment, in the database and in its path.

    A holder that is seen alive is refused at once (LeaseHeld); one that is gone from this host is dead at once; a silent one
    elsewhere is waited out. The new epoch is one more than the greater of both. With ``claimant.force`` nobody is waited for.
    ``check`` is called once nobody else can take it any more, and before anything is changed; what it raises is passed on.
    """
    leases = Leases(database, experiment, claimant.terms)
    database_epoch, path_epoch = _await_silence(leases, folder, claimant, uuid)
    now = time.time()
    lease = PathLease(
        epoch=max(database_epoch, path_epoch) + 1,
        holder=claimant.holder,
        expires=now + claimant.terms.duration,
        renewed=now,
        database=database.label,
        uuid=uuid,
        token=secrets.token_hex(8),
    )
    with folder.changing_lease() as file:
        found = _own(file.found, uuid)
        if found is not None and found.epoch > path_epoch:
            raise held(found.holder, found.expires - now)
        check()
        leases.take(
            seen=database_epoch,
            epoch=lease.epoch,
            holder=claimant.holder,
            action=action,
            detail={**detail, "token": lease.token, "uuid": uuid},
            drives=claimant.drives,
        )
        try:
            faults.point("lease.database-taken")
            file.write(lease)
        except BaseException as error:  # a signal, too
            leases.release(epoch=lease.epoch, active=0.0, ended=f"interrupted: {str(error) or type(error).__name__}")
            raise
    return Keeper(database, experiment, folder, lease, claimant.terms, drives=claimant.drives, journaled=journaled)


def _own(lease: PathLease | None, uuid: str) -> PathLease | None:
    """Return a lease in the path if it is this experiment's; a copy still has its original's."""
    return lease if lease is not None and lease.uuid in ("", uuid) else None
