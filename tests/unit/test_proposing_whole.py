"""Engines with all that stands around them: the contract of a proposer, and what is refused when a spec is checked."""

import json

import pytest

import holdfast
from holdfast.core.errors import SpecError
from holdfast.engines.factory import make_proposer
from holdfast.engines.random_engine import RandomProposer
from holdfast.flows.prepare import check_spec
from holdfast.specfile import ExperimentSpec
from holdfast.testing.proposers import ProposerContract


class Around(ProposerContract):
    """The contract over all that stands around an engine: three points, repeats and a constraint."""

    def make(self, spec, seed):
        return make_proposer(spec, seed)

    def spec(self, space, objectives=None):
        spec = super().spec(space, objectives)
        source = RandomProposer(spec.space, 99)
        return spec.model_copy(
            update={
                "search": spec.search.model_copy(update={"points": tuple(source.propose(number) for number in range(3))}),
                "constraints": ("x < 0.5", "layers * 2 < 6 or act != true") if space != "one" else (),
            }
        )


class TestAroundRandom(Around):
    engine = "random"
    settings = {"search": {"repeats": 2}}  # noqa: RUF012


class TestAroundTPE(Around):
    engine = "tpe"
    settings = {"search": {"repeats": 2, "aggregate": "worst"}}  # noqa: RUF012


class TestAroundSobol(Around):
    engine = "sobol"
    settings = {"search": {"repeats": 3, "aggregate": "median"}}  # noqa: RUF012


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {"points": [{"x": 9.0}]}}, r"search\.points\[0\].*x = 9\.0 is outside"),
        ({"search": {"engine": "sobol", "options": {"scrambled": True}}}, "its options: scramble"),
        ({"search": {"engine": "engine.py:Absent"}}, r"there is no file .*engine\.py"),
        ({"constraints": ["x > 9"]}, "'x > 9' was never met"),
    ],
)
def test_what_a_spec_says_wrong_of_its_engine_is_refused_before_anything_is_written(tmp_path, changes, words):
    """By create and validate, too, which check as a search does."""
    data = {"name": "exp", "trainable": "train.py:train", "objectives": {"loss": "min"}, "storage": "./runs"}
    data |= {"space": {"x": {"type": "float", "low": 0.0, "high": 1.0}}, **changes}
    data["search"] = {"engine": "random", "num_trials": 3, **changes.get("search", {})}
    file = tmp_path / "exp.yaml"
    file.write_text(json.dumps(data))
    (tmp_path / "train.py").write_text("def train(trial):\n    pass\n")
    with pytest.raises(SpecError, match=words):
        holdfast.create(file)
    with pytest.raises(SpecError, match=words):
        check_spec(ExperimentSpec.from_file(file), workdir=str(tmp_path))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["exp.yaml", "train.py"]
