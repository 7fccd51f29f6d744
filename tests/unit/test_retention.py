import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.checkpoint import Checkpoint, CheckpointStatus, chain, check_step, eligible
from holdfast.core.errors import InvalidStep
from holdfast.core.objective import Direction, Objective
from holdfast.core.retention import KeepBest, KeepLast, policies, ranking, surplus
from holdfast.core.spec import CheckpointConfig
from holdfast.core.trial import Attempt

LOSS = Objective(name="loss")
values = st.none() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.0, "bad", True]) | st.floats()


def checkpoint(identity, loss=None, **rest):
    metrics = {} if loss is None else {"loss": loss}
    return Checkpoint(**{
        "id": identity, "trial": 0, "attempt": 1, "step": identity, "path": f"{identity}", "digest": "", "bytes": 1,
        "metrics": metrics, **rest,
    })  # fmt: skip


histories = st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=12).map(
    lambda rows: [checkpoint(identity, loss, pinned=pinned) for identity, (loss, pinned) in enumerate(rows)]
)
configs = st.builds(
    CheckpointConfig,
    mode=st.sampled_from(["all", "last"]),
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
    if config.keep_top_k is None and config.keep_last is None and config.mode == "all":
        assert not dropped


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
