"""The order of parameters decides what a sampler draws, the order of objectives what is best: both survive being stored."""

from pathlib import Path

import holdfast
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.leases import Leases

SPEC = {
    "name": "order",
    "objectives": {"z": "max", "a": "min"},
    "space": {
        "width": {"type": "int", "low": 1, "high": 4},
        "act": {"type": "categorical", "choices": ["relu", "tanh"]},
        "beta": {"type": "float", "low": 0, "high": 1, "when": {"width": 2}},
    },
    "search": {"num_trials": 3},
}


def orders(path: Path) -> tuple[list[str], list[str]]:
    with holdfast.open(path) as experiment:
        return list(experiment.space.parameters), [objective.name for objective in experiment.objectives]


def test_parameters_and_objectives_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("def train(trial):\n    pass\n")
    spec = {**SPEC, "storage": str(tmp_path / "runs"), "trainable": f"{tmp_path / 'train.py'}:train"}
    with holdfast.create(spec) as experiment:
        path = experiment.path
        assert orders(path) == (["width", "act", "beta"], ["z", "a"])
        opened = experiment._opened
        leases = Leases(opened.database, opened.record.id)
        leases.take(seen=0, epoch=1, holder={"pid": 1}, action="started", detail={})
        Driver(opened.database, opened.record.id, 1, seed=1).change_spec(opened.spec.stored(), {})
    assert orders(path) == (["width", "act", "beta"], ["z", "a"])
