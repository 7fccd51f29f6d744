"""What stopping rules save: digits (examples/digits) with every trial run to its end, and with rules, over the same configs.

Configs are drawn at random from one seed, so that every arm tries the same ones; what an arm spends is counted in epochs, as
they are stored. The arms run one after the other. Prints a markdown table: accuracy and loss of the best trial, epochs spent.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import holdfast

SPEC = Path(__file__).parent.parent / "examples" / "digits" / "digits.yaml"
EPOCHS = 20
ARMS: dict[str, tuple[str, ...]] = {
    "full": (),
    "asha": ("stopping.rule=asha", f"stopping.max_steps={EPOCHS}"),
    "hyperband": ("stopping.rule=hyperband", f"stopping.max_steps={EPOCHS}"),
    "median": ("stopping.rule=median",),
}
"""What each arm sets in the spec."""


def run(arm: str, trials: int, seed: int, folder: Path) -> list[str]:
    """Run one arm and return its cells of the table."""
    settings = {
        "name": arm,
        "storage": str(folder),
        "search.engine": "random",
        "search.num_trials": trials,
        "search.seed": seed,
        "checkpoints.keep_top_k": 1,
    }
    words = [*(f"{key}={value}" for key, value in settings.items()), *ARMS[arm]]
    command = [sys.executable, "-m", "holdfast.cli", "run", str(SPEC)]
    for word in words:
        command += ["--set", word]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    with holdfast.open(folder / arm) as experiment:
        found = experiment.trials
        epochs = sum(row.canonical for row in experiment.history())
        best = experiment.best_trial()
    assert best is not None
    pruned = sum(trial.status == "PRUNED" for trial in found)
    metrics = best.metrics
    return [
        arm,
        f"{metrics['accuracy']:.4f}",
        f"{metrics['loss']:.4f}",
        str(best.number),
        str(epochs),
        f"{epochs / (trials * EPOCHS):.0%}",
        f"{pruned} of {trials}",
        f"{seconds:.0f}",
    ]


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    options = parser.parse_args()
    header = ["rule", "accuracy", "loss", "best trial", "epochs", "of all", "stopped", "seconds"]
    with tempfile.TemporaryDirectory(prefix="holdfast-stopping-") as folder:
        rows = [run(arm, options.trials, options.seed, Path(folder)) for arm in options.arms]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {machine}: `python benchmarks/stopping.py {' '.join(sys.argv[1:])}`".rstrip("` ")
        + "`\n"
    )
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
