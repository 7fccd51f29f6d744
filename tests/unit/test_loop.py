import math
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.budget import Budget
from holdfast.core.loop import Done, Ledger, Propose, Submit, Wait, actions, decide, is_continued
from holdfast.core.objective import Objective
from holdfast.core.trial import ACTIVE, TrialStatus
from holdfast.testing.samples import sample_spec, sample_trial

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LOSS = Objective(name="loss")


def ledger(num_trials=3, max_concurrent=1, fail_fast=False, **budget):
    limits = Budget(num_trials=num_trials, objective=LOSS, **budget)
    return Ledger(budget=limits, max_concurrent=max_concurrent, fail_fast=fail_fast)


def test_a_search_of_two():
    book = ledger(2)
    assert decide(book, NOW) == Propose(0)
    book.update(sample_trial(0))
    assert decide(book, NOW) == Submit(0)
    book.submitted(0)
    assert decide(book, NOW) == Wait()
    book.update(sample_trial(0, TrialStatus.RUNNING))
    assert decide(book, NOW) == Wait()
    book.update(sample_trial(0, TrialStatus.COMPLETED, metrics={"loss": 1.0}))
    assert decide(book, NOW) == Propose(1)
    book.update(sample_trial(1, TrialStatus.FAILED))
    assert decide(book, NOW) == Done("every trial of the budget was proposed")
    assert (book.total, book.unfinished, book.best) == (2, 0, 1.0)


def test_waiting_trials_come_first_and_by_number():
    book = ledger(10, 3)
    for number in (2, 0, 1):
        book.update(sample_trial(number))
    assert decide(book, NOW) == Submit(0)


def test_queued_trials_run_when_the_budget_is_used_up_and_count_against_it():
    book = ledger(2)
    book.update(sample_trial(0, TrialStatus.COMPLETED))
    book.update(sample_trial(1, source="queued"))
    assert decide(book, NOW) == Submit(1)
    book.update(sample_trial(1, TrialStatus.COMPLETED, source="queued"))
    assert decide(book, NOW) == Done("every trial of the budget was proposed")
    book.update(sample_trial(2, source="queued"))
    assert decide(book, NOW) == Submit(2)
    assert (book.total, book.proposed) == (3, 1)


def test_queued_trials_take_no_point_from_a_grid():
    book = ledger(None, proposals=2)
    book.update(sample_trial(0, TrialStatus.COMPLETED))
    for number in (1, 2, 3):
        book.update(sample_trial(number, TrialStatus.COMPLETED, source="queued"))
    assert decide(book, NOW) == Propose(4)
    book.update(sample_trial(4, TrialStatus.COMPLETED))
    assert decide(book, NOW) == Done("every trial of the budget was proposed")


def test_a_halt_does_not_wait_for_what_is_due_later():
    book = ledger(1)
    book.update(sample_trial(0, ts_start=NOW + timedelta(days=1)))
    book.halt = "stopped on request"
    assert decide(book, NOW) == Done("stopped on request")


def test_a_trial_that_is_due_later_is_waited_for_even_while_another_runs():
    book = ledger(2, 2)
    later = NOW + timedelta(hours=1)
    book.update(sample_trial(0, ts_start=later))
    book.update(sample_trial(1, TrialStatus.RUNNING))
    assert decide(book, NOW) == Wait(until=later)
    book.update(sample_trial(1, TrialStatus.COMPLETED))
    assert decide(book, NOW) == Wait(until=later)
    assert decide(book, later) == Submit(0)


def test_fail_fast_lets_the_running_ones_end_and_ignores_old_errors():
    book = ledger(5, 2, fail_fast=True)
    book.update(sample_trial(0, TrialStatus.FAILED), fresh=False)
    assert decide(book, NOW) == Propose(1)
    book.update(sample_trial(1, TrialStatus.RUNNING))
    book.update(sample_trial(2, TrialStatus.TIMED_OUT))
    assert decide(book, NOW) == Wait()
    book.update(sample_trial(1, TrialStatus.COMPLETED))
    assert decide(book, NOW) == Done("trial 2 errored and fail_fast is set")


