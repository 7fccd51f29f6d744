import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import Conflict
from holdfast.core.trial import (
    ACTIVE,
    ENDING,
    ERRORED,
    FAILURES,
    FINISHED,
    TRANSITIONS,
    UNFINISHED,
    Event,
    Outcome,
    TrialStatus,
    transition,
)

ENDED = FINISHED | ERRORED


def test_every_status_is_reachable_from_pending():
    reached, fresh = set(), {TrialStatus.PENDING}
    while fresh:
        reached |= fresh
        fresh = {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached
    assert reached == set(TrialStatus)


def test_every_event_has_a_use_and_every_status_belongs_somewhere():
    assert {event for _, event in TRANSITIONS} == set(Event)
    assert set(TrialStatus) == UNFINISHED | ERRORED | FINISHED
    assert not UNFINISHED & ERRORED
    assert not UNFINISHED & FINISHED
    assert not ERRORED & FINISHED
    assert ACTIVE < UNFINISHED


@given(st.lists(st.sampled_from(Event)))
def test_an_ended_trial_changes_by_a_rerun_alone(events):
    status = TrialStatus.PENDING
    for event in events:
        try:
            after = transition(status, event)
        except Conflict:
            assert (status, event) not in TRANSITIONS
            continue
        if status in ENDED:
            assert (event, after) == (Event.RERUN, TrialStatus.PENDING)
        if after is TrialStatus.RUNNING:
            assert (status, event) == (TrialStatus.PENDING, Event.CLAIM)
        if after in ENDED - {TrialStatus.CANCELLED}:
            assert status is TrialStatus.RUNNING
        status = after


@pytest.mark.parametrize("status", TrialStatus)
@pytest.mark.parametrize("event", Event)
def test_a_refused_event_names_what_is_allowed(status, event):
    if (status, event) in TRANSITIONS:
        assert transition(status, event) is TRANSITIONS[status, event]
        return
    with pytest.raises(Conflict) as refused:
        transition(status, event)
    for known in Event:
        assert ((status, known) in TRANSITIONS) is (known.value in str(refused.value).partition("allowed: ")[2].split(", "))


def test_a_second_final_result_is_refused():
    for status in ENDED:
        for event in (Event.COMPLETE, Event.PRUNE, Event.FAIL, Event.TIME_OUT, Event.CLAIM, Event.SKIP, Event.CANCEL):
            with pytest.raises(Conflict):
                transition(status, event)


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_ends_a_running_attempt(outcome):
    after = transition(TrialStatus.RUNNING, ENDING[outcome])
    assert (after is TrialStatus.PENDING) is (outcome in {Outcome.LOST, Outcome.PREEMPTED})
    assert (after in ERRORED) is (outcome in FAILURES)
