"""The contract of the store of deliveries, over every database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from holdfast.storage.database.deliveries import Answered, Busy, Claimed, Deliveries, Delivery, Full, Refused
from holdfast.testing.racing import Racers

FIRST = Delivery(hook="h", id="1", digest="aa")


def worker(name: str) -> dict[str, Any]:
    return {"token": name}


def claiming(url: str, token: str, id: str, signed: str | None) -> Callable[[], str]:
    """Prepare to claim a delivery and to answer it, for a race."""
    store = Deliveries(url)

    def run() -> str:
        delivery = Delivery(hook="h", id=id, digest="aa", signed=signed)
        verdict = store.claim(delivery, worker(token))
        if isinstance(verdict, Claimed):
            store.answer(delivery, worker(token), {"from": token})
        store.close()
        return type(verdict).__name__

    return run


def handing(url: str, token: str) -> Callable[[], bool]:
    """Prepare to become the one who starts an experiment, for a race."""
    store = Deliveries(url)
    return lambda: store.hand("/runs/digits", worker(token))


class DeliveriesContract:
    """Subclass it and give ``url``, a fixture: the URL of an empty database, as text."""

    @pytest.fixture
    def open_store(self, url: str) -> Iterator[Callable[..., Deliveries]]:
        opened: list[Deliveries] = []

        def make(**options: Any) -> Deliveries:
            opened.append(Deliveries(url, **options))
            return opened[-1]

        yield make
        for one in opened:
            one.close()

    @pytest.fixture
    def store(self, open_store: Callable[..., Deliveries]) -> Deliveries:
        return open_store()

    def test_an_answer_survives_and_is_given_again(self, open_store: Callable[..., Deliveries]) -> None:
        store = open_store()
        assert store.claim(FIRST, worker("a")) == Claimed(tries=1)
        assert store.answer(FIRST, worker("a"), {"status": 202}) == {"status": 202}
        assert open_store().claim(FIRST, worker("b")) == Answered(answer={"status": 202})

    def test_an_answer_is_never_changed(self, store: Deliveries) -> None:
        store.claim(FIRST, worker("a"))
        store.answer(FIRST, worker("a"), {"status": 202})
        assert store.answer(FIRST, worker("a"), {"status": 500}) == {"status": 202}
        store.release(FIRST, worker("a"), forget=True)
        assert store.stored() == [("h", "1", {"status": 202})]

    def test_one_works_on_a_delivery(self, store: Deliveries) -> None:
        store.claim(FIRST, worker("a"))
        found = store.claim(FIRST, worker("b"))
        assert isinstance(found, Busy)
        assert 0 < found.seconds <= 60
        store.release(FIRST, worker("b"))  # who does not hold it changes nothing
        assert isinstance(store.claim(FIRST, worker("b")), Busy)

    def test_what_was_not_carried_out_can_be_repeated(self, store: Deliveries) -> None:
        store.claim(FIRST, worker("a"))
        store.release(FIRST, worker("a"))
        assert store.claim(FIRST, worker("b")) == Claimed(tries=2)
        store.release(FIRST, worker("b"), forget=True)
        assert store.claim(FIRST, worker("c")) == Claimed(tries=1)

    def test_a_worker_that_is_gone_has_no_claim(self, open_store: Callable[..., Deliveries]) -> None:
        """Its process died between storing and starting."""
        store = open_store(gone=lambda who: who["token"] == "dead")
        assert store.claim(FIRST, worker("dead")) == Claimed(tries=1)
        assert store.hand("/runs/digits", worker("dead"))
        assert store.claim(FIRST, worker("b")) == Claimed(tries=2)
        assert store.hand("/runs/digits", worker("b"))
        assert not store.hand("/runs/digits", worker("c"))
        assert store.answer(FIRST, worker("dead"), {"from": "dead"}) == {"from": "dead"}  # nothing stands: it lost its claim
        assert store.answer(FIRST, worker("b"), {"from": "b"}) == {"from": "b"}
        assert store.stored() == [("h", "1", {"from": "b"})]

    def test_a_claim_that_ran_out_counts_no_more(self, open_store: Callable[..., Deliveries]) -> None:
        store = open_store(seconds=-1.0)
        store.claim(FIRST, worker("a"))
        assert store.claim(FIRST, worker("b")) == Claimed(tries=2)
        assert store.hand("/runs/digits", worker("a"))
        assert store.hand("/runs/digits", worker("b"))

    def test_an_id_belongs_to_one_body(self, store: Deliveries) -> None:
        store.claim(FIRST, worker("a"))
        other = Delivery(hook="h", id="1", digest="bb")
        assert store.claim(other, worker("a")) == Refused(why="other-body")
        store.answer(FIRST, worker("a"), {})
        assert store.claim(other, worker("a")) == Refused(why="other-body")
        assert store.claim(Delivery(hook="other", id="1", digest="bb"), worker("a")) == Claimed(tries=1)

    def test_a_signed_body_counts_once(self, store: Deliveries) -> None:
        """The signature covers the body alone: whoever has seen it can send it under any id."""
        first = Delivery(hook="h", id="1", digest="aa", signed="aa")
        assert store.claim(first, worker("a")) == Claimed(tries=1)
        assert store.claim(Delivery(hook="h", id="2", digest="aa", signed="aa"), worker("b")) == Refused(why="replayed")
        assert store.claim(Delivery(hook="h", id="3", digest="cc", signed="cc"), worker("b")) == Claimed(tries=1)
        assert store.claim(Delivery(hook="g", id="2", digest="aa", signed="aa"), worker("b")) == Claimed(tries=1)
        assert [store.claim(Delivery(hook="h", id=f"n{n}", digest="aa"), worker("b")) for n in "12"] == [Claimed(tries=1)] * 2

    def test_the_store_is_bounded(self, open_store: Callable[..., Deliveries]) -> None:
        """Forgetting what may be replayed is worse than taking no more."""
        store = open_store(most=2, retention=1000.0)
        for id in "12":
            store.claim(Delivery(hook="h", id=id, digest="aa"), worker("a"))
        found = store.claim(Delivery(hook="h", id="3", digest="aa"), worker("a"))
        assert isinstance(found, Full)
        assert 900 < found.seconds <= 1000
        store.release(Delivery(hook="h", id="2", digest="aa"), worker("a"))
        assert store.claim(Delivery(hook="h", id="2", digest="aa"), worker("b")) == Claimed(tries=2)  # what is known, is

    def test_what_is_old_is_forgotten(self, open_store: Callable[..., Deliveries]) -> None:
        past = open_store(retention=-1.0)
        past.claim(FIRST, worker("a"))
        assert open_store().claim(FIRST, worker("b")) == Claimed(tries=1)
        assert len(past.stored()) == 1

    @pytest.mark.parametrize("signed", [None, "aa"])
    def test_of_several_processes_one_has_it(self, url: str, racers: Racers, signed: str | None) -> None:
        jobs: list[Mapping[str, Any]] = [{"url": url, "token": t, "id": "1", "signed": signed} for t in "abc"]
        found = racers.race(claiming, jobs)
        assert found.count("Claimed") == 1
        assert set(found) <= {"Claimed", "Busy", "Answered"}

    def test_of_several_ids_of_one_signed_body_one_counts(self, url: str, racers: Racers) -> None:
        found = racers.race(claiming, [{"url": url, "token": t, "id": t, "signed": "aa"} for t in "abc"])
        assert sorted(found) == ["Claimed", "Refused", "Refused"]

    def test_of_several_processes_one_starts_an_experiment(self, url: str, racers: Racers) -> None:
        assert racers.race(handing, [{"url": url, "token": t} for t in "abc"]).count(True) == 1
