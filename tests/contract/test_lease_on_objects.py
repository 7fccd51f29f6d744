"""The lease on an object store: of hosts with a database each one drives, and a store that fails for a moment ends nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3

from holdfast.core.errors import Contention, LeaseHeld, StorageError
from holdfast.storage import leasing
from holdfast.storage.database import experiments
from holdfast.storage.database.engine import connect, sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.leases import Terms
from holdfast.storage.folder import Folder, LeaseFile
from holdfast.storage.leasing import Claimant, Keeper
from holdfast.storage.objects import ObjectRoot
from holdfast.testing.racing import Racers, url_of
from holdfast.testing.samples import sample_spec

HOLDER = {"hostname": "here", "pid": 1}


def never(_: float) -> None:
    raise AssertionError("nobody is to be waited for")


def claimant(**changes: Any) -> Claimant:
    """Return somebody who takes every holder for dead."""
    defaults = {"holder": HOLDER, "liveness": lambda _: False, "say": lambda _: None, "pause": never}
    return Claimant(**{**defaults, **changes})


@pytest.fixture
def prefix(s3: S3) -> str:
    location = f"{s3.bucket('lease')}/exp"
    if not ObjectRoot(location, s3.options).conditional:
        pytest.skip(f"{s3.endpoint} does not hold the conditions of writes")
    return location


def host(folder: Path, name: str) -> str:
    """Make a host's own database with the experiment's rows; return its URL."""
    with closing(open_database(sqlite_url(folder / f"{name}.db"), create_missing=True)) as database:
        experiments.create(database, sample_spec(name="exp"), uuid="uuid", location="s3://x/exp", seed=1, workdir="/")
        return url_of(database)


def take(url: str, location: str, options: Mapping[str, Any], **changes: Any) -> Keeper:
    folder = Folder(ObjectRoot(location, options))
    database = connect(url)
    record = experiments.by_uuid(database, "uuid")
    assert record is not None
    return leasing.take(database, record.id, folder, claimant(**changes), action="taken", detail={}, uuid="uuid")


def race(url: str, location: str, options: Mapping[str, Any]) -> Callable[[], Any]:
    """Take the lease; return the epoch, or None when somebody else was faster."""
    Folder(ObjectRoot(location, options)).lease()

    def run() -> int | None:
        try:
            return take(url, location, options).epoch
        except LeaseHeld:
            return None

    return run


def test_of_eight_hosts_one_drives(s3: S3, prefix: str, tmp_path: Path) -> None:
    """R19: every host has a database of its own, in which nobody holds anything."""
    urls = [host(tmp_path, f"host-{number}") for number in range(8)]
    jobs = [{"location": prefix, "options": s3.options, "url": url} for url in urls]
    epoch = 0
    with Racers(8) as racers:
        for _ in range(5):
            won = [result for result in racers.race(race, jobs) if result is not None]
            assert len(won) >= 1, won
            assert len(set(won)) == len(won), "an epoch has one holder"
            assert sorted(won) == list(range(epoch + 1, epoch + 1 + len(won))), "who comes later takes over, and is seen to"
            epoch = won and max(won)


@pytest.fixture
def keeper(s3: S3, prefix: str, tmp_path: Path) -> Iterator[Keeper]:
    with ExitStack() as stack:
        kept = take(host(tmp_path, "host"), prefix, s3.options)
        stack.callback(kept.abandon)
        yield kept


def own(s3: S3) -> S3:
    if not s3.own:
        pytest.skip("faults are made inside the tests' own S3 server; HOLDFAST_TEST_S3_ENDPOINT names another")
    return s3


@pytest.mark.parametrize("fault", ["lost", "503"])
def test_a_renewal_outlasts_a_moment(s3: S3, prefix: str, keeper: Keeper, fault: str) -> None:
    """Also when the write was done and its answer is lost: the lease is then ours, as it was."""
    for _ in range(3):
        own(s3).fault(fault, part="lease.json")
        keeper._renew()
    lease = Folder(ObjectRoot(prefix, s3.options)).lease()
    assert lease is not None
    assert (lease.epoch, lease.token) == (keeper.epoch, keeper.token)


def test_a_store_that_is_gone_is_no_contention(s3: S3, keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepers try again after what is no contention, until the lease is in danger."""
    monkeypatch.setattr("holdfast.storage.objects.LEASE_PATIENCE", 1.0)
    own(s3).fault("503", part="lease.json", count=10_000)
    with pytest.raises(StorageError) as caught:
        keeper._renew()
    assert not isinstance(caught.value, Contention)
    s3.fault("clear")
    keeper._renew()


def test_who_was_taken_over_elsewhere_is_told(s3: S3, prefix: str, keeper: Keeper, tmp_path: Path) -> None:
    other = take(host(tmp_path, "other"), prefix, s3.options)
    assert other.epoch == keeper.epoch + 1
    with pytest.raises(Contention, match="epoch"):
        keeper._renew()
    other.release("done")


def test_a_take_over_between_read_and_write_is_told(s3: S3, prefix: str, keeper: Keeper, tmp_path: Path) -> None:
    folder = Folder(ObjectRoot(prefix, s3.options))
    with folder.changing_lease() as file:
        assert isinstance(file, LeaseFile)
        assert file.found is not None
        other = take(host(tmp_path, "other"), prefix, s3.options)
        with pytest.raises(LeaseHeld, match="at the same moment"):
            file.write(file.found)
    lease = folder.lease()
    assert lease is not None
    assert lease.token == other.token
    other.release("done")


def test_terms_leave_time_for_a_failing_renewal() -> None:
    """One renewal that fails on both halves ends before the lease does."""
    from holdfast.storage.objects import LEASE_PATIENCE

    terms = Terms()
    assert terms.renewal + 2 * LEASE_PATIENCE < terms.duration
