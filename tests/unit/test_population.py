"""The rules of a population: pure functions of the members, their values and the seed."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.budget import Budget
from holdfast.core.errors import SpecError
from holdfast.core.loop import Done, Evolve, Ledger, Propose, Submit, Wait, decide
from holdfast.core.objective import Direction, Objective
from holdfast.core.population import Population, difference, ends_generation, perturbed, ranking
from holdfast.core.search_section import PopulationSection
from holdfast.core.space import Space
from holdfast.core.trial import TrialStatus
from holdfast.engines.random_engine import draw
from holdfast.testing.samples import sample_spec, sample_trial

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPACE = {
    "lr": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
    "shift": {"type": "float", "low": -1.0, "high": 1.0},
    "rate": {"type": "float", "low": 0.0, "high": 1.0, "step": 0.1},
    "layers": {"type": "int", "low": 1, "high": 8},
    "width": {"type": "int", "low": 32, "high": 256, "step": 32},
    "units": {"type": "int", "low": 1, "high": 1024, "log": True},
    "act": {"type": "categorical", "choices": ["relu", "tanh"]},
    "slope": {"type": "float", "low": 0.0, "high": 1.0, "when": {"act": "relu"}},
    "fixed": {"type": "constant", "value": 3},
}


def spec_of(**changes):
    search = {"engine": "random", "num_trials": 8, "seed": 1}
    return sample_spec(**{"space": SPACE, "search": search, "population": {"interval": 2}, **changes})


def population(seed=1, **changes):
    found = Population.of(spec_of(**changes), seed)
    assert found is not None
    return found


def config_of(seed):
    random, config = Random(seed), {}
    space = Space.model_validate(SPACE)
    for name, parameter in space.parameters.items():
        if space.is_active(name, config):
            config[name] = draw(parameter, random)
    return config


def members(losses, generation=0):
    return [
        replace(sample_trial(number, config=config_of(number), metrics={"loss": loss}), step=2 * generation + 1)
        for number, loss in enumerate(losses)
    ]


values = st.one_of(st.floats(), st.none(), st.text(max_size=2))


class TestExploit:
    @given(st.lists(values, max_size=12), st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 3), st.randoms())
    def test_the_worst_go_on_from_the_best(self, losses, quantile, generation, random):
        rules = population(population={"interval": 2, "quantile": quantile})
        found = members(losses, generation)
        changes = rules.evolved(generation, found, draw)
        shuffled = list(found)
        random.shuffle(shuffled)
        assert rules.evolved(generation, shuffled, draw) == changes
        order = [trial.number for trial in ranking(found, rules.objective)]
        count = max(1, int(quantile * len(found))) if len(found) > 1 else 0
        finite = [number for number in order[:count] if isinstance(losses[number], float) and math.isfinite(losses[number])]
        assert [change.trial for change in changes] == (sorted(order[len(order) - count :]) if finite else [])
        for change in changes:
            assert change.donor in finite
            assert change.step == rules.end(generation) == 2 * generation + 1
            assert rules.space.validate_config(change.config) == change.config
            assert change.changes == difference(found[change.donor].config, change.config)

    def test_order(self):
        loss = Objective(name="loss")
        found = members([math.nan, 2.0, 1.0, math.inf, 2.0, None, -math.inf])
        assert [trial.number for trial in ranking(found, loss)] == [2, 1, 4, 0, 3, 5, 6]
        most = Objective(name="loss", direction=Direction.MAX)
        assert [trial.number for trial in ranking(found, most)] == [1, 4, 2, 0, 3, 5, 6]

    def test_a_lone_member_goes_on(self):
        assert population().evolved(0, members([1.0]), draw) == []

    def test_who_has_passed_over_the_last_step_takes_no_part(self):
        found = members([1.0, 2.0, 3.0])
        found[0] = replace(found[0], step=2)
        (change,) = population().evolved(0, found, draw)
        assert (change.trial, change.donor, change.step) == (2, 1, 1)
        assert population().evolved(1, found, draw) == []

    def test_other_seeds_and_generations_draw_otherwise(self):
        found = [members([1.0, 2.0], generation) for generation in (0, 1)]
        configs = [
            population(seed).evolved(generation, found[generation], draw)[0].config for seed in (1, 2) for generation in (0, 1)
        ]
        assert all(left != right for place, left in enumerate(configs) for right in configs[:place])

    def test_the_note_tells_what_changed(self):
        rules = population(space={"lr": SPACE["lr"]}, population={"interval": 2, "resample": 0.0, "factors": [0.5]})
        found = [replace(one, config={"lr": 0.5}) for one in members([1.0, 2.0])]
        (change,) = rules.evolved(0, found, draw)
        assert change.note == "goes on from trial 0 at step 1: lr 0.5 -> 0.25"

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, ("loss", "min")),
            ({"metric": "acc"}, ("acc", "max")),
            ({"metric": "time"}, ("time", "min")),
            ({"metric": "time", "higher_is_better": True}, ("time", "max")),
            ({"higher_is_better": True}, ("loss", "max")),
        ],
    )
    def test_what_members_are_compared_by(self, settings, expected):
        settings = {"interval": 1, **settings}
        found = population(objectives={"loss": "min", "acc": "max"}, population=settings).objective
        assert (found.name, found.direction) == expected


class TestExplore:
    @given(st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from([0.0, 0.25, 1.0]), st.lists(st.sampled_from([*SPACE])))
    def test_what_comes_out_is_a_config(self, start, seed, resample, parameters):
        rules = population(population={"interval": 2, "resample": resample, "parameters": parameters})
        before = config_of(start)
        after = rules.explore(before, draw, seed)
        assert rules.space.validate_config(after) == after
        assert rules.explore(before, draw, seed) == after
        kept = set(SPACE) - set(parameters) if parameters else {"fixed"}
        assert all(after[name] == before[name] for name in kept & set(before) & set(after))
        if resample == 0.0:
            assert after["act"] == before["act"]
            assert all(after[name] in (before[name], *_moved(before[name])) for name in ("lr",))

    def test_conditions_are_kept(self):
        rules = population(population={"interval": 2, "resample": 1.0, "parameters": ["act"]})
        relu = next(config for config in map(config_of, range(50)) if config["act"] == "relu")
        tanh = {name: value for name, value in relu.items() if name != "slope"} | {"act": "tanh"}
        for before in (relu, tanh):
            found = [rules.explore(before, draw, seed) for seed in range(20)]
            assert {config["act"] for config in found} == {"relu", "tanh"}
            assert all(("slope" in config) == (config["act"] == "relu") for config in found)

    def test_constraints_are_kept(self):
        rules = population(constraints=["lr * layers < 0.5"])
        before = {**config_of(1), "lr": 0.06, "layers": 8}
        found = [rules.explore(before, draw, seed) for seed in range(50)]
        assert all(config["lr"] * config["layers"] < 0.5 for config in found)
        assert any(config != before for config in found)

    def test_what_cannot_be_kept_changes_nothing(self):
        rules = population(constraints=["layers > 7.5"], population={"interval": 2, "resample": 0.0, "factors": [0.5]})
        before = {**config_of(1), "layers": 8}
        assert rules.explore(before, draw, 1) == before


def _moved(value):
    return [min(max(value * factor, 1e-4), 1.0) for factor in (0.8, 1.2)]


@pytest.mark.parametrize(
    ("parameter", "value", "factor", "expected"),
    [
        ("lr", 0.5, 0.8, 0.4),
        ("lr", 0.9, 1.2, 1.0),
        ("lr", 1e-4, 0.8, 1e-4),
        ("shift", -0.5, 1.2, -0.6),
        ("rate", 0.3, 1.2, 0.4),
        ("rate", 0.3, 0.8, 0.2),
        ("rate", 1.0, 1.2, 0.9),
        ("layers", 5, 1.2, 6),
        ("layers", 1, 1.2, 2),
        ("layers", 1, 0.8, 1),
        ("layers", 2, 0.8, 1),
        ("layers", 3, 1.0, 3),
        ("width", 64, 0.8, 32),
        ("width", 32, 0.8, 64),
        ("units", 100, 0.8, 80),
        ("act", "relu", 1.2, "relu"),
        ("fixed", 3, 1.2, 3),
    ],
)
def test_perturbing(parameter, value, factor, expected):
    found = perturbed(Space.model_validate(SPACE).parameters[parameter], value, factor)
    assert found == pytest.approx(expected) if isinstance(expected, float) else found == expected
    assert type(found) is type(expected)


def test_ends_of_generations():
    settings = PopulationSection(interval=3)
    assert [step for step in range(10) if ends_generation(settings, step)] == [2, 5, 8]
    assert [step for step in range(10) if ends_generation(settings, step, 9)] == [2, 5]
    assert not ends_generation(None, 2)


class TestLoop:
    def ledger(self, max_concurrent=2, **changes):
        limits = Budget(num_trials=3, objective=Objective(name="loss"), **changes)
        return Ledger(budget=limits, max_concurrent=max_concurrent, population=population())

    def waiting(self, number, step, **changes):
        return replace(sample_trial(number, attempt=2, claimed=False, metrics={"loss": 1.0}, **changes), step=step)

    def test_members_wait_for_all(self):
        book = self.ledger()
        book.update(self.waiting(0, 1))
        assert decide(book, NOW) == Propose(1)
        book.update(self.waiting(1, 0))  # interrupted before
        assert decide(book, NOW) == Submit(1)
        book.submitted(1)
        assert decide(book, NOW) == Propose(2)
        book.update(sample_trial(2, TrialStatus.FAILED))  # it has left
        assert decide(book, NOW) == Wait()
        book.update(self.waiting(1, 1))
        assert decide(book, NOW) == Evolve(0)
        book.evolved()
        assert decide(book, NOW) == Submit(0)
        book.update(self.waiting(0, 3))
        assert decide(book, NOW) == Submit(1)
        book.update(sample_trial(1, TrialStatus.COMPLETED, metrics={"loss": 1.0}))
        assert decide(book, NOW) == Evolve(1)

    def test_who_fell_behind_catches_up(self):
        book = self.ledger()
        book.generation = 2
        for number, step in enumerate((5, 5, 3)):
            book.update(self.waiting(number, step))
        assert decide(book, NOW) == Submit(2)

    def test_nobody_waits_after_the_last_step(self):
        book = self.ledger()
        book.population = population(stopping={"max_steps": 4})
        book.generation = 1
        for number in range(3):
            book.update(self.waiting(number, 3))
        assert decide(book, NOW) == Submit(0)

    def test_a_halt_leaves_members_as_they_are(self):
        book = self.ledger()
        for number in range(3):
            book.update(self.waiting(number, 1))
        book.halt = "stopped on request"
        assert decide(book, NOW) == Done("stopped on request")

    def test_so_does_a_time_budget_that_is_used_up(self):
        book = self.ledger(time_budget=5.0)
        for number in range(3):
            book.update(self.waiting(number, 1))
        book.active_seconds = 6.0
        assert decide(book, NOW) == Done("the time budget of 5 s is used up")

    def test_members_do_not_wait_for_a_trial_that_is_queued_for_later(self):
        book = self.ledger()
        for number in range(3):
            book.update(self.waiting(number, 1))
        book.update(sample_trial(3, ts_start=NOW + timedelta(hours=1), source="queued"))
        assert decide(book, NOW) == Evolve(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"num_trials": 1}}, "search.num_trials is 1; a population has as many members: give 2 or more"),
        ({"search": {"engine": "random", "time_budget": 5}}, "search.num_trials is None; a population has as many"),
        ({"search": {"num_trials": 4, "repeats": 2}}, "search.repeats and search.samples make no sense in a population"),
        ({"search": {"num_trials": 4, "engine": "grid", "samples": 2}}, "samples make no sense in a population"),
        ({"checkpoints": {"enabled": False}}, "population needs checkpoints"),
        ({"checkpoints": {"mode": "none"}}, "population needs checkpoints"),
        (
            {"population": {"interval": 4}, "stopping": {"max_steps": 4}},
            "population.interval (4) is not below stopping.max_steps",
        ),
        ({"population": {"interval": 4, "parameters": ["rl"]}}, "population.parameters names rl; allowed: x"),
        ({"population": {"interval": 4, "factors": [0.0]}}, "factors must be above 0, not [0.0]"),
        ({"population": {"interval": 0}}, "population.interval is 0"),
        ({"population": {"interval": 4, "quantile": 0.6}}, "population.quantile is 0.6"),
        ({"population": {}}, "population.interval is missing"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_remedy(changes, message):
    space = {"x": {"type": "int", "low": 0, "high": 1}}
    with pytest.raises(SpecError) as refused:
        sample_spec(**{"space": space, "population": {"interval": 2}, **changes})
    assert message in str(refused.value)
