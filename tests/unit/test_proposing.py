"""What stands around the engines: points, repeats, and configs that are not to be tried."""

import math
from collections import Counter
from datetime import UTC, datetime

import pytest

from holdfast.core.budget import Budget
from holdfast.core.errors import EngineError, Exhausted, SpecError
from holdfast.core.loop import Done, Ledger, Propose, Submit, Wait, decide
from holdfast.core.ports import Proposal, as_proposal
from holdfast.core.trial import ACTIVE, TrialStatus
from holdfast.core.values import dumps
from holdfast.engines import guard as guarding
from holdfast.engines.factory import check, make_proposer, size_of
from holdfast.engines.grid import GridProposer
from holdfast.engines.guard import Guard
from holdfast.engines.proposing import Points, Repeats
from holdfast.engines.random_engine import RandomProposer, drawn
from holdfast.testing.proposers import changed, config_of, objective_of, proposed, rebuilt
from holdfast.testing.samples import sample_spec, sample_trial

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MIXED = {
    "x": {"type": "int", "low": 0, "high": 9},
    "y": {"type": "float", "low": 0.0, "high": 1.0, "step": 0.25, "default": 0.5},
    "kind": {"type": "categorical", "choices": ["a", "b"], "default": "a"},
    "z": {"type": "int", "low": 1, "high": 3, "default": 2, "when": {"kind": "b"}},
}
POINTS = [{"x": 1}, {"x": 2, "kind": "b"}, {"x": 3, "y": 1.0}]


# The whole of it, in a loop that is killed


def spec_of(engine="random", *, constraints=("x + 4 * y < 9",), space=None, **search):
    search = {"engine": engine, "num_trials": 24, "seed": 1, "points": POINTS, **search}
    return sample_spec(space=space or MIXED, constraints=constraints, search=search)


def ends(trial):
    """Return how a trial ends: some configs always fail or give NaN, some trials are cancelled."""
    if trial.config["x"] in (4, 5):
        return TrialStatus.FAILED, {}
    if trial.config["x"] == 6:
        return TrialStatus.COMPLETED, {"loss": math.nan}
    if trial.number % 13 == 7:
        return TrialStatus.CANCELLED, {}
    return TrialStatus.COMPLETED, {"loss": objective_of(trial.config) + trial.number % 3}


def play(spec, *, kill=-1, queue=None):
    """Run a search in steps to its end; rebuild all that is in memory before step ``kill``.

    Return the trials, the reason of the end, and the steps that proposed something.
    """
    trials, step, asked = {}, 0, []

    def fresh():
        proposer = rebuilt(lambda: make_proposer(spec, 1), trials)
        ledger = Ledger(budget=Budget.of(spec, grid_size=proposer.size), max_concurrent=spec.search.max_concurrent)
        for number in sorted(trials):
            ledger.update(trials[number])
        return proposer, ledger

    def change(trial):
        trials[trial.number] = trial
        proposer.observe(trial)
        ledger.update(trial)

    proposer, ledger = fresh()
    while True:
        if step == kill:
            proposer, ledger = fresh()
        config, repeats = (queue or {}).get(step, (None, 0))
        first = len(trials)
        for repeat in range(repeats):
            change(sample_trial(first + repeat, config=config, source="queued", group=first, repeat=repeat))
        step += 1
        match decide(ledger, NOW):
            case Submit(trial=number):
                change(changed(trials[number], TrialStatus.RUNNING))
            case Propose(number=number):
                asked.append(step - 1)
                try:
                    change(proposed(number, proposer.propose(number)))
                except Exhausted as error:
                    ledger.exhausted, ledger.exhaustion = True, str(error)
            case Wait():
                running = [trial for trial in trials.values() if trial.status is TrialStatus.RUNNING]
                trial = running[len(trials) % len(running)]
                change(changed(trial, *ends(trial)))
            case Done(reason=reason):
                return trials, reason, asked
        assert len(ledger.running) <= spec.search.max_concurrent


def told(trials):
    return {number: (trial.config, trial.source, trial.group, trial.repeat, trial.status) for number, trial in trials.items()}