def test_a_target_ends_proposing_but_not_what_waits():
    book = ledger(9, 1, target=0.5)
    book.update(sample_trial(0, TrialStatus.COMPLETED, metrics={"loss": math.nan}))
    assert decide(book, NOW) == Propose(1)
    book.update(sample_trial(0, TrialStatus.COMPLETED, metrics={"loss": 0.5}))
    book.update(sample_trial(1))
    assert decide(book, NOW) == Submit(1)
    book.update(sample_trial(1, TrialStatus.COMPLETED))
    assert decide(book, NOW) == Done("the target 0.5 is reached")


def test_a_time_budget_starts_nothing_more():
    book = ledger(9, 1, time_budget=60.0)
    book.update(sample_trial(0))
    book.active_seconds = 60.0
    assert decide(book, NOW) == Done("the time budget of 60 s is used up")


def test_a_time_budget_that_ends_before_its_last_trials_says_so():
    book = ledger(2, 1, time_budget=60.0)
    book.update(sample_trial(0, TrialStatus.COMPLETED, metrics={"loss": 1.0}))
    book.update(sample_trial(1))  # every trial of the budget was proposed
    book.active_seconds = 60.0
    assert decide(book, NOW) == Done("the time budget of 60 s is used up")
    book.submitted(1)
    assert decide(book, NOW) == Wait()
    book.update(sample_trial(1, TrialStatus.COMPLETED, metrics={"loss": 1.0}))
    assert decide(book, NOW) == Done("every trial of the budget was proposed")


def ended(number, loss, seq, status=TrialStatus.COMPLETED, **metrics):
    found = {"loss": loss, **metrics} if loss is not None else metrics
    return replace(sample_trial(number, status, metrics=found), seq=seq, ended_seq=seq)


def test_a_plateau_ends_proposing():
    book = ledger(99, plateau=2, min_delta=0.1)
    book.update(ended(0, 1.0, 10))
    book.update(ended(1, 0.95, 11, TrialStatus.PRUNED))
    assert decide(book, NOW) == Propose(2)
    book.update(ended(2, math.nan, 12))  # no value at all, and errors, neither end a plateau nor make one longer
    book.update(sample_trial(3, TrialStatus.FAILED))
    book.update(sample_trial(4, TrialStatus.CANCELLED, metrics={"loss": 0.0}))
    assert decide(book, NOW) == Propose(5)
    book.update(ended(5, 0.9, 13))
    reason = "the plateau of 2 trials is reached: none of the last 2 was better than what came before"
    assert decide(book, NOW) == Done(reason)
    book.update(ended(6, 0.85, 14))  # one that ran meanwhile
    assert decide(book, NOW) == Propose(7)


def test_no_plateau_before_the_first_value_that_counts():
    book = ledger(99, plateau=1, feasible=("size <= 3",), target=-5.0)
    for number in range(3):
        book.update(ended(number, -9.0, number, size=4))
    book.update(ended(3, -9.0, 3))  # says nothing of its size
    assert book.best is None
    assert decide(book, NOW) == Propose(4)
    book.update(ended(4, 1.0, 4, size=3))
    assert decide(book, NOW) == Propose(5)
    book.update(ended(5, -9.0, 5, size=4))
    assert decide(book, NOW).reason.startswith("the plateau of 1 trials")


def test_a_plateau_of_a_maximum_with_a_margin():
    limits = Budget(num_trials=9, objective=Objective(name="loss", direction="max"), plateau=2, min_delta=0.5)
    for values, length in (((1.0, 1.5, 1.5), 2), ((1.0, 1.6, 1.5), 1), ((1.0, 1.3, 1.6), 0), ((None, None), 0)):
        assert limits.flat(values) == length


