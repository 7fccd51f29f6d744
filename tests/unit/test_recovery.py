"""The rule by which searches that were cut off are restored, waited for, or given up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.failure_section import RecoverySection
from holdfast.core.recovery import (
    ENDED,
    RECOVERING,
    STARTED,
    STARTING_SECONDS,
    UNSEEN_SECONDS,
    Note,
    Situation,
    Verdict,
    cut_off,
    in_a_row,
    is_under_way,
    judge,
    pause,
)

SETTINGS = RecoverySection(max_restores=3, delay=10.0, max_delay=25.0)
STARTED_ROW = Note(seq=1, epoch=1, action="started", detail={"token": "t"})


def take(seq: int, epoch: int) -> Note:
    return Note(seq=seq, epoch=epoch, action="restored", detail={"token": f"t{epoch}"})


def claimed(seq: int, epoch: int, attempt: int = 1, *, at: float = 0.0) -> Note:
    detail = {"epoch": epoch, "attempt": attempt, "at": at, "by": {"pid": 1}, "cause": "lost"}
    return Note(seq=seq, epoch=epoch, action=RECOVERING, detail=detail)


def about(action: str, seq: int, epoch: int, attempt: int = 1, **detail: Any) -> Note:
    return Note(seq=seq, epoch=epoch, action=action, detail={"epoch": epoch, "attempt": attempt, **detail})


LOST = Situation(
    epoch=1,
    driver=None,
    ended=None,
    stop_requested=False,
    unfinished=2,
    errored=0,
    can_propose=True,
    notes=(STARTED_ROW,),
    now=1000.0,
)


@pytest.mark.parametrize(
    ("ended", "cause"),
    [
        (None, "lost"),
        ("interrupted: SIGTERM", "terminated"),
        ("interrupted: SIGINT", None),
        ("interrupted: KeyboardInterrupt: ", None),
        ("interrupted: DatabaseError: gone", "failed"),
        ("stopped by request", None),
        ("completed: the budget is used up", None),
    ],
)
def test_how_a_drive_was_cut_off(ended: str | None, cause: str | None) -> None:
    assert cut_off(ended) == cause


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"driver": "process 3 on host drives it"}, "process 3"),
        ({"notes": ()}, "never driven"),
        ({"ended": "stopped: on request"}, "stopped"),
        ({"ended": "interrupted: SIGINT"}, "SIGINT"),
        ({"ended": "completed: all"}, "completed"),
        ({"stop_requested": True}, "stop was requested"),
        ({"unfinished": 0, "can_propose": False}, "nothing is left"),
        ({"unfinished": 0, "errored": 3, "can_propose": False}, "nothing is left"),
        ({"unfinished": 0, "notes": (STARTED_ROW, Note(seq=2, epoch=1, action="restored", detail={"trials": 0}))}, "nothing"),
        ({"ended": "interrupted: SIGTERM"}, "recovery.after names lost"),
        ({"ended": "interrupted: StorageError: disk"}, "recovery.after names lost"),
    ],
)
def test_what_is_left_alone(changes: dict[str, Any], why: str) -> None:
    decision = judge(replace(LOST, **changes), SETTINGS)
    assert decision.verdict is Verdict.LEFT
    assert why in (decision.why or changes["ended"])


def test_what_is_restored_at_once() -> None:
    assert judge(LOST, SETTINGS).verdict is Verdict.RESTORE
    everything = SETTINGS.model_copy(update={"after": ("lost", "terminated", "failed"), "errored": "resume"})
    for ended in (None, "interrupted: SIGTERM", "interrupted: StorageError: disk"):
        assert judge(replace(LOST, ended=ended), everything).verdict is Verdict.RESTORE
    only_errored = replace(LOST, unfinished=0, errored=1, can_propose=False)
    assert judge(only_errored, everything).verdict is Verdict.RESTORE
    only_new = replace(LOST, unfinished=0)
    assert judge(only_new, SETTINGS).verdict is Verdict.RESTORE


def test_zero_restores_means_never() -> None:
    decision = judge(LOST, SETTINGS.model_copy(update={"max_restores": 0}))
    assert (decision.verdict, "max_restores is 0" in decision.why) == (Verdict.GAVE_UP, True)


def test_restores_that_get_nothing_done_wait_longer_and_end() -> None:
    notes, epoch, now = [STARTED_ROW], 1, 1000.0
    waits = []
    while True:
        found = replace(LOST, epoch=epoch, notes=tuple(notes), now=now)
        decision = judge(found, SETTINGS)
        if decision.verdict is Verdict.GAVE_UP:
            break
        assert decision.at is not None
        waits.append(decision.at - now)
        now = decision.at
        assert judge(replace(found, now=now - 0.001), SETTINGS).verdict is (Verdict.WAIT if waits[1:] else Verdict.RESTORE)
        seq = 10 * epoch
        notes += [claimed(seq, epoch, at=now), take(seq + 1, epoch + 1)]
        epoch += 1
    assert waits == [0.0, 10.0, 20.0]
    assert "3 restores in a row got nothing done" in decision.why
    # Whatever gets done, by anybody, begins the count anew.
    assert judge(replace(found, progress=notes[-1].seq + 1), SETTINGS).verdict is Verdict.RESTORE
    by_hand = (*notes, take(notes[-1].seq + 5, epoch + 1))
    assert judge(replace(found, epoch=epoch + 1, notes=by_hand), SETTINGS).verdict is Verdict.RESTORE


def test_a_restore_that_never_took_the_lease_is_counted_and_numbered() -> None:
    notes = (STARTED_ROW, claimed(5, 1, at=990.0))
    assert judge(replace(LOST, notes=notes, under_way=True), SETTINGS).verdict is Verdict.UNDER_WAY
    assert judge(replace(LOST, notes=notes, now=999.0), SETTINGS).verdict is Verdict.WAIT
    due = judge(replace(LOST, notes=notes), SETTINGS)
    assert (due.verdict, due.attempt, due.restores) == (Verdict.RESTORE, 2, 1)


def test_a_clock_that_was_set_back_makes_no_wait_longer() -> None:
    notes = (STARTED_ROW, claimed(5, 1, at=10**9), take(6, 2))
    assert judge(replace(LOST, epoch=2, notes=notes), SETTINGS).verdict is Verdict.RESTORE
    begun = (claimed(5, 1, at=10**9), about(STARTED, 6, 1, pid=3))
    assert not is_under_way(begun, 1, LOST.now, lambda _: None)
    ahead = (STARTED_ROW, claimed(5, 1, at=LOST.now + 3.0), take(6, 2))  # of a host whose clock is a little ahead
    assert judge(replace(LOST, epoch=2, notes=ahead), SETTINGS).at == LOST.now + 13.0


def test_a_restore_that_ended_with_its_watch_is_gone_on_with_at_once() -> None:
    told = about(ENDED, 9, 1, passed_on=True, cause="lost", code=143)
    notes = (STARTED_ROW, claimed(5, 1, at=999.0), take(6, 2), told)
    due = judge(replace(LOST, epoch=2, ended="interrupted: SIGTERM", notes=notes), SETTINGS)
    assert (due.verdict, due.restores, due.attempt) == (Verdict.RESTORE, 0, 1)
    # It neither counts nor excuses those before it.
    before = (STARTED_ROW, claimed(2, 1, at=995.0), take(3, 2), claimed(5, 2, at=999.0), take(6, 3))
    ended = (*before, about(ENDED, 9, 2, passed_on=True, cause="lost", code=143))
    waits = judge(replace(LOST, epoch=3, ended="interrupted: SIGTERM", notes=ended), SETTINGS)
    assert (waits.verdict, waits.restores, waits.at) == (Verdict.WAIT, 1, 1005.0)


def test_a_signal_that_a_watch_passed_on_is_no_reason_to_leave_it() -> None:
    notes = (STARTED_ROW, claimed(5, 1, at=0.0), take(6, 2), about(ENDED, 9, 1, passed_on=True, cause="lost", code=143))
    found = replace(LOST, epoch=2, ended="interrupted: SIGTERM", notes=notes)
    assert (judge(found, SETTINGS).verdict, judge(found, SETTINGS).cause) == (Verdict.RESTORE, "lost")
    later = replace(found, epoch=3, notes=(*notes, take(12, 3)))
    assert judge(later, SETTINGS).verdict is Verdict.LEFT  # this time it was somebody else's


@pytest.mark.parametrize("seen", [True, False, None])
def test_when_a_restore_is_under_way(seen: bool | None) -> None:
    claim = claimed(5, 1, at=100.0)
    alive = lambda _: seen  # noqa: E731  # one answer for all
    assert not is_under_way((STARTED_ROW,), 1, 100.0, alive)
    assert is_under_way((claim,), 1, 100.0, alive) is (seen is not False)
    assert not is_under_way((claim,), 1, 100.0 + STARTING_SECONDS, alive)
    begun = (claim, about(STARTED, 6, 1, pid=3))
    long_after = 100.0 + UNSEEN_SECONDS
    assert is_under_way(begun, 1, 101.0, alive) is (seen is not False)
    assert is_under_way(begun, 1, long_after, alive) is (seen is True)
    assert not is_under_way((*begun, about(ENDED, 7, 1)), 1, 101.0, lambda _: True)
    assert not is_under_way(begun, 2, 101.0, lambda _: True), "it took the lease: the new epoch says the rest"
    again = (*begun, about(ENDED, 7, 1), claimed(8, 1, 2, at=200.0), about(STARTED, 9, 1, 2, pid=4))
    assert is_under_way(again, 1, 201.0, lambda who: who.get("pid") == 4)


EVENTS = st.lists(st.sampled_from(["claim", "claim and take", "take", "progress"]), max_size=30)


@given(EVENTS)
def test_the_count_is_that_of_restores_since_something_was_done(events: list[str]) -> None:
    """Against a model that keeps the count as it goes."""
    notes, epoch, progress, count, pending = [STARTED_ROW], 1, 0, 0, False
    for place, event in enumerate(events):
        seq = 10 * (place + 1)
        if event.startswith("claim"):
            notes.append(claimed(seq, epoch))
            count, pending = count + 1, True
        if event.endswith("take"):
            epoch += 1
            notes.append(take(seq + 1, epoch))
            count, pending = (count if pending else 0), False
        if event == "progress":
            progress, count = seq, 0
    assert len(in_a_row(notes, progress)) == count


@given(
    EVENTS,
    st.integers(0, 6),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.floats(0, 1e9),
    st.sampled_from([None, "interrupted: SIGTERM", "interrupted: SIGINT", "interrupted: X: y", "stopped", "completed: all"]),
    st.booleans(),
)
def test_a_decision_keeps_what_the_settings_promise(
    events: list[str], limit: int, delay: float, longest: float, now: float, ended: str | None, under_way: bool
) -> None:
    settings = RecoverySection(max_restores=limit, delay=delay, max_delay=longest, after=("lost", "failed"))
    notes, epoch, progress = [STARTED_ROW], 1, 0
    for place, event in enumerate(events):
        seq = 10 * (place + 1)
        if event.startswith("claim"):
            notes.append(claimed(seq, epoch, 1 + sum(n.action == RECOVERING and n.epoch == epoch for n in notes), at=now))
        if event.endswith("take"):
            epoch += 1
            notes.append(take(seq + 1, epoch))
        if event == "progress":
            progress = seq
    found = replace(LOST, epoch=epoch, notes=tuple(notes), progress=progress, now=now, ended=ended, under_way=under_way)
    decision = judge(found, settings)
    assert decision == judge(found, settings)
    if decision.verdict in (Verdict.RESTORE, Verdict.WAIT):
        assert decision.cause in settings.after
        assert decision.restores < limit
        assert not under_way
        assert not any(note.epoch == epoch and note.detail.get("attempt") == decision.attempt for note in notes[1:])
        assert decision.at is not None
        assert decision.at <= now + longest
        assert (decision.at > now) == (decision.verdict is Verdict.WAIT)
        if not decision.restores:
            assert decision.verdict is Verdict.RESTORE
    elif decision.verdict is Verdict.GAVE_UP:
        assert decision.restores >= limit
        assert decision.cause in settings.after


@given(st.integers(1, 10**6), st.floats(0, 1e9), st.floats(0, 1e9))
def test_pauses_grow_and_are_capped(restores: int, delay: float, longest: float) -> None:
    settings = RecoverySection(delay=delay, max_delay=longest)
    assert pause(restores, settings) <= pause(restores + 1, settings) <= longest
    assert pause(1, settings) == min(delay, longest)