@pytest.mark.parametrize("concurrent", [1, 2, 3])
@pytest.mark.parametrize(("engine", "repeats"), [("random", 1), ("sobol", 1), ("random", 2), ("sobol", 3)])
def test_killed_after_each_k_of_n_it_ends_as_if_nothing_had_happened(engine, repeats, concurrent):
    spec = spec_of(engine, repeats=repeats, max_concurrent=concurrent)
    queue = {5: ({"x": 0, "y": 0.0, "kind": "a"}, 2), 20: ({"x": 9, "y": 1.0, "kind": "a"}, 1)}
    trials, reason, asked = play(spec, queue=queue)
    assert reason == "every trial of the budget was proposed"
    assert len(trials) == 24
    for kill in asked:
        assert told(play(spec, kill=kill, queue=queue)[0]) == told(trials), kill
    presets = [trial.config for trial in trials.values() if trial.source == "preset" and trial.repeat == 0]
    assert presets == [spec.space.completed(point) for point in POINTS]
    failed = set()
    for trial in trials.values():
        if trial.source == "proposed" and trial.repeat == 0:
            assert trial.config["x"] + 4 * trial.config["y"] < 9
    groups = Counter(trial.group for trial in trials.values() if trial.source != "queued" and trial.group is not None)
    assert all(count == repeats for group, count in groups.items() if group != max(groups))
    assert (repeats > 1) == bool(groups)
    if concurrent == 1:
        for trial in trials.values():
            assert trial.source != "proposed" or trial.repeat > 0 or dumps(trial.config) not in failed, trial
            whole = sum(other.group == trial.group for other in trials.values()) == repeats if repeats > 1 else True
            if trial.config["x"] in (4, 5, 6) and whole and trial.repeat == repeats - 1:
                failed.add(dumps(trial.config))


def test_tpe_killed_in_the_midst_of_points_repeats_and_failures():
    spec = spec_of("tpe", repeats=2, max_concurrent=3, num_trials=40)
    trials, _, asked = play(spec)
    for kill in asked[::8]:
        assert told(play(spec, kill=kill)[0]) == told(trials)


@pytest.mark.parametrize(("samples", "repeats"), [(3, 1), (1, 3)])
@pytest.mark.parametrize("concurrent", [1, 3])
def test_a_grid_keeps_its_points_whatever_comes_between(samples, repeats, concurrent):
    """R6: 3 x 3 with three of each, points and queued trials beside, killed at any moment."""
    space = {name: {"type": "int", "low": 0, "high": 2, "default": 1} for name in ("x", "y")}
    search = {"engine": "grid", "seed": 1, "samples": samples, "repeats": repeats, "max_concurrent": concurrent}
    spec = sample_spec(space=space, search={**search, "points": [{"x": 2}, {}]})
    queue = {7: ({"x": 0, "y": 0}, 2), 30: ({"x": 1, "y": 1}, 1)}
    trials, reason, asked = play(spec, queue=queue)
    assert reason == "every trial of the budget was proposed"
    counts = Counter(dumps(trial.config) for trial in trials.values() if trial.source == "proposed")
    assert sorted(counts.values()) == [3] * 9
    assert sum(trial.source == "preset" for trial in trials.values()) == 2 * repeats
    for kill in asked:
        assert told(play(spec, kill=kill, queue=queue)[0]) == told(trials)


# Points


def test_a_point_is_completed_tried_once_and_told_to_the_engine():
    spec = spec_of()
    proposer = make_proposer(spec, 1)
    assert proposer.propose(0) == Proposal(config={"x": 1, "y": 0.5, "kind": "a"}, source="preset")
    proposer.observe(sample_trial(0, config={"x": 7, "y": 0.0, "kind": "a"}, source="queued", group=0))
    proposer.observe(sample_trial(1, TrialStatus.FAILED, config={"x": 1, "y": 0.5, "kind": "a"}, source="preset"))
    assert proposer.propose(2) == Proposal(config={"x": 2, "y": 0.5, "kind": "b", "z": 2}, source="preset")


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"y": 0.5}, r"search\.points\[2\] lacks 'x'"),
        ({"x": 10}, r"search\.points\[2\].*x = 10 is outside"),
        ({"x": 1, "w": 3}, r"search\.points\[2\].*'w'"),
        ({"x": 1, "z": 2}, r"search\.points\[2\].*'z'.*inactive"),
        ({"x": 9, "y": 1.0}, r"search\.points\[2\] breaks the constraint 'x \+ 4 \* y < 9'"),
    ],
)
def test_a_wrong_point_is_refused_with_its_place_and_parameter(point, words):
    with pytest.raises(SpecError, match=words):
        check(spec_of(points=[*POINTS[:2], point]))


