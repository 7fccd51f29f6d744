"""What a proposal costs, with Optuna's own ``study.ask()`` and suggestions beside it, in one run.

* *propose*: the next config of each engine after 100, 1,000 and 5,000 finished trials, against ``study.ask()`` and a
  suggestion for each parameter, on a study in memory whose sampler stays the same: limit 1.2 times;
* *rebuild*: a proposer that observes 10,000 stored trials, and its first config, since it takes them in when it is asked;
  against ``study.add_trial`` of them, made before, and its first ask: limit 1.2 times.

The trials of CMA-ES and NSGA were made by their samplers, by ours in the one arm and by Optuna's loop in the other, so
that both are in the midst of their generations; those of TPE and GP are the same random ones in both arms. GP is measured
at 100 alone: its cost grows with the cube of that. Seconds are of the processor, since neither arm waits for anything. The
order of the arms alternates; figures are medians over the rounds. Prints a table; ``--json FILE`` keeps every figure.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna

from holdfast.core.ports import Proposer, as_proposal
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import Trial, TrialStatus
from holdfast.engines.factory import make_proposer
from holdfast.testing.samples import sample_spec, sample_trial

LIMIT = 1.2
SIZES = (100, 1_000, 5_000)
ENGINES: dict[str, tuple[int, ...]] = {"tpe": SIZES, "cmaes": SIZES, "nsga2": SIZES, "nsga3": SIZES, "gp": (100,)}
REBUILT = 10_000
SPACE = {
    "lr": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
    "drop": {"type": "float", "low": 0.0, "high": 0.5},
    "depth": {"type": "int", "low": 1, "high": 64},
    "width": {"type": "int", "low": 8, "high": 1024, "log": True},
    "momentum": {"type": "float", "low": 0.0, "high": 1.0},
    "act": {"type": "categorical", "choices": ["relu", "tanh", "elu"]},
}


def spec_of(engine: str) -> ExperimentSpec:
    return sample_spec(space=SPACE, search={"engine": engine, "num_trials": 20_000, "seed": 1})


def sampler_of(engine: str, seed: int) -> optuna.samplers.BaseSampler:
    match engine:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        case _:
            return optuna.samplers.NSGAIIISampler(seed=seed)


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 1e-5, 1e-1, log=True),
        "drop": trial.suggest_float("drop", 0.0, 0.5),
        "depth": trial.suggest_int("depth", 1, 64),
        "width": trial.suggest_int("width", 8, 1024, log=True),
        "momentum": trial.suggest_float("momentum", 0.0, 1.0),
        "act": trial.suggest_categorical("act", ["relu", "tanh", "elu"]),
    }


def value_of(config: dict[str, Any]) -> float:
    """Return the loss of a config: smooth, with its best in the middle."""
    lr, drop, depth, momentum = (float(config[name]) for name in ("lr", "drop", "depth", "momentum"))
    return abs(math.log10(lr) + 3) + (drop - 0.2) ** 2 + (depth - 20) ** 2 / 1e3 + momentum


def finished(engine: str, count: int) -> list[Trial]:
    """Return ``count`` finished trials of a search with ``engine``; those of slow engines are drawn at random."""
    proposer: Proposer = make_proposer(spec_of(engine if engine in ("cmaes", "nsga2", "nsga3") else "random"), 1)
    trials = []
    for number in range(count):
        found = as_proposal(proposer.propose(number))
        config = dict(found.config)
        ended = sample_trial(number, TrialStatus.COMPLETED, config=config, metrics={"loss": value_of(config)})
        trials.append(replace(ended, state=found.state))
        proposer.observe(trials[-1])
    return trials


def observed(engine: str, trials: Sequence[Trial]) -> Proposer:
    proposer = make_proposer(spec_of(engine), 1)
    for trial in trials:
        proposer.observe(trial)
    return proposer


def looped(engine: str, trials: Sequence[Trial]) -> optuna.Study:
    """Return a study with as many trials, made by Optuna's own loop (its first ones are ours, where that is too slow)."""
    study = optuna.create_study(sampler=sampler_of(engine, 1))
    if engine in ("cmaes", "nsga2", "nsga3"):
        study.optimize(lambda trial: value_of(suggest(trial)), n_trials=len(trials))
    else:
        for row in frozen(trials):
            study.add_trial(row)
    return study