@given(st.permutations(range(8)), st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=8, max_size=8))
def test_the_order_in_which_rows_are_read_does_not_matter(order, values):
    """What was seen live, in the order of ends, and what a restore reads, by number, and rows that change later."""
    live, again = (ledger(99, plateau=3, max_cost=1e9) for _ in range(2))
    trials = [ended(number, values[number], seq, cost=values[number]) for seq, number in enumerate(order)]
    for trial in trials:
        live.update(replace(trial, status=TrialStatus.RUNNING, metrics={}))
        live.update(trial)
        live.closed()
    live.update(replace(trials[0], seq=99))  # a pin, say
    for trial in sorted(trials, key=lambda trial: trial.number):
        again.update(trial, fresh=False)
    assert decide(live, NOW) == decide(again, NOW)
    assert live.closed() == again.closed()


def test_the_cost_of_all_trials_ends_proposing():
    book = ledger(99, max_concurrent=5, max_cost=10.0, cost_metric="gpu.hours")
    costs = [4.0, math.nan, -3.0, "7", True, None, math.inf, 5]
    statuses = [TrialStatus.FAILED, *[TrialStatus.COMPLETED] * 6, TrialStatus.CANCELLED]
    for number, (cost, status) in enumerate(zip(costs, statuses, strict=True)):
        book.update(sample_trial(number, status, metrics={"gpu.hours": cost}))
    assert decide(book, NOW) == Propose(8)
    book.update(sample_trial(8, TrialStatus.RUNNING))
    book.spent(sample_trial(8, TrialStatus.RUNNING, metrics={"gpu.hours": 0.5}))
    assert decide(book, NOW) == Propose(9)
    book.spent(sample_trial(8, TrialStatus.RUNNING, metrics={"gpu.hours": 1.5}))
    book.update(sample_trial(9, metrics={"gpu.hours": 0.0}))
    assert decide(book, NOW) == Submit(9)  # what waits is run
    book.update(sample_trial(8, TrialStatus.COMPLETED, metrics={"gpu.hours": 1.5}))
    book.update(sample_trial(9, TrialStatus.COMPLETED))
    assert decide(book, NOW) == Done("the cost of 10 is reached: the trials' gpu.hours sums up to 10.5")


def test_skipped_trials_count_and_no_trials_is_a_budget():
    book = ledger(1)
    book.update(sample_trial(0, TrialStatus.SKIPPED))
    assert isinstance(decide(book, NOW), Done)
    assert isinstance(decide(ledger(0), NOW), Done)
    exhausted = ledger(None)
    exhausted.exhausted = True
    assert decide(exhausted, NOW) == Done("nothing is left to do")


def test_actions_end_with_done():
    assert [*actions(ledger(0), lambda: NOW)] == [Done("every trial of the budget was proposed")]


def test_a_grid_never_has_more_trials_than_points():
    grid = sample_spec(space={}, search={"engine": "grid"})
    assert (Budget.of(grid, grid_size=4).num_trials, Budget.of(grid, grid_size=4).proposals) == (None, 4)
    assert (Budget.of(sample_spec()).num_trials, Budget.of(sample_spec()).proposals) == (20, None)
    for limits in (Budget.of(grid, grid_size=4), Budget.of(sample_spec(), grid_size=4)):
        assert limits.closed(trials=3, proposed=3, active_seconds=0.0, best=None) is None
        assert limits.closed(trials=4, proposed=4, active_seconds=0.0, best=None) is not None


