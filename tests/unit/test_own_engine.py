"""Engines of the user's own: found, made and held to the protocol."""

import json
import runpy
import sys
from pathlib import Path

import numpy
import pytest

from holdfast.cli import main
from holdfast.core.errors import EngineError, Exhausted, SpecError
from holdfast.core.ports import Proposal
from holdfast.core.trial import TrialStatus
from holdfast.engines.factory import check, make_proposer, size_of
from holdfast.engines.own import engine_name
from holdfast.specfile import ExperimentSpec
from holdfast.testing.proposers import ProposerContract, changed, objective_of, proposed
from holdfast.testing.samples import sample_spec, sample_trial

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_engine"


class TestExample(ProposerContract):
    engine = f"{EXAMPLE}/engine.py:Evolution"

    def make(self, spec, seed):
        return make_proposer(spec, seed)


class TestAlone(ProposerContract):
    """As docs/engines.md has it: the class itself, which says nothing of a size."""

    def make(self, spec, seed):
        return runpy.run_path(str(EXAMPLE / "engine.py"))["Evolution"](spec.space, spec.goals, seed)


def test_the_example_gets_better_than_its_first_draws():
    spec = ExperimentSpec.from_file(EXAMPLE / "own_engine.yaml")
    assert spec.search.engine == f"{EXAMPLE}/engine.py:Evolution"
    spec = sample_spec(space={"x": {"type": "float", "low": -5.0, "high": 5.0}}, search={**spec.search.model_dump()})
    check(spec)
    proposer, found = make_proposer(spec, 1), []
    for number in range(60):
        trial = proposed(number, proposer.propose(number))
        found.append(trial.config["x"] ** 2)
        proposer.observe(changed(trial, TrialStatus.COMPLETED, {"loss": found[-1]}))
    assert min(found) < 0.01
    assert sum(found[40:]) < sum(found[:20])


OWN = """
from dataclasses import dataclass
import holdfast
import helper

@dataclass
class Plain:
    space: object
    objectives: object
    seed: int
    offers: object = None
    def observe(self, trial): self.last = trial
    def propose(self, number): return helper.offer(self.offers, number)

class Sized(Plain):
    size = 7

class Observing(Plain):
    def observe(self, trial): raise KeyError("no such place")

class NoPropose:
    def observe(self, trial): pass

def function(space, objectives, seed): pass
"""
HELPER = """
import holdfast

def offer(what, number):
    if what == "raise":
        raise RuntimeError("the model does not fit")
    if what == "exhausted":
        raise holdfast.Exhausted("seven are enough")
    if what == "state":
        return holdfast.Proposal(config={"x": 0.5}, state="text")
    if what == "numpy":
        import numpy
        return {"x": numpy.float64(0.25)}
    return {"x": 0.5} if what is None else what
"""


