"""When a failed trial runs again, decided by two clocks, and which failures are retried at all."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.budget import Budget
from holdfast.core.errors import SpecError
from holdfast.core.failure_section import FailureSection
from holdfast.core.loop import Done, Evolve, Ledger, Propose, Submit, Wait, decide
from holdfast.core.objective import Objective
from holdfast.core.population import Population
from holdfast.core.trial import Outcome, Trial, TrialStatus
from holdfast.report.observer import waiting_words
from holdfast.testing.samples import sample_spec, sample_trial

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RULE = FailureSection(max_failures=9, retry_delay=20.0, retry_backoff=3.0, max_retry_delay=100.0)


class Clocks:
    """The clock on the wall, which anybody may set, and one that only goes on."""

    def __init__(self) -> None:
        self.wall, self.steady = NOW, 1000.0

    def go(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.steady += seconds

    def set(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)


def ledger(clocks: Clocks, num_trials: int = 3, max_concurrent: int = 1, **more: Any) -> Ledger:
    limits = Budget(num_trials=num_trials, objective=Objective(name="loss"), **more.pop("budget", {}))
    clock = lambda: clocks.steady  # noqa: E731
    return Ledger(budget=limits, max_concurrent=max_concurrent, delay=RULE.delay, clock=clock, **more)


def retry(number: int, failures: int = 1, created: datetime = NOW, **more: Any) -> Trial:
    trial = sample_trial(number, attempt=failures + 1, **more)
    return replace(trial, failures=failures, attempt=replace(trial.attempt, reason="retry", created=created))


def test_the_delays_of_a_trial_grow_up_to_a_limit() -> None:
    assert [RULE.delay(failures) for failures in (1, 2, 3, 400_000)] == [20.0, 60.0, 100.0, 100.0]
    assert FailureSection().delay(7) == 0.0


def test_others_are_proposed_and_run_while_one_waits() -> None:
    clocks = Clocks()
    book = ledger(clocks, 2)
    book.update(retry(0))
    assert decide(book, clocks.wall) == Propose(1)
    book.update(sample_trial(1))
    assert decide(book, clocks.wall) == Submit(1)
    book.submitted(1)
    clocks.go(30)
    assert decide(book, clocks.wall) == Wait()  # due, but there is no room
    book.update(sample_trial(1, TrialStatus.COMPLETED))
    assert decide(book, clocks.wall) == Submit(0)


def test_a_search_waits_for_its_last_retry_to_the_moment() -> None:
    clocks = Clocks()
    book = ledger(clocks, 2)
    book.update(retry(1, failures=2))
    clocks.go(5)
    book.update(retry(0, created=clocks.wall))
    assert decide(book, clocks.wall) == Wait(until=NOW + timedelta(seconds=25))
    clocks.go(19.999)
    assert decide(book, clocks.wall) == Wait(until=NOW + timedelta(seconds=25))
    clocks.go(0.001)
    assert decide(book, clocks.wall) == Submit(0)
    book.submitted(0)
    book.update(sample_trial(0, TrialStatus.COMPLETED))
    assert decide(book, clocks.wall) == Wait(until=NOW + timedelta(seconds=60))


def test_who_comes_later_waits_for_the_rest_only() -> None:
    """A restore: what was waited for before the crash counts, and a row that changes begins nothing anew."""
    clocks = Clocks()
    clocks.go(15)
    book = ledger(clocks, 1)
    book.update(retry(0), fresh=False)
    assert decide(book, clocks.wall) == Wait(until=NOW + timedelta(seconds=20))
    clocks.set(-3600)
    clocks.go(15)
    book.update(replace(retry(0), seq=99))  # a pin, say
    clocks.go(5)
    assert decide(book, clocks.wall) == Submit(0)
    later = ledger(clocks, 1)
    clocks.set(7200)
    later.update(retry(0), fresh=False)
    assert decide(later, clocks.wall) == Submit(0)


def test_each_failure_begins_a_wait_of_its_own() -> None:
    clocks = Clocks()
    book = ledger(clocks, 1)
    book.update(retry(0))
    clocks.set(-3600)
    clocks.go(20)
    assert decide(book, clocks.wall) == Submit(0)
    book.submitted(0)
    book.update(retry(0, failures=2, created=clocks.wall))
    assert decide(book, clocks.wall) == Wait(until=clocks.wall + timedelta(seconds=60))


def test_what_is_asked_of_a_search_counts_while_it_waits() -> None:
    clocks = Clocks()
    book = ledger(clocks, 1, budget={"time_budget": 60.0})
    book.update(retry(0))
    assert isinstance(decide(book, clocks.wall), Wait)
    book.active_seconds = 60.0
    assert decide(book, clocks.wall) == Done("the time budget of 60 s is used up")
    book.halt = "stopped on request"
    assert decide(book, clocks.wall) == Done("stopped on request")


def test_queued_trials_wait_for_their_time_and_their_retries_for_their_delay() -> None:
    clocks = Clocks()
    book = ledger(clocks, 0)
    due = NOW + timedelta(seconds=50)
    book.update(sample_trial(0, ts_start=due, source="queued"))
    assert decide(book, clocks.wall) == Wait(until=due)
    clocks.go(50)
    assert decide(book, clocks.wall) == Submit(0)
    book.submitted(0)
    clocks.set(-40)  # it has begun: the time that it was queued for is past
    book.update(retry(0, ts_start=due, source="queued", created=clocks.wall))
    assert decide(book, clocks.wall) == Wait(until=clocks.wall + timedelta(seconds=20))


def test_fail_fast_means_errored_trials_not_failed_attempts() -> None:
    clocks = Clocks()
    book = ledger(clocks, 1, fail_fast=True)
    book.update(retry(0))
    assert book.halt is None
    book.update(sample_trial(0, TrialStatus.FAILED))
    assert decide(book, clocks.wall) == Done("trial 0 errored and fail_fast is set")


def test_a_generation_waits_for_a_member_that_is_retried() -> None:
    clocks = Clocks()
    population = Population.of(sample_spec(population={"interval": 2}), 1)
    book = ledger(clocks, 2, max_concurrent=2, population=population, exhausted=True)
    member = sample_trial(0, attempt=2, claimed=False, metrics={"loss": 1.0})
    book.update(replace(member, step=1))
    book.update(retry(1))
    assert decide(book, clocks.wall) == Wait(until=NOW + timedelta(seconds=20))
    clocks.go(20)
    assert decide(book, clocks.wall) == Submit(1)
    book.submitted(1)
    book.update(replace(sample_trial(1, attempt=3, claimed=False, metrics={"loss": 2.0}), step=1))
    assert decide(book, clocks.wall) == Evolve(0)


def test_the_longest_delays_are_dates_still() -> None:
    clocks = Clocks()
    book = ledger(clocks, 1)
    book.delay = lambda failures: 1e300
    book.update(retry(0))
    assert isinstance(decide(book, clocks.wall), Wait)


@settings(max_examples=200)
@given(
    failures=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    max_concurrent=st.integers(1, 3),
    jumps=st.lists(st.floats(-1e6, 1e6), max_size=40),
)
def test_however_the_clock_is_set_nothing_waits_longer_than_its_delay(
    failures: list[int], max_concurrent: int, jumps: list[float]
) -> None:
    """Each trial fails so many times; the search sleeps as it is told, ends, and never asks twice at one moment."""
    clocks, left, moves = Clocks(), dict(enumerate(failures)), iter(jumps)
    book = ledger(clocks, len(failures), max_concurrent)
    since: dict[int, float] = {}
    for _ in range(300):
        action = decide(book, clocks.wall)
        match action:
            case Done():
                break
            case Propose(number=number):
                book.update(sample_trial(number))
            case Submit(trial=number):
                failed = failures[number] - left[number]
                if failed:
                    assert clocks.steady - since[number] <= RULE.delay(failed) + 1e-3 + 1.0 * len(book.running)
                book.submitted(number)
            case Wait(until=until) if book.running:
                clocks.go(0.5)
                number = min(book.running)
                if left[number]:
                    left[number] -= 1
                    since[number] = clocks.steady
                    book.update(retry(number, failures[number] - left[number], clocks.wall))
                else:
                    book.update(sample_trial(number, TrialStatus.COMPLETED))
            case Wait(until=until):
                assert until is not None
                assert until > clocks.wall
                clocks.go((until - clocks.wall).total_seconds())
        clocks.set(next(moves, 0.0))
    else:
        pytest.fail("the search never ends")
    assert book.counts[TrialStatus.COMPLETED] == len(failures)


def test_what_is_retried() -> None:
    everything, nothing = FailureSection(), FailureSection(retry_on=())
    some = FailureSection(retry_on=("OSError", "train.Flaky", "crashed"))
    for names, expected in (
        (["ConnectionError", "OSError", "Exception"], True),
        (["Flaky", "train.Flaky"], True),
        (["Flaky", "other.Flaky"], False),
        (["KeyError"], False),
        ([], False),
    ):
        assert some.retries(Outcome.FAILED, names) is expected
        assert everything.retries(Outcome.FAILED, names)
        assert not nothing.retries(Outcome.FAILED, names)
    assert some.retries(Outcome.CRASHED, [])
    assert not some.retries(Outcome.TIMED_OUT, [])
    assert FailureSection(retry_on=("timed_out",)).retries(Outcome.TIMED_OUT, [])
    assert not FailureSection(retry_on=("TimeoutError",)).retries(Outcome.TIMED_OUT, ["TimeoutError"])


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(SpecError, match="'no name'; name exceptions"):
        sample_spec(failure={"retry_on": ["no name"]})


def test_what_is_said_of_a_trial_that_waits() -> None:
    assert waiting_words(retry(3), RULE, NOW) == "trial 3 waits 20 s for attempt 2 (retry)"
    assert waiting_words(retry(3), RULE, NOW + timedelta(milliseconds=40)) == "trial 3 waits 20 s for attempt 2 (retry)"
    assert waiting_words(retry(3, 2), RULE, NOW + timedelta(seconds=58.5)) == "trial 3 waits 1.5 s for attempt 3 (retry)"
    assert waiting_words(retry(3), RULE, NOW - timedelta(days=1)) == "trial 3 waits 20 s for attempt 2 (retry)"
    assert waiting_words(retry(3), RULE, NOW + timedelta(days=1)) == "trial 3 waits for attempt 2 (retry)"
    assert waiting_words(retry(3), FailureSection(), NOW) == "trial 3 waits for attempt 2 (retry)"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"failure": {"retry_on": "OSError"}},
            "failure.retry_on: 'OSError' is a single word; give a list, such as [OSError, crashed]",
        ),
        ({"failure": {"retry_on": ["CRASHED"]}}, "write crashed"),
        ({"recovery": {"after": "lost"}}, "recovery.after: 'lost' is a single word; give a list, such as [lost, terminated]"),
    ],
)
def test_what_is_no_list_and_what_nothing_is_called(section: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        sample_spec(**section)
    assert words in str(caught.value)
