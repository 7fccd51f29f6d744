import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.checkpoint import Checkpoint, CheckpointStatus, chain, check_step, eligible
from holdfast.core.checkpoint_config import CheckpointConfig
from holdfast.core.errors import InvalidStep
from holdfast.core.objective import Direction, Objective
from holdfast.core.retention import KeepBest, KeepLast, best, policies, ranking, surplus
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import Attempt

LOSS = Objective(name="loss")
values = st.none() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.0, "bad", True]) | st.floats()


def checkpoint(identity, loss=None, **rest):
    metrics = {} if loss is None else {"loss": loss}
    return Checkpoint(**{
        "id": identity, "trial": 0, "attempt": 1, "step": identity, "path": f"{identity}", "digest": "", "bytes": 1,
        "metrics": metrics, **rest,
    })  # fmt: skip


histories = st.lists(st.tuples(values, st.booleans(), st.booleans()), min_size=1, max_size=12).map(
    lambda rows: [
        checkpoint(identity, loss, pinned=pinned, verified=verified) for identity, (loss, pinned, verified) in enumerate(rows)
    ]
)
configs = st.builds(
    CheckpointConfig,
    mode=st.sampled_from(["all", "last", "gap", "gap_and_last"]),
    metric_name=st.none() | st.just("loss"),
    keep_every=st.none() | st.integers(1, 4),
    keep_top_k=st.none() | st.integers(1, 4),
    keep_last=st.none() | st.integers(1, 4),
    higher_is_better=st.none() | st.booleans(),
)


@given(histories, configs)
def test_the_latest_the_pinned_and_the_union_are_kept(history, config):
    chosen = policies(config, LOSS)
    dropped = {item.id for item in surplus(history, chosen)}
    assert history[-1].id not in dropped
    assert not dropped & {item.id for item in history if item.pinned}
    assert dropped == {item.id for item in history} - set().union(*(policy.keeps(history) for policy in chosen))
    if config.mode in ("all", "gap") and not config.rules:
        assert not dropped
    assert not dropped & {item.id for item in [item for item in history if item.verified][-1:]}
    if config.mode == "gap_and_last":
        assert not dropped & {item.id for item in history if item.step % config.save_period == 0}
    if config.keep_every:
        assert not dropped & {item.id for item in history if item.step % config.keep_every == 0}
    if config.keep_top_k:
        assert not dropped & {item.id for item in best(history, ranking(config, LOSS))[:1] if finite(item)}


@given(histories, configs)
def test_pruning_after_each_save_keeps_what_pruning_once_keeps(history, config):
    """So a restart, which prunes what a crash left over, changes nothing."""
    chosen = policies(config, LOSS)
    alive = []
    for item in history:
        alive.append(item)
        dropped = surplus(alive, chosen)
        alive = [other for other in alive if other not in dropped]
        assert surplus(alive, chosen) == []
    once = surplus(history, chosen)
    assert alive == [item for item in history if item not in once]


@given(histories, st.integers(1, 4), st.sampled_from(Direction))
def test_nan_infinite_and_missing_values_are_never_best(history, count, direction):
    objective = Objective(name="loss", direction=direction)
    kept = KeepBest(count, objective).keeps(history)
    numbers = {
        item.id: item.metrics["loss"]
        for item in history
        if isinstance(item.metrics.get("loss"), float) and math.isfinite(item.metrics["loss"])
    }
    assert kept <= set(numbers)
    assert len(kept) == min(count, len(numbers))
    for worse in set(numbers) - kept:
        assert not any(objective.better(numbers[worse], numbers[better]) for better in kept)


def test_ties_go_to_the_newest():
    assert KeepBest(1, LOSS).keeps([checkpoint(0, 1.0), checkpoint(1, 1.0), checkpoint(2, 3.0)]) == {1}
    assert KeepLast(2).keeps([checkpoint(number) for number in range(4)]) == {2, 3}


def test_ranking_follows_the_first_objective_unless_told_otherwise():
    best = Objective(name="acc", direction=Direction.MAX)
    assert ranking(CheckpointConfig(), best) == best
    assert ranking(CheckpointConfig(metric_name="loss", higher_is_better=False), best) == LOSS


def finite(item):
    value = item.metrics.get("loss")
    return isinstance(value, float) and math.isfinite(value)


