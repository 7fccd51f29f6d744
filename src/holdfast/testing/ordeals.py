"""Searches to be killed: trainables that fail, stop early or crash as their seed says, and the specs that go with them."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from holdfast.testing.executed import recorded

if TYPE_CHECKING:  # a trial's process imports this module, and none of those
    from holdfast.testing.crashes import Ordeal, Seen
    from holdfast.testing.warm import Warm

STEPS = 6


def _train(trial: Any, before: Callable[[int], bool] = lambda step: False) -> None:
    """Do some steps that depend on the ones before; ``before`` is called first in each and tells whether to return."""
    start, w = 0, 0.0
    if trial.checkpoint:
        start, w = trial.checkpoint.step + 1, trial.checkpoint.load()["w"]
    for step in range(start, STEPS):
        if before(step):
            return
        time.sleep(trial.references.get("pause", 0.0))
        w = 0.5 * w + trial.config["x"] + step
        trial.report({"loss": (w - 6.0) ** 2}, step=step, state={"w": w})


def _retried(trial: Any) -> None:
    """Raise up to twice in one step, as the seed says; one trial of six always."""
    chance = random.Random(trial.seed)
    hopeless, unlucky, times = chance.random() < 1 / 6, chance.randrange(STEPS), chance.randrange(3)
    folder = Path(trial.references["folder"])

    def before(step: int) -> bool:
        if step == unlucky:
            before_now = len([*folder.glob(f"raised-{trial.number}-*")])
            if hopeless or before_now < times:
                (folder / f"raised-{trial.number}-{trial.attempt}").touch()
                raise RuntimeError("no luck")
        return False

    _train(trial, before)


def _returning(trial: Any) -> None:
    """Return before the last step where x says so."""
    _train(trial, lambda step: step >= 2 + int(trial.config["x"]))


def _crashing(trial: Any) -> None:
    """Die by a segmentation fault in the third step of some configs."""

    def before(step: int) -> bool:
        if step == 2 and trial.config["x"] < 1.2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return False

    _train(trial, before)


def _waiting(trial: Any) -> None:
    """Wait before the second step as long as there is a file ``wait``."""
    file = Path(trial.references["folder"]) / "wait"

    def before(step: int) -> bool:
        while step == 1 and file.exists():
            time.sleep(0.01)
        return False

    _train(trial, before)


TRAINABLES = {"waiting": _waiting, "steady": _train, "retried": _retried, "returning": _returning, "crashing": _crashing}


def trainable(kind: str, folder: str | Path) -> Callable[[Any], Any]:
    """Return the trainable of a kind, which logs in ``folder`` what it executes."""
    return recorded(TRAINABLES[kind], folder)


@dataclass(frozen=True)
class Kind:
    """A search to be killed."""

    trainable: str
    changes: Mapping[str, Any]
    exact: bool = True
    """whether it ends the same whoever reports first"""

    def write(self, folder: Path, *, trials: int, seed: int = 7, pause: float = 0.0, **changes: Any) -> Path:
        """Write its spec and its trainable into a folder of its own; two trials at once, ``pause`` seconds a step."""
        folder.mkdir(parents=True)
        lines = ["from holdfast.testing.ordeals import trainable", f"train = trainable({self.trainable!r}, {str(folder)!r})"]
        (folder / "train.py").write_text("\n".join(lines) + "\n")
        search = {"engine": "random", "num_trials": trials, "seed": seed, "max_concurrent": 2}
        data: dict[str, Any] = {
            "name": folder.name,
            "trainable": "train.py:train",
            "objectives": {"loss": "min"},
            "space": {"x": {"type": "float", "low": 0.0, "high": 4.0}},
            "storage": str(folder / "runs"),
            "references": {"pause": pause, "folder": str(folder)},
            **self.changes,
            **changes,
            "search": {**search, **self.changes.get("search", {})},
        }
        file = folder / "spec.yaml"
        file.write_text(yaml.safe_dump(data, sort_keys=False))
        return file

    def ordeal(
        self,
        folder: Path,
        environment: Mapping[str, str],
        warmed: Sequence[Warm] = (),
        *,
        twin: Seen | None = None,
        database: str | None = None,
        **settings: Any,
    ) -> Ordeal:
        """Return its search in a new folder, ready to be killed; ``settings`` are those of :meth:`write`."""
        from holdfast.testing.crashes import Ordeal, Place
        from holdfast.testing.runs import Runs

        if database is not None:
            settings = {**settings, "database": database}
        spec = self.write(folder, **settings)
        location = folder / "runs" / folder.name
        place = Place(str(location), f"sqlite:///{folder / 'runs' / 'holdfast.db'}")
        if database is not None:
            place = Place(str(location), database, arguments=("--database", database))
        return Ordeal(Runs(folder, environment, warmed), spec, place, twin=twin, exact=self.exact)


KINDS: dict[str, Kind] = {
    "random": Kind("steady", {}),
    "tpe": Kind("steady", {"search": {"engine": "tpe"}, "checkpoints": {"save_period": 2}}, exact=False),
    "retries": Kind("retried", {"failure": {"max_failures": 2}}),
    "stopping": Kind("returning", {"stopping": {"rule": "asha", "reduction_factor": 2}}, exact=False),
    "waiting": Kind("waiting", {}),
    "crashing": Kind("crashing", {"checkpoints": {"keep_last": 2}}),
}