# Repeats


class Recorder:
    """An engine that keeps what it is told."""

    size = 5

    def __init__(self):
        self.seen = {}
        self.asked = []

    def observe(self, trial):
        self.seen[trial.number] = trial

    def propose(self, number):
        self.asked.append(number)
        return Proposal(config={"x": number}, state=b"kept")


def repeated(engine=None, objectives=None, feasible=(), **search):
    search = {"engine": "random", "num_trials": 99, "seed": 1, "repeats": 3, **search}
    space = {"x": {"type": "int", "low": 0, "high": 9}}
    spec = sample_spec(space=space, objectives=objectives or {"loss": "min"}, feasible=feasible, search=search)
    engine = engine or Recorder()
    return Repeats(engine, spec), engine


def group(first, *endings, source="proposed"):
    """Return the trials of a group; each ending is a loss, metrics, or a status."""
    for repeat, ending in enumerate(endings):
        status = ending if isinstance(ending, TrialStatus) else TrialStatus.COMPLETED
        metrics = {} if isinstance(ending, TrialStatus) else ending if isinstance(ending, dict) else {"loss": ending}
        yield sample_trial(first + repeat, status, config={"x": 1}, metrics=metrics, source=source, group=first, repeat=repeat)


FAILED, CANCELLED, RUNNING = TrialStatus.FAILED, TrialStatus.CANCELLED, TrialStatus.RUNNING
SKIPPED, PRUNED, COMPLETED = TrialStatus.SKIPPED, TrialStatus.PRUNED, TrialStatus.COMPLETED


@pytest.mark.parametrize(
    ("how", "endings", "status", "loss"),
    [
        ("mean", (1.0, 2.0, 6.0), COMPLETED, 3.0),
        ("median", (1.0, 2.0, 6.0), COMPLETED, 2.0),
        ("worst", (1.0, 2.0, 6.0), COMPLETED, 6.0),
        ("mean", (1.0, FAILED, 6.0), COMPLETED, 3.5),
        ("mean", (1.0, math.nan, 6.0), COMPLETED, 3.5),
        ("median", (CANCELLED, math.inf, 6.0), COMPLETED, 6.0),
        ("mean", (SKIPPED, 2.0, 6.0), COMPLETED, 4.0),
        ("worst", (1.0, FAILED, 6.0), FAILED, None),
        ("worst", (1.0, math.nan, 6.0), FAILED, None),
        ("worst", (1.0, CANCELLED, 6.0), COMPLETED, 6.0),
        ("mean", (FAILED, math.nan, CANCELLED), FAILED, None),
        ("mean", (CANCELLED, SKIPPED, CANCELLED), CANCELLED, None),
        ("mean", (1.0, 2.0, RUNNING), RUNNING, None),
        ("mean", (1.0, 2.0), RUNNING, None),
        ("mean", (1.7e308, 1.7e308, 1.7e308), COMPLETED, pytest.approx(1.7e308)),
    ],
)
def test_a_group_is_one_trial_for_the_engine(how, endings, status, loss):
    proposer, engine = repeated(aggregate=how)
    for trial in [*group(0, *endings), *group(3, 0.0, 0.0, 0.0)]:
        proposer.observe(trial)
    proposer._incomplete.clear()  # what is missing would come first
    proposer.propose(len(endings) + 3)
    assert sorted(engine.seen) == [0, 1]
    assert (engine.seen[0].status, engine.seen[0].metrics.get("loss")) == (status, loss)
    assert engine.asked == [2]