def frozen(trials: Sequence[Trial]) -> list[optuna.trial.FrozenTrial]:
    """Return our trials as Optuna's."""
    distributions = optuna.create_study()
    suggest(trial := distributions.ask())
    return [
        optuna.trial.create_trial(params=dict(row.config), distributions=trial.distributions, value=float(row.metrics["loss"]))
        for row in trials
    ]


def timed(call: Callable[[], Any]) -> float:
    gc.collect()
    began = time.process_time()
    call()
    return time.process_time() - began


def paired(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Run every arm once to warm up, then ``rounds`` times in alternating order; return each one's median, and the ratio's."""
    for arm in arms.values():
        arm()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            found[name].append(arms[name]())
    ratios = sorted(ours / raw for ours, raw in zip(found["holdfast"], found["optuna"], strict=True))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {**medians, "ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}


def propose_row(engine: str, size: int, rounds: int) -> dict[str, Any]:
    """Ask both for some configs a round, and end each: of NSGA for half a generation, since its first one costs more."""
    trials = finished(engine, size)
    proposer, study = observed(engine, trials), looped(engine, trials)
    asked = {"gp": 2, "tpe": 5}.get(engine, 25)
    numbers = iter(range(size, 10**9))

    def ours() -> float:
        spent = 0.0
        for number in (next(numbers) for _ in range(asked)):
            began = time.process_time()
            offered = as_proposal(proposer.propose(number))
            spent += time.process_time() - began
            config = dict(offered.config)
            ended = sample_trial(number, TrialStatus.COMPLETED, config=config, metrics={"loss": value_of(config)})
            proposer.observe(replace(ended, state=offered.state))
        return spent / asked

    def theirs() -> float:
        spent = 0.0
        for _ in range(asked):
            began = time.process_time()
            trial = study.ask()
            config = suggest(trial)
            spent += time.process_time() - began
            study.tell(trial, value_of(config))
        return spent / asked

    found = paired({"holdfast": ours, "optuna": theirs}, rounds)
    return row(f"{engine}: propose after {size:,} trials", found)


def rebuild_row(engine: str, rounds: int) -> dict[str, Any]:
    trials = finished(engine, REBUILT)
    rows = frozen(trials)

    def ours() -> None:
        observed(engine, trials).propose(REBUILT)

    def theirs() -> None:
        study = optuna.create_study(sampler=sampler_of(engine, 1))
        for one in rows:
            study.add_trial(one)
        suggest(study.ask())

    arms = {"holdfast": lambda: timed(ours), "optuna": lambda: timed(theirs)}
    return row(f"{engine}: rebuild of {REBUILT:,} trials", paired(arms, rounds))


def row(what: str, found: dict[str, float]) -> dict[str, Any]:
    return {"what": what, **found, "limit": LIMIT, "kept": found["ratio"] <= LIMIT}


def line(found: dict[str, Any]) -> str:
    """Return a row as a line of a Markdown table."""
    ours, theirs = (words(found[name]) for name in ("holdfast", "optuna"))
    spread = f"{found['limit']} (rounds: {found['least']:.2f} to {found['most']:.2f})"
    return (
        f"| {found['what']} | {ours} | {theirs} | {found['ratio']:.2f} | {spread} | {'kept' if found['kept'] else 'MISSED'} |"
    )


def words(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def main() -> None:
    """Measure and print the table; exit 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=None, metavar="N", help="finished trials (100 1000 5000; gp 100)"
    )
    parser.add_argument("--no-rebuild", action="store_true", help="leave the rebuild out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    rows = []
    for engine in options.engines:
        rows += [propose_row(engine, size, options.rounds) for size in options.sizes or ENGINES[engine]]
    if not options.no_rebuild:
        rows += [rebuild_row(engine, options.rounds) for engine in options.engines if engine != "gp"]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, Optuna {optuna.__version__}"
    command = " ".join(["python", "benchmarks/proposals.py", *sys.argv[1:]])
    print(f"{datetime.now(UTC).date().isoformat()}, {machine}; medians of {options.rounds} rounds; `{command}`\n")
    print("| what | holdfast | Optuna | ratio | limit | |\n|---|---|---|---|---|---|")
    for found in rows:
        print(line(found))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rounds": options.rounds, "rows": rows}, indent=2) + "\n")
    sys.exit(0 if all(found["kept"] for found in rows) else 1)


if __name__ == "__main__":
    main()
