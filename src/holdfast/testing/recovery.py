"""The part of the store's contract that is about searches that were cut off: what a watcher sees, and who may restore."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.core.errors import AlreadyClaimed, ExperimentNotFound, LeaseHeld
from holdfast.core.recovery import GAVE_UP, RECOVERING
from holdfast.core.trial import Outcome, TrialStatus
from holdfast.storage.database import recovering, requests
from holdfast.storage.database.engine import Statement
from holdfast.storage.database.leases import Leases, Terms
from holdfast.testing import racing
from holdfast.testing.lab import Lab, dump
from holdfast.testing.racing import Racers, url_of

HOLDER = {"pid": 1}
"""Who holds the lease of a new laboratory."""


def claims(lab: Lab) -> list[tuple[int, Any]]:
    return [(row.epoch, row.detail["attempt"]) for row in lab.reader.audit() if row.action == RECOVERING]


def expire(lab: Lab) -> None:
    """Let the lease run out, by the database's clock."""
    Leases(lab.database, lab.id, Terms(duration=-1.0)).renew(epoch=lab.epoch, active=0.0)


class RecoveryContract:
    """For :class:`DatabaseContract`."""

    def test_a_held_lease_bars_a_claim_until_it_expires_or_its_holder_is_known_to_be_gone(self, lab: Lab) -> None:
        before = dump(lab.database)
        for gone in (None, {"pid": 2}):
            with pytest.raises(LeaseHeld, match="process 1"):
                recovering.claim(lab.database, lab.id, epoch=1, attempt=1, gone=gone, detail={})
        assert dump(lab.database) == before
        recovering.claim(lab.database, lab.id, epoch=1, attempt=1, gone=HOLDER, detail={})
        expire(lab)
        recovering.claim(lab.database, lab.id, epoch=1, attempt=2, detail={})
        assert claims(lab) == [(1, 1), (1, 2)]

    def test_a_restore_is_claimed_once_and_only_in_the_epoch_that_was_seen(self, lab: Lab) -> None:
        recovering.claim(lab.database, lab.id, epoch=1, attempt=1, gone=HOLDER, detail={"cause": "lost"})
        before = dump(lab.database)
        with pytest.raises(AlreadyClaimed, match="restore 1 of epoch 1"):
            recovering.claim(lab.database, lab.id, epoch=1, attempt=1, gone=HOLDER, detail={})
        for epoch in (0, 2):
            with pytest.raises(AlreadyClaimed, match=f"epoch {epoch} is over"):
                recovering.claim(lab.database, lab.id, epoch=epoch, attempt=2, gone=HOLDER, detail={})
        with pytest.raises(ExperimentNotFound):
            recovering.claim(lab.database, 10**9, epoch=1, attempt=1, detail={})
        assert dump(lab.database) == before
        lab.take_over()
        recovering.claim(lab.database, lab.id, epoch=2, attempt=1, gone={"pid": 2}, detail={})
        assert claims(lab) == [(1, 1), (2, 1)]

    def test_a_claim_disturbs_nobody_who_drives(self, lab: Lab) -> None:
        writer = lab.started()
        recovering.claim(lab.database, lab.id, epoch=1, attempt=1, gone=HOLDER, detail={})
        lab.save(writer, 0)
        assert lab.end(writer, loss=1.0) is TrialStatus.COMPLETED

    def test_of_many_processes_one_claims_each_restore(self, lab: Lab, racers: Racers) -> None:
        attempts = list(range(1, 11))
        job = {"url": url_of(lab.database), "experiment": lab.id, "epoch": 1, "gone": HOLDER, "attempts": attempts}
        won = racers.race(racing.claim_restores, [job] * 8)
        assert sorted(attempt for each in won for attempt in each) == attempts
        assert sorted(claims(lab)) == [(1, attempt) for attempt in attempts]

    def test_of_a_claim_and_a_restore_by_hand_at_once_both_are_in_order(self, lab: Lab, racers: Racers) -> None:
        """Whoever takes the lease first makes the claims of the epoch before worthless."""
        url = url_of(lab.database)
        job = {"url": url, "experiment": lab.id, "epoch": 1, "gone": HOLDER, "attempts": [1, 2, 3]}
        take = {"url": url, "experiment": lab.id, "seen": 1}
        racers.race(racing.claim_or_take, [{"claims": job}] * 7 + [{"take": take}])
        rows = [(row.epoch, row.action) for row in lab.reader.audit()]
        assert rows.count((2, "restored")) == 1
        assert all(epoch == 1 for epoch, action in rows[: rows.index((2, "restored"))] if action == RECOVERING)
        assert all(action != RECOVERING for _, action in rows[rows.index((2, "restored")) :])

    def test_giving_up_is_noted_once_for_each_epoch(self, lab: Lab) -> None:
        assert recovering.give_up(lab.database, lab.id, epoch=1, detail={"why": "enough"})
        before = dump(lab.database)
        assert not recovering.give_up(lab.database, lab.id, epoch=1, detail={"why": "enough"})
        assert not recovering.give_up(lab.database, lab.id, epoch=2, detail={"why": "enough"})
        assert dump(lab.database) == before
        lab.take_over()
        assert recovering.give_up(lab.database, lab.id, epoch=2, detail={})
        assert [row.epoch for row in lab.reader.audit() if row.action == GAVE_UP] == [1, 2]

    def test_a_look_tells_who_holds_what_is_left_and_what_was_done(self, lab: Lab) -> None:
        first, second, third = (lab.started() for _ in range(3))
        lab.driver.propose({"x": 0.2})
        seen = recovering.look(lab.database, lab.id)
        assert (seen.epoch, seen.holder, seen.ended, seen.unfinished, seen.errored) == (1, HOLDER, None, 4, 0)
        assert 0 < seen.remaining <= 30
        recovering.claim(lab.database, lab.id, epoch=1, attempt=1, gone=HOLDER, detail={})

        def progress(**how: bool) -> int:
            return recovering.look(lab.database, lab.id, **how).progress

        def seq() -> int:
            return lab.reader.seq()

        assert progress() == 0
        first.report(0, {"loss": 1.0})
        assert progress() == 0  # a report alone is lost with its trial's process
        lab.save(first, 1)
        saved = seq()
        assert (progress(), progress(restarts=True)) == (saved, 0)
        lab.end(second, Outcome.FAILED)
        failed = seq()
        assert (progress(), progress(reruns_errored=True)) == (failed, saved)
        lab.end(third, loss=1.0)
        assert progress() == progress(restarts=True, reruns_errored=True) == seq()
        now = recovering.look(lab.database, lab.id)
        assert (now.unfinished, now.errored, now.counts[TrialStatus.COMPLETED]) == (2, 1, 1)
        assert [note.action for note in now.notes] == ["started", RECOVERING]
        assert abs(now.notes[-1].detail["at"] - now.now) < 60

    def test_a_checkpoint_that_was_found_bad_is_no_progress(self, lab: Lab) -> None:
        writer = lab.started()
        lab.save(writer, 0)
        recovering.claim(lab.database, lab.id, epoch=1, attempt=1, gone=HOLDER, detail={})
        before = recovering.look(lab.database, lab.id).progress
        rows = lab.reader.checkpoints()
        requests.quarantine(lab.database, lab.id, [(row, "torn") for row in rows])
        assert recovering.look(lab.database, lab.id).progress <= before

    def test_open_runs_are_those_that_nobody_closed(self, lab: Lab) -> None:
        running, ended = lab.started(), lab.started()
        lab.end(ended, loss=1.0)
        lab.driver.propose({"x": 0.3})
        (found,) = recovering.open_runs(lab.database, lab.id)
        assert found.id == running.attempt

    def test_a_look_takes_as_many_statements_for_many_trials_as_for_few(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts: list[int] = []
        told = Statement.text

        def counted(statement: Statement, dialect: Any) -> Any:
            counts[-1] += 1
            return told(statement, dialect)

        recovering.claim(lab.database, lab.id, epoch=1, attempt=1, gone=HOLDER, detail={})
        for trials in (1, 40):
            for _ in range(trials):
                lab.end(lab.started(), loss=1.0)
            counts.append(0)
            with monkeypatch.context() as patch:
                patch.setattr(Statement, "text", counted)
                recovering.look(lab.database, lab.id)
        assert counts[0] == counts[1] <= 5
