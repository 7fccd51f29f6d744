"""The example's training, killed and resumed through a real checkpoint, ends with the same bits as without."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from holdfast.specfile import ExperimentSpec
from holdfast.storage.checkpoints.manifest import Manifest
from holdfast.storage.checkpoints.serializers import read_state, write_state

pytest.importorskip("sklearn")
FOLDER = Path(__file__).parents[2] / "examples" / "digits"


class Killed(BaseException):
    pass


class Checkpoint:
    def __init__(self, folder, step, state):
        self.step, self._folder = step, folder
        files = write_state(state, folder, serializer="safe")
        self._manifest = Manifest(
            experiment="", trial=0, attempt=1, step=step, writer="", created="", serializer="safe", files=tuple(files)
        )

    def load(self):
        return read_state(self._folder, self._manifest)


class Trial:
    seed = 11

    def __init__(self, config, checkpoint=None, die_after=None):
        self.config, self.checkpoint, self.reports, self._die_after = config, checkpoint, [], die_after

    def report(self, metrics, *, step, state):
        self.reports.append((step, metrics))
        self.state = state()
        if step == self._die_after:
            raise Killed


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("digits_train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.EPOCHS, module.PASSES = 4, 1
    return module


@pytest.mark.parametrize(("layers", "act", "killed"), [(1, "relu", 0), (2, "tanh", 2)])
def test_killed_and_resumed_equals_uninterrupted(example, tmp_path, layers, act, killed):
    config = {"lr": 3e-3, "layers": layers, "width": 32, "act": act, "alpha": 1e-4}
    whole, first = Trial(config), Trial(config, die_after=killed)
    example.train(whole)
    with pytest.raises(Killed):
        example.train(first)
    second = Trial(config, Checkpoint(tmp_path, killed, first.state))
    example.train(second)
    assert first.reports + second.reports == whole.reports
    for kept, resumed in zip(whole.state["weights"], second.state["weights"], strict=True):
        assert np.array_equal(kept, resumed)
    assert whole.state["updates"] == second.state["updates"]


def test_it_learns(example):
    trial = Trial({"lr": 3e-3, "layers": 1, "width": 64, "act": "relu", "alpha": 1e-4})
    example.train(trial)
    assert trial.reports[-1][1]["loss"] < trial.reports[0][1]["loss"]
    assert trial.reports[-1][1]["accuracy"] > 0.9


def test_the_spec_is_valid():
    spec = ExperimentSpec.from_file(FOLDER / "digits.yaml")
    assert (spec.search.engine, spec.search.num_trials, spec.search.seed, spec.search.max_concurrent) == ("tpe", 20, 7, 2)
    assert spec.trainable == f"{FOLDER}/train.py:train"