WILD = """
import collections.abc, sys
import holdfast

class Silent(Exception):
    def __str__(self): raise ValueError("nothing to say")

class Shy:
    def __repr__(self): raise ValueError("nothing to show")

class Torn(collections.abc.Mapping):
    def __getitem__(self, name): raise RuntimeError("torn")
    def __iter__(self): return iter(["x"])
    def __len__(self): return 1

def offer(what):
    if what == "exit": sys.exit(0)
    if what == "silent": raise Silent
    if what == "shy": return {"x": Shy()}
    if what == "torn": return Torn()
    if what == "endless":
        endless = {}
        endless["x"] = endless
        return endless
    return {"x": 0.5}

class Wild:
    def __init__(self, space, objectives, seed, offers=None, at=None, size=None, changed=()):
        self.at, self.offers = at, offers
        if at == "constructor": sys.exit(0)
        if size is not None: self.size = size
        if at == "size":
            type(self).size = property(lambda self: sys.exit(0))
        if at == "arguments":
            changed.append(99)
            space.parameters.pop("x")
    def observe(self, trial):
        if self.at == "observe": sys.exit(0)
        if self.at == "exhausted": raise holdfast.Exhausted("no more")
        if self.at == "trial":
            trial.config["x"] = 0.9
            trial.metrics["more"]["list"].append(3)
    def propose(self, number): return offer(self.offers)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("helper", "own_package", "own_package.engines"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "engine.py").write_text(OWN)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "wild.py").write_text(WILD)
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "broken.py").write_text("import helper\n\nvalue = 1 / 0\n")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").touch()
    (tmp_path / "own_package" / "engines.py").write_text(OWN)
    yield tmp_path
    for name in ("helper", "own_package", "own_package.engines"):
        sys.modules.pop(name, None)


def spec_of(engine, *, constraints=(), trainable="train.py:train", **options):
    search = {"engine": engine, "num_trials": 9, "seed": 1, "options": options}
    return sample_spec(trainable=trainable, constraints=constraints, search=search)


@pytest.mark.parametrize("engine", ["engine.py:Plain", "own_package.engines:Plain"])
def test_a_class_is_found_from_the_working_folder(folder, engine):
    spec = spec_of(engine, offers={"x": 1})
    check(spec, workdir=str(folder))
    proposer = make_proposer(spec, 5, workdir=str(folder))
    assert proposer.propose(0) == {"x": 1.0}
    inner = proposer._inner._inner._inner
    assert (inner.space, inner.objectives, inner.seed) == (spec.space, spec.goals, 5)
    trial = sample_trial(0, TrialStatus.COMPLETED, config={"x": 1.0}, metrics={"loss": objective_of({"x": 1.0})})
    proposer.observe(trial)
    proposer.propose(1)
    assert inner.last == trial


def test_an_engine_may_say_how_much_it_has_and_that_it_has_no_more(folder):
    spec = spec_of("engine.py:Sized", offers="exhausted")
    assert size_of(spec, 1, workdir=str(folder)) == make_proposer(spec, 1, workdir=str(folder)).size == 7
    with pytest.raises(Exhausted, match="seven are enough"):
        make_proposer(spec, 1, workdir=str(folder)).propose(0)
    assert make_proposer(spec_of("engine.py:Plain", offers="numpy"), 1, workdir=str(folder)).propose(0) == {"x": 0.25}


def test_a_file_that_was_moved_is_found_beside_the_trainable_or_in_the_working_folder(folder):
    gone = "/gone/engine.py:Plain"
    check(spec_of(gone, trainable=f"{folder}/train.py:train"), workdir="/nowhere")
    check(spec_of(gone), workdir=str(folder))
    with pytest.raises(SpecError, match=r"there is no file /gone/engine\.py, nor /nowhere/engine\.py; put it there"):
        check(spec_of(gone), workdir="/nowhere")
    assert engine_name(gone) == engine_name("engine.py:Plain") == "engine:Plain"
    assert engine_name("a.b:C") == "a.b:C"


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("absent.py:Plain", {}, r"there is no file .*absent\.py"),
        ("absent_package.engines:Plain", {}, r"there is no module 'absent_package', neither in .* nor installed"),
        ("engine.py:Plane", {}, r"has no 'Plane'; did you mean Plain\?"),
        ("engine.py:function", {}, r"is a function; it must be a class with observe\(trial\)"),
        ("engine.py:NoPropose", {}, r"has no propose\(\)"),
        ("broken.py:Plain", {}, r"(?s)cannot be imported: ZeroDivisionError.*broken\.py.*line 3"),
        ("engine.py:Plain", {"offer": 1}, r"(?s)with the options {'offer': 1} raised TypeError.*offer"),
    ],
)
def test_a_class_that_cannot_be_had_is_refused_beforehand(folder, engine, options, words):
    with pytest.raises(SpecError, match=words):
        check(spec_of(engine, **options), workdir=str(folder))


@pytest.mark.parametrize(
    ("offers", "words"),
    [
        ("raise", r"(?s)propose\(0\) raised RuntimeError: the model does not fit.*helper\.py.*offer"),
        ([0.5], r"returned, \[0\.5\], is a list; it must be a mapping of parameters, or a Proposal"),
        ("state", r"comes with a state that is a str; it must be bytes"),
        ({"x": 2}, r"{'x': 2}, is no config of the space: config: x = 2 is outside \[0\.0, 1\.0\]"),
        ({"x": 0.5, "y": 1}, r"is no config of the space: config names 'y'"),
        ({}, r"is no config of the space: config lacks 'x'"),
        ({"x": 0.9}, r"{'x': 0\.9}, breaks the constraint 'x < 0\.8'"),
        ({"x": [1]}, r"is no config of the space"),
    ],
)
def test_what_an_engine_may_not_do_names_it(folder, offers, words):
    spec = spec_of("engine.py:Plain", constraints=["x < 0.8"], offers=offers)
    check(spec, workdir=str(folder))
    with pytest.raises(EngineError, match=rf"search\.engine engine\.py:Plain: .*{words}" if offers != "raise" else words):
        make_proposer(spec, 1, workdir=str(folder)).propose(0)


def test_an_error_in_observe_names_the_trial(folder):
    proposer = make_proposer(spec_of("engine.py:Observing"), 1, workdir=str(folder))
    proposer.observe(sample_trial(0, config={"x": 0.5}))
    with pytest.raises(EngineError, match="observe, for trial 0 raised KeyError"):
        proposer.propose(1)


@pytest.mark.parametrize("offers", ["exit", "silent", "shy", "torn", "endless"])
def test_whatever_an_engine_does_is_an_error_that_names_it(folder, offers):
    proposer = make_proposer(spec_of("wild.py:Wild", offers=offers), 1, workdir=str(folder))
    with pytest.raises(EngineError, match=r"search\.engine wild\.py:Wild: .*propose\(0\)"):
        proposer.propose(0)


@pytest.mark.parametrize("at", ["observe", "exhausted"])
def test_only_a_proposal_may_end_the_search(folder, at):
    proposer = make_proposer(spec_of("wild.py:Wild", at=at), 1, workdir=str(folder))
    proposer.observe(sample_trial(0, config={"x": 0.5}))
    with pytest.raises(EngineError, match=r"observe, for trial 0 raised (SystemExit|Exhausted)"):
        proposer.propose(1)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("script.py:Any", {}),
        ("script:Any", {}),
        ("wild.py:Wild", {"at": "constructor"}),
        ("wild.py:Wild", {"at": "size"}),
        ("wild.py:Wild", {"size": -1}),
        ("wild.py:Wild", {"size": True}),
        ("wild.py:Wild", {"size": 2.5}),
    ],
)
def test_an_exit_and_a_wrong_size_are_errors_in_the_spec(folder, engine, options):
    with pytest.raises(SpecError, match=r"SystemExit: 0|size is"):
        check(spec_of(engine, **options), workdir=str(folder))


def test_a_size_may_be_one_of_numpys(folder):
    spec = spec_of("wild.py:Wild")
    options = {"size": numpy.int64(4)}
    spec = spec.model_copy(update={"search": spec.search.model_copy(update={"options": options})})
    assert type(size_of(spec, 1, workdir=str(folder))) is int
    assert size_of(spec, 1, workdir=str(folder)) == 4


def test_what_an_engine_does_to_what_it_is_given_stays_with_it(folder):
    spec = spec_of("wild.py:Wild", at="arguments", changed=[1])
    check(spec, workdir=str(folder))
    assert spec.search.options["changed"] == [1]
    assert list(spec.space.parameters) == ["x"]
    proposer = make_proposer(spec_of("wild.py:Wild", at="trial"), 1, workdir=str(folder))
    trial = sample_trial(0, TrialStatus.COMPLETED, config={"x": 0.5}, metrics={"loss": 1.0, "more": {"list": [1]}})
    proposer.observe(trial)
    proposer.propose(1)
    assert trial.config == {"x": 0.5}
    assert trial.metrics["more"] == {"list": [1]}


def test_what_an_engine_prints_is_not_in_the_json(folder, capsys):
    loud = "print('loading')\nclass Loud:\n    def __init__(self, *arguments): print('made')\n"
    (folder / "loud.py").write_text(f"{loud}    def observe(self, trial): pass\n    def propose(self, number): return {{}}\n")
    (folder / "train.py").write_text("def train(trial): pass\n")
    text = (
        "name: a\ntrainable: train.py:train\nobjectives: {l: min}\nspace: {}\nsearch: {num_trials: 1, engine: 'loud.py:Loud'}\n"
    )
    (folder / "loud.yaml").write_text(text)
    assert main(["validate", str(folder / "loud.yaml"), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["name"] == "a"
    assert "loading\nmade\n" in printed.err


def test_configs_are_not_asked_for_again(folder):
    """Its own engine decides for itself what to try again."""
    proposer = make_proposer(spec_of("engine.py:Plain"), 1, workdir=str(folder))
    proposer.observe(sample_trial(0, TrialStatus.FAILED, config={"x": 0.5}))
    assert proposer.propose(1) == {"x": 0.5}
    assert Proposal(config={"x": 0.5}) == Proposal(config={"x": 0.5})


def test_the_path_of_an_engine_is_taken_from_the_folder_of_the_spec(tmp_path):
    text = "name: a\ntrainable: t.py:t\nobjectives: {l: min}\nspace: {}\nsearch: {num_trials: 1, engine: 'sub/e.py:E'}\n"
    assert ExperimentSpec.from_text(text, folder=tmp_path).search.engine == f"{tmp_path}/sub/e.py:E"
    assert ExperimentSpec.from_text(text).search.engine == "sub/e.py:E"
    assert ExperimentSpec.from_text(text.replace("sub/e.py:E", "p.m:E"), folder=tmp_path).search.engine == "p.m:E"