def test_the_worst_is_by_direction_and_so_is_what_makes_a_group_infeasible():
    endings = [{"loss": 1.0, "acc": 0.5, "mem": 1, "ok": True}, {"loss": 3.0, "acc": 0.9, "mem": 9, "ok": False}, FAILED]
    found = {}
    for how in ("worst", "mean"):
        proposer, engine = repeated(
            objectives={"loss": "min", "acc": "max"}, feasible=["mem <= 4", "ok == true"], aggregate=how
        )
        for trial in group(0, *(endings if how == "mean" else endings[:2]), *(endings[:1] if how == "worst" else ())):
            proposer.observe(trial)
        proposer.propose(3)
        found[how] = engine.seen[0].metrics
    assert found["worst"] == {"loss": 3.0, "acc": 0.5, "mem": 9, "ok": False}
    assert found["mean"] == {"loss": 2.0, "acc": pytest.approx(0.7), "mem": 5.0, "ok": False}


def test_members_are_proposed_side_by_side_and_missing_ones_first():
    proposer, engine = repeated()
    trials = {}
    for number in range(4):
        trials[number] = changed(proposed(number, proposer.propose(number)), RUNNING)
        proposer.observe(trials[number])
    assert [(trial.group, trial.repeat, trial.state) for trial in trials.values()] == [
        (0, 0, b"kept"),
        (0, 1, None),
        (0, 2, None),
        (3, 0, b"kept"),
    ]
    for lost in (1, 2):
        left = {number: trial for number, trial in trials.items() if number < lost}
        again = rebuilt(lambda: repeated()[0], left).propose(lost)
        assert (again.group, again.repeat, again.config) == (0, lost, {"x": 0})
    assert engine.seen[0].status is RUNNING
    assert engine.seen[0].state == b"kept"


def test_queued_groups_have_as_many_members_as_were_queued():
    proposer, engine = repeated()
    for trial in [*group(0, 1.0, 3.0, source="queued"), *group(2, 7.0, source="queued"), *group(3, 1.0, 1.0, 1.0)]:
        proposer.observe(trial)
    merged = sample_trial(-1, COMPLETED, config={"x": 1}, metrics={"loss": 4.0}, source="merged")
    proposer.observe(merged)
    proposer.propose(6)
    assert {number: trial.metrics["loss"] for number, trial in engine.seen.items()} == {0: 2.0, 1: 7.0, 2: 1.0, -1: 4.0}
    assert engine.seen[-1] is merged
    assert proposer.size == 15


def test_a_failed_member_that_succeeds_later_reaches_the_engine():
    """R10, inside a group."""
    proposer, engine = repeated(aggregate="worst")
    trials = {trial.number: trial for trial in group(0, 1.0, FAILED, 2.0)}
    for trial in trials.values():
        proposer.observe(trial)
    proposer.propose(3)
    assert engine.seen[0].status is FAILED
    for status in (TrialStatus.PENDING, RUNNING, COMPLETED):
        proposer.observe(changed(trials[1], status, {"loss": 5.0} if status is COMPLETED else {}, attempt=2))
    proposer.propose(3)
    assert (engine.seen[0].status, engine.seen[0].metrics) == (COMPLETED, {"loss": 5.0})


def test_points_are_repeated_and_a_group_that_the_budget_cut_off_goes_on():
    spec = spec_of(repeats=3, num_trials=5)
    trials, _, _ = play(spec)
    assert [(trial.source, trial.group, trial.repeat) for trial in trials.values()] == [
        *(("preset", 0, repeat) for repeat in range(3)),
        *(("preset", 3, repeat) for repeat in range(2)),
    ]
    missing = rebuilt(lambda: make_proposer(spec, 1), trials).propose(5)
    assert (missing.config, missing.source, missing.group, missing.repeat) == (trials[3].config, "preset", 3, 2)


# The guard

NUMBER = {"n": {"type": "int", "low": 0, "high": 4}}


def guarded(engine, constraints=(), space=None, **search):
    search = {"engine": engine, "num_trials": 50, "seed": 1, **search}
    return sample_spec(space=space or NUMBER, constraints=constraints, search=search)


def observed(spec, endings):
    """Return a proposer that knows configs ``{"n": value}``, each with a loss or a status."""
    trials = {}
    for number, (value, ending) in enumerate(endings):
        status = ending if isinstance(ending, TrialStatus) else COMPLETED
        metrics = {} if isinstance(ending, TrialStatus) else {"loss": ending}
        trials[number] = sample_trial(number, status, config={"n": value}, metrics=metrics)
    return rebuilt(lambda: make_proposer(spec, 1), trials), len(trials)