@given(histories, st.sampled_from(Direction))
def test_best_orders_all_and_puts_what_cannot_be_compared_last(history, direction):
    goal = Objective(name="loss", direction=direction)
    order = best(history, goal)
    assert {item.id for item in order} == {item.id for item in history}
    assert [finite(item) for item in order] == sorted([finite(item) for item in order], reverse=True)
    for better, worse in pairwise(order):
        if finite(worse):
            assert not goal.better(worse.metrics["loss"], better.metrics["loss"])
            assert better.metrics["loss"] != worse.metrics["loss"] or better.id > worse.id
    assert best(history, None) == history[::-1]


def kept(config, steps=12):
    """Return the steps that are left after a loop that saves and prunes as it goes."""
    chosen, alive = policies(config, None), []
    for step in range(steps):
        if config.is_due(step):
            alive.append(checkpoint(step))
            dropped = surplus(alive, chosen)
            alive = [item for item in alive if item not in dropped]
    return [item.step for item in alive]


@pytest.mark.parametrize(
    ("mode", "period", "steps"),
    [
        ("all", 1, list(range(12))),
        ("last", 1, [11]),
        ("gap", 5, [0, 5, 10]),
        ("gap_overwrite", 5, [10]),
        ("gap_and_last", 5, [0, 5, 10, 11]),
        ("none", 1, []),
    ],
)
def test_a_mode_keeps_the_steps_that_its_name_says(mode, period, steps):
    assert kept(CheckpointConfig(mode=mode, save_period=period)) == steps


@pytest.mark.parametrize(("mode", "period"), [("last", 2), ("gap_overwrite", 1), ("some", 1), ("all", 0), ("all", True)])
def test_pairs_that_make_no_sense_are_refused(mode, period):
    with pytest.raises(ValueError, match=r"save_period|mode"):
        CheckpointConfig(mode=mode, save_period=period)


@pytest.mark.parametrize(("given", "seconds"), [(90, 90), ("01:30", 90), ("02:00:00", 7200), ("1:00:00:01", 86401)])
def test_a_deadline_is_seconds_or_a_batch_systems_time(given, seconds):
    assert CheckpointConfig(save_before=given).save_before == seconds


@pytest.mark.parametrize("given", ["soon", "1:2:3:4:5", 0, -1, True, "-1:00"])
def test_what_is_no_deadline_is_refused(given):
    with pytest.raises(ValueError, match="save_before"):
        CheckpointConfig(save_before=given)


def spec(**checkpoints):
    return ExperimentSpec(
        name="x", trainable="a.py:b", objectives={"loss": "min"}, space={"x": {"type": "constant", "value": 1}},
        search={"num_trials": 1}, checkpoints=checkpoints,
    )  # fmt: skip


def test_a_search_keeps_a_few_of_each_trial_unless_told_otherwise():
    rules = [(spec(**given).checkpoints.keep_top_k, spec(**given).checkpoints.keep_last) for given in (
        {}, {"save_period": 2}, {"keep_last": 5}, {"keep_last": None, "keep_top_k": None}, {"mode": "gap"},
    )]  # fmt: skip
    assert rules == [(1, 2), (1, 2), (1, 5), (None, None), (None, None)]
    assert ExperimentSpec.parse(spec().stored()) == spec()


def test_steps_to_save():
    config = CheckpointConfig(save_period=3)
    assert [step for step in range(8) if config.is_due(step)] == [0, 3, 6]
    assert not CheckpointConfig(mode="none").is_due(0)
    assert not CheckpointConfig(enabled=False).is_due(0)


@pytest.mark.parametrize("step", [True, 2.0, -1, "last", None])
def test_what_is_no_step(step):
    with pytest.raises(InvalidStep):
        check_step(step)


def attempt(number, parent=None, parent_step=None):
    return Attempt(id=number, number=number, parent=parent, parent_step=parent_step)


def test_only_the_chain_of_the_current_attempt_counts():
    attempts = {1: attempt(1), 2: attempt(2, 1, 4), 3: attempt(3), 4: attempt(4, 3, 2)}
    assert chain(2, attempts) == [(2, None), (1, 4)]
    assert chain(4, attempts) == [(4, None), (3, 2)]
    saved = [
        checkpoint(1, attempt=1, step=4),
        checkpoint(2, attempt=1, step=5),
        checkpoint(3, attempt=2, step=5),
        checkpoint(4, attempt=2, step=6, status=CheckpointStatus.CORRUPT),
        checkpoint(5, attempt=3, step=9),
    ]
    assert [item.id for item in eligible(2, attempts, saved)] == [3, 1]
    assert eligible(4, attempts, saved) == []