@settings(max_examples=200)
@given(
    num_trials=st.integers(0, 12),
    max_concurrent=st.integers(1, 4),
    old=st.lists(st.sampled_from(TrialStatus), max_size=8),
    choices=st.lists(st.tuples(st.integers(0, 100), st.sampled_from(TrialStatus)), max_size=200),
)
def test_neither_the_budget_nor_the_concurrency_is_ever_exceeded(num_trials, max_concurrent, old, choices):
    """Whatever ends whenever, retries included, from any stored state: the search ends, and nothing is left over."""
    book = ledger(num_trials, max_concurrent)
    for number, status in enumerate(old):
        restored = TrialStatus.PENDING if status is TrialStatus.RUNNING else status
        book.update(sample_trial(number, restored), fresh=False)
    picks = iter(choices)
    for _ in range(2000):
        action = decide(book, NOW)
        if isinstance(action, Done):
            break
        if isinstance(action, Propose):
            assert action.number == book.total < num_trials
            book.update(sample_trial(action.number))
        elif isinstance(action, Submit):
            assert len(book.running) < max_concurrent
            assert book.statuses[action.trial] is TrialStatus.PENDING
            book.submitted(action.trial)
        else:
            assert book.running
            place, status = next(picks, (0, TrialStatus.COMPLETED))
            number = sorted(book.running)[place % len(book.running)]
            book.update(sample_trial(number, status))
            if status is TrialStatus.SKIPPED:
                continue
        assert len(book.running) <= max_concurrent
    else:
        pytest.fail("the search never ends")
    assert book.total == max(len(old), num_trials)
    assert not book.unfinished
    assert not any(status in ACTIVE for status in book.statuses.values())


def test_a_flow_run_ends_before_the_first_trial_that_is_too_many():
    book = ledger(5, max_concurrent=2)
    book.per_run = book.begun = 2
    for number in range(2):
        book.update(sample_trial(number, TrialStatus.RUNNING))
    book.update(sample_trial(0, TrialStatus.COMPLETED, metrics={"loss": 1.0}))
    assert decide(book, NOW) == Wait()  # nothing is proposed either, before all is known that would be known
    book.update(sample_trial(1, TrialStatus.COMPLETED, metrics={"loss": 1.0}))
    assert decide(book, NOW) == Propose(2)
    book.update(sample_trial(2))
    reason = "continued: 2 trials have begun in this flow run"
    assert decide(book, NOW) == Done(reason)
    assert is_continued(reason)
    book.halt = "stopped on request"
    assert decide(book, NOW) == Done("stopped on request")


def test_a_flow_run_with_nothing_left_to_begin_ends_as_ever():
    book = ledger(1)
    book.per_run = book.begun = 1
    book.update(sample_trial(0, TrialStatus.COMPLETED, metrics={"loss": 1.0}))
    assert decide(book, NOW) == Done("every trial of the budget was proposed")
    assert not is_continued("completed: every trial of the budget was proposed")
    assert not is_continued(None)


def operations(known):
    """Return how many lines of Python, and calls, 100 trials cost that end one after the other behind so many."""
    book = ledger(None, max_concurrent=10**6, plateau=10**6, max_cost=1e9)

    def end(number):
        metrics = {"loss": 1.0 + number % 7, "cost": 0.1 * (number % 5)}
        row = sample_trial(number, TrialStatus.COMPLETED, metrics=metrics)
        book.update(replace(row, seq=number, ended_seq=number))
        return decide(book, NOW)

    for number in range(known):
        end(number)
    count = 0

    def traced(frame, event, arg):
        nonlocal count
        count += 1
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        found = [end(number) for number in range(known, known + 100)]
    finally:
        sys.settrace(before)
    assert found[-1] == Propose(known + 100)
    return count


def test_what_a_decision_costs_does_not_grow_with_the_trials():
    assert operations(20_000) == pytest.approx(operations(200), rel=0.02)


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(-10, 10)), max_size=40), st.floats(0, 2))
def test_plateaus_and_costs_are_the_same_in_whatever_order_they_come(ends, delta):
    limits = {"plateau": 10**6, "max_cost": 1e9, "min_delta": delta}
    book = ledger(None, max_concurrent=100, **limits)
    rows = {}
    for number, (ended, value) in enumerate(ends):
        seq = ended * 100 + number
        row = sample_trial(number, TrialStatus.COMPLETED, metrics={"loss": value, "cost": abs(value)})
        rows[number] = replace(row, seq=seq, ended_seq=seq)
        book.update(rows[number])
        book.closed()
    fresh = book.budget.flat(row.metrics["loss"] for row in sorted(rows.values(), key=lambda row: row.ended_seq))
    book.closed()
    assert book._flat == fresh
    assert float(book._cost) == math.fsum(row.metrics["cost"] for row in rows.values())