@pytest.mark.parametrize("engine", ["random", "tpe", "sobol", "halton"])
@pytest.mark.parametrize("ending", [FAILED, TrialStatus.TIMED_OUT, math.nan])
def test_what_failed_is_not_proposed_again(engine, ending):
    failed = [(value, ending) for value in (0, 1, 2, 4)]
    for seed_number in range(12):
        proposer, number = observed(guarded(engine), [*failed, *[(3, 1.0)] * seed_number])
        assert config_of(proposer.propose(number)) == {"n": 3}


@pytest.mark.parametrize("engine", ["random", "tpe", "sobol"])
def test_what_was_cancelled_or_succeeded_once_may_be_tried_again(engine):
    proposer, number = observed(guarded(engine), [(0, FAILED), (0, 1.0), *[(value, FAILED) for value in (1, 2, 3, 4)]])
    assert config_of(proposer.propose(number)) == {"n": 0}
    proposer, number = observed(guarded(engine), [(2, CANCELLED), *[(value, FAILED) for value in (0, 1, 3, 4)]])
    assert config_of(proposer.propose(number)) == {"n": 2}


@pytest.mark.parametrize("engine", ["random", "tpe", "sobol"])
def test_when_everything_has_failed_the_search_says_so(engine):
    proposer, number = observed(guarded(engine, ["n < 3"]), [(value, FAILED) for value in (0, 1, 2)])
    with pytest.raises(Exhausted, match=r"each of the 3 configs .* was tried and failed"):
        proposer.propose(number)
    assert number == 3


def test_an_exhausted_search_ends_and_does_not_hang(monkeypatch):
    spec = sample_spec(space={"x": {"type": "int", "low": 4, "high": 6}}, search={"engine": "tpe", "num_trials": 50, "seed": 1})
    trials, reason, asked = play(spec)
    assert len(trials) == 3
    assert reason == "each of the 3 configs that the space and the constraints allow was tried and failed"
    for kill in asked:
        assert play(spec, kill=kill)[:2] == (trials, reason)


def test_a_model_does_not_propose_what_runs_unless_nothing_else_is_left():
    for busy in (RUNNING, TrialStatus.PENDING):
        proposer, number = observed(guarded("tpe"), [(value, busy) for value in (0, 1, 2, 3)])
        assert config_of(proposer.propose(number)) == {"n": 4}
        proposer, number = observed(guarded("tpe"), [(0, FAILED), *[(value, busy) for value in (1, 2, 3, 4)]])
        assert config_of(proposer.propose(number))["n"] in (1, 2, 3, 4)


def test_independent_draws_may_be_equal():
    proposer, number = observed(guarded("random"), [(value, RUNNING) for value in range(5)] * 2)
    assert proposer.propose(number) == RandomProposer(guarded("random").space, 1).propose(number)


@pytest.mark.parametrize("engine", ["random", "tpe", "sobol", "halton"])
def test_constraints_hold_of_every_proposal(engine):
    space = {
        "lr": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
        "batch": {"type": "int", "low": 1, "high": 512},
        "opt": {"type": "categorical", "choices": ["sgd", "adam"]},
        "momentum": {"type": "float", "low": 0.0, "high": 1.0, "when": {"opt": "sgd"}},
    }
    spec = guarded(engine, ["lr * batch < 0.05", "momentum > 0.8"], space=space)
    trials, kinds = {}, set()
    proposer = make_proposer(spec, 1)
    for number in range(20):
        offered = proposer.propose(number)
        if number % 5 == 4:
            assert rebuilt(lambda: make_proposer(spec, 1), trials).propose(number) == offered
        trials[number] = changed(proposed(number, offered), COMPLETED, {"loss": objective_of(config_of(offered))})
        proposer.observe(trials[number])
        config = trials[number].config
        assert config["lr"] * config["batch"] < 0.05
        assert config.get("momentum", 1.0) > 0.8
        kinds.add(config["opt"])
    assert kinds == {"sgd", "adam"}  # a condition on an inactive parameter says nothing


