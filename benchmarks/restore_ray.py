"""Ray Tune's side of ``restore.py``: run by a Python that has ``ray[tune]``, CPU only.

``make FOLDER N`` runs a Tuner with N trials that end at once, after one report, and one that reports with a checkpoint and then
fails. ``grow FOLDER N`` multiplies the finished trials of such an experiment to N: their entries in the newest snapshot of its
state, under other ids, each with a folder of its own. ``restore FOLDER`` is what is measured: a fresh process,
``Tuner.restore(..., resume_errored=True).fit()``, in which that one goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # nothing is drawn: Ray's reporter would take time
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

NAME = "search"


def trainable(config: dict[str, object]) -> None:
    """Report once; the last one reports with a checkpoint, fails, and has one step left when it is resumed."""
    from ray import tune

    if not config["last"]:
        tune.report({"loss": config["x"], "accuracy": 0.5})
        return
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "state.json").write_text(json.dumps({"step": 1}))
            tune.report({"loss": config["x"], "accuracy": 0.5}, checkpoint=tune.Checkpoint.from_directory(folder))
        raise RuntimeError("interrupted")
    with checkpoint.as_directory() as folder:
        assert json.loads(Path(folder, "state.json").read_text()) == {"step": 1}
    tune.report({"loss": config["x"], "accuracy": 0.6})


def start() -> None:
    """Start Ray on this machine for this process alone."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def make(folder: Path, trials: int) -> None:
    """Run ``trials`` that finish and one that fails."""
    import ray
    from ray import tune

    start()
    tuner = tune.Tuner(
        trainable,
        param_space={
            "x": tune.uniform(0, 1),
            "p": tune.uniform(0, 1),
            "act": tune.choice(["relu", "tanh"]),
            "layers": tune.randint(1, 9),
            "last": tune.grid_search([False] * trials + [True]),
        },
        tune_config=tune.TuneConfig(metric="loss", mode="min", reuse_actors=True, max_concurrent_trials=2),
        run_config=tune.RunConfig(name=NAME, storage_path=str(folder), verbose=0),
    )
    results = tuner.fit()
    assert len(results) == trials + 1, len(results)
    assert results.num_errors == 1, results.num_errors
    ray.shutdown()


def grow(folder: Path, trials: int) -> None:
    """Multiply the finished trials to ``trials``."""
    experiment = folder / NAME
    file = max(experiment.glob("experiment_state-*.json"))
    state = json.loads(file.read_text())
    finished = [entry for entry in state["trial_data"] if json.loads(entry[0])["status"] == "TERMINATED"]
    found = list(state["trial_data"])
    for number in range(trials - len(finished)):
        entry = finished[number % len(finished)]
        data = json.loads(entry[0])
        old, new = data["trial_id"], f"g{number:07d}"
        place = next(path for path in experiment.glob(f"*_{old}_*") if path.is_dir())
        name = place.name.replace(old, new)
        shutil.copytree(place, experiment / name)
        found.append([part.replace(place.name, name).replace(old, new) for part in entry])
    state["trial_data"] = found
    file.write_text(json.dumps(state, indent=2))


def restore(folder: Path) -> None:
    """Restore and run to the end."""
    import ray
    from ray import tune

    start()
    results = tune.Tuner.restore(str(folder / NAME), trainable, resume_errored=True).fit()
    assert results.num_errors == 0, results.errors
    print(json.dumps({"trials": len(results), "ray": ray.__version__}))
    ray.shutdown()


def main() -> None:
    """Do what the arguments say."""
    what, folder, *rest = sys.argv[1:]
    {"make": make, "grow": grow, "restore": restore}[what](Path(folder), *map(int, rest))


if __name__ == "__main__":
    main()