def test_the_engine_is_asked_again_before_the_dice_are():
    class Counting:
        size = None

        def __init__(self):
            self.asked = []

        def observe(self, trial):
            pass

        def propose(self, number, *, retry=0):
            self.asked.append(retry)
            return {"n": min(retry, 2)}

    spec = guarded("tpe", ["n > 1"])
    for retries, found in ((3, {2}), (1, {2, 3, 4})):
        engine = Counting()
        guard = Guard(engine, spec, 1, retries=retries, models=True)
        assert {as_proposal(guard.propose(number)).config["n"] for number in range(30)} == found
        assert engine.asked[: min(retries, 2) + 1] == [0, 1, 2][: retries + 1]


def test_a_constraint_that_one_config_in_thousands_meets_ends_no_search(monkeypatch):
    """A search that cannot find a config could not be restored either: it would draw the same ones again."""
    spec = guarded("random", ["0.5 < x < 0.5003"], space={"x": {"type": "float", "low": 0.0, "high": 1.0}})
    check(spec)
    trials, needed = {}, []
    monkeypatch.setattr(guarding, "drawn", lambda space, seed: needed.append(seed) or drawn(space, seed))
    proposer = make_proposer(spec, 1)
    for number in range(8):
        offered = proposer.propose(number)
        trials[number] = changed(proposed(number, offered), COMPLETED, {"loss": 1.0})
        proposer.observe(trials[number])
        if number == 3:
            assert rebuilt(lambda: make_proposer(spec, 1), trials).propose(4) == proposer.propose(4)
    assert len(needed) > 8 * 1000
    space = {"n": {"type": "int", "low": 1, "high": 20_000}}
    assert config_of(make_proposer(guarded("random", ["n == 7777"], space=space), 3).propose(0)) == {"n": 7777}


def test_constraints_that_nothing_meets_are_refused_and_say_which(monkeypatch):
    monkeypatch.setattr(guarding, "MOST_DRAWS", 10_000)
    with pytest.raises(SpecError, match=r"constraints: .*'n > 9' was never met by 5 configs; relax it"):
        check(guarded("tpe", ["n < 9", "n > 9"]))
    with pytest.raises(SpecError, match="never met together by 5 configs"):
        check(guarded("random", ["n < 2", "n > 2"]))
    wide = {"n": {"type": "float", "low": 0.0, "high": 1.0}}
    with pytest.raises(SpecError, match=r"'n > 1' was never met by 10,000 configs"):
        check(guarded("random", ["n > 1"], space=wide))
    with pytest.raises(EngineError, match=r"'n > 1' was never met by 10,000 configs"):
        make_proposer(guarded("random", ["n > 1"], space=wide), 1).propose(0)
    check(guarded("random", ["n == 0.123"], space=wide, points=[{"n": 0.123}], num_trials=1))  # nothing is proposed


@pytest.mark.parametrize("samples", [1, 2])
def test_a_grid_leaves_out_the_points_that_break_a_constraint(samples):
    spec = guarded("grid", ["x + y < 4"], space={name: {"type": "int", "low": 0, "high": 3} for name in "xy"}, samples=samples)
    proposer = make_proposer(spec, 1)
    assert proposer.size == size_of(spec, 1) == 10 * samples
    trials, reason, _ = play(spec)
    whole = GridProposer(spec.space)
    points = [point for point in map(whole.propose, range(16)) if point["x"] + point["y"] < 4]
    assert [trial.config for trial in trials.values()] == points * samples
    assert reason == "every trial of the budget was proposed"


def test_small_searches_have_no_layers_that_cost():
    """The places of trials without groups are their numbers: what an engine is told is what is stored."""
    engine = Recorder()
    proposer = Repeats(Points(engine, []), guarded("random"))
    trials = [sample_trial(number, COMPLETED, config={"n": 1}, metrics={"loss": 1.0}) for number in range(4)]
    for trial in trials:
        proposer.observe(trial)
    proposer.propose(4)
    assert all(engine.seen[trial.number] is trial for trial in trials)
    assert not any(trial.status in ACTIVE for trial in engine.seen.values())
