"""How good the configs are that each engine proposes, against random search, with the same budget.

* *regret*: the best value found less the optimum, on Branin (2 parameters), Hartmann (6) and Ackley (16, and 4 categorical
  ones of 5 choices);
* *hypervolume*: of the front found on ZDT1 (two objectives, 10 parameters), up to (1, 10); the ideal front has 9.667.

Every engine runs in-process on stored trials alone, as in a search: it proposes, observes the trial as waiting and as
completed, and gets its state back. No database, no Prefect. Each figure is the median over the seeds, with the quartiles;
*against random* is the engine's median by random's (below 1 is better; for the hypervolume above 1). *ms a proposal* holds
proposing and both observations, averaged over the run. An engine that is not there, or that refuses the space, is named with
the reason and left out.

    python benchmarks/search_quality.py                               # everything
    python benchmarks/search_quality.py --only tpe gp branin          # two engines and random, on one problem
    python benchmarks/search_quality.py --seeds 20 --trials 200
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from holdfast.core.errors import HoldfastError
from holdfast.core.hypervolume import hypervolume
from holdfast.core.objective import scores
from holdfast.core.ports import Proposal
from holdfast.core.search_section import ENGINES
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import TrialStatus
from holdfast.engines.factory import make_proposer
from holdfast.testing.samples import sample_spec, sample_trial

Config = Mapping[str, Any]


def _floats(count: int, low: float, high: float) -> dict[str, Any]:
    return {f"x{place}": {"type": "float", "low": low, "high": high} for place in range(count)}


def branin(config: Config) -> dict[str, float]:
    """Return Branin's value; its minimum is 0.397887, at three places."""
    x, y = config["x"], config["y"]
    bowl = (y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6) ** 2
    return {"loss": bowl + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10}


HARTMANN_HEIGHTS = (1.0, 1.2, 3.0, 3.2)
HARTMANN_WIDTHS = (
    (10, 3, 17, 3.5, 1.7, 8),
    (0.05, 10, 17, 0.1, 8, 14),
    (3, 3.5, 1.7, 10, 17, 8),
    (17, 8, 0.05, 10, 0.1, 14),
)
HARTMANN_PLACES = (
    (0.1312, 0.1696, 0.5569, 0.0124, 0.8283, 0.5886),
    (0.2329, 0.4135, 0.8307, 0.3736, 0.1004, 0.9991),
    (0.2348, 0.1451, 0.3522, 0.2883, 0.3047, 0.6650),
    (0.4047, 0.8828, 0.8732, 0.5743, 0.1091, 0.0381),
)


def hartmann(config: Config) -> dict[str, float]:
    """Return the value of Hartmann's function of six parameters; its minimum is -3.32237."""
    point = [config[f"x{place}"] for place in range(6)]
    total = 0.0
    for height, widths, places in zip(HARTMANN_HEIGHTS, HARTMANN_WIDTHS, HARTMANN_PLACES, strict=True):
        far = sum(width * (value - place) ** 2 for width, value, place in zip(widths, point, places, strict=True))
        total += height * math.exp(-far)
    return {"loss": -total}


LEVELS = {"a": -20.0, "b": 7.0, "c": 0.0, "d": -3.0, "e": 25.0}
"""What the choices of Ackley's categorical parameters stand for: not in order, and one of them optimal."""


def ackley(config: Config) -> dict[str, float]:
    """Return Ackley's value of 20 parameters, 4 of them categorical; its minimum is 0."""
    point = [config[f"x{place}"] for place in range(16)] + [LEVELS[config[f"c{place}"]] for place in range(4)]
    mean = sum(value * value for value in point) / 20
    waves = sum(math.cos(2 * math.pi * value) for value in point) / 20
    return {"loss": -20 * math.exp(-0.2 * math.sqrt(mean)) - math.exp(waves) + 20 + math.e}


def zdt1(config: Config) -> dict[str, float]:
    """Return both values of ZDT1 (Zitzler, Deb and Thiele 2000) with 10 parameters."""
    first, *others = (config[f"x{place}"] for place in range(10))
    growth = 1 + 9 * sum(others) / len(others)
    return {"first": first, "second": growth * (1 - math.sqrt(first / growth))}


@dataclass(frozen=True)
class Problem:
    """A function, its space, and what is made of the trials."""

    title: str
    run: Callable[[Config], dict[str, float]]
    space: dict[str, Any]
    optimum: float = 0.0
    objectives: tuple[str, ...] = ("loss",)
    reference: tuple[float, ...] = ()
    engines: tuple[str, ...] = tuple(engine for engine in ENGINES if engine != "grid")
    """a grid needs finitely many values"""

    def spec(self, engine: str, seed: int, trials: int) -> ExperimentSpec:
        return sample_spec(
            objectives=dict.fromkeys(self.objectives, "min"),
            space=self.space,
            search={"engine": engine, "num_trials": trials, "seed": seed},
        )

    def measure(self, spec: ExperimentSpec, found: list[dict[str, float]]) -> float:
        """Return the regret, or with several objectives the hypervolume."""
        if not self.reference:
            return min(metrics["loss"] for metrics in found) - self.optimum
        points = [values for metrics in found if (values := scores(metrics, spec.goals)) is not None]
        return hypervolume(points, self.reference, spec.goals)


_ACKLEY = _floats(16, -32.768, 32.768) | {f"c{place}": {"type": "categorical", "choices": list(LEVELS)} for place in range(4)}
PROBLEMS = {
    "branin": Problem(
        title="Branin, 2 parameters: regret",
        run=branin,
        space={"x": {"type": "float", "low": -5, "high": 10}, "y": {"type": "float", "low": 0, "high": 15}},
        optimum=0.39788735772973816,
    ),
    "hartmann": Problem(
        title="Hartmann, 6 parameters: regret", run=hartmann, space=_floats(6, 0, 1), optimum=-3.322368011391339
    ),
    "ackley": Problem(title="Ackley, 16 parameters and 4 categorical ones: regret", run=ackley, space=_ACKLEY),
    "zdt1": Problem(
        title="ZDT1, 2 objectives, 10 parameters: hypervolume up to (1, 10), at most 9.667",
        run=zdt1,
        space=_floats(10, 0, 1),
        objectives=("first", "second"),
        reference=(1.0, 10.0),
        engines=("random", "tpe", "nsga2", "nsga3"),
    ),
}


def search(problem: str, engine: str, seed: int, trials: int) -> tuple[float, float] | str:
    """Return what one search found and the seconds of a proposal, or why there can be none."""
    chosen = PROBLEMS[problem]
    try:
        spec = chosen.spec(engine, seed, trials)
        proposer = make_proposer(spec, seed)
    except HoldfastError as error:
        return str(error)
    found, spent = [], 0.0
    for number in range(trials):
        began = time.perf_counter()
        proposed = proposer.propose(number)
        proposal = proposed if isinstance(proposed, Proposal) else Proposal(config=dict(proposed))
        place = {"source": proposal.source, "group": proposal.group, "repeat": proposal.repeat}
        waiting = replace(sample_trial(number, config=proposal.config, **place), state=proposal.state)
        proposer.observe(waiting)
        spent += time.perf_counter() - began
        found.append(chosen.run(proposal.config))
        began = time.perf_counter()
        ended = sample_trial(number, TrialStatus.COMPLETED, config=proposal.config, metrics=found[-1], **place)
        proposer.observe(replace(ended, state=proposal.state))
        spent += time.perf_counter() - began
    return chosen.measure(spec, found), spent / max(trials, 1)


def measured(pool: ProcessPoolExecutor, problem: str, engines: list[str], seeds: int, trials: int) -> dict[str, Any]:
    """Return each engine's values and times over all seeds, or why it was left out."""
    work = {
        engine: [pool.submit(search, problem, engine, seed, trials) for seed in range(seeds)]
        for engine in PROBLEMS[problem].engines
        if engine in engines
    }
    found: dict[str, Any] = {}
    for engine, futures in work.items():
        results = [future.result() for future in futures]
        refused = [result for result in results if isinstance(result, str)]
        done = [result for result in results if not isinstance(result, str)]
        found[engine] = refused[0] if refused else {"values": [one[0] for one in done], "times": [one[1] for one in done]}
    return found


def lines(problem: str, found: dict[str, Any]) -> Iterator[str]:
    """Yield one problem's table."""
    shown = {engine: figures for engine, figures in found.items() if not isinstance(figures, str)}
    base = statistics.median(shown["random"]["values"])
    yield f"### {PROBLEMS[problem].title}"
    yield ""
    yield "| engine | median | lower quartile | upper quartile | against random | ms a proposal |"
    yield "|---|--:|--:|--:|--:|--:|"
    for engine, figures in shown.items():
        values = figures["values"]
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        cost = statistics.median(figures["times"]) * 1e3
        ratio = f"{median / base:.2f}" if base else "-"
        yield f"| {engine} | {median:.4g} | {lower:.4g} | {upper:.4g} | {ratio} | {cost:.2f} |"
    yield ""
    for engine, why in found.items():
        if isinstance(why, str):
            yield f"* {engine} is left out: {why.splitlines()[0]}"
    if len(shown) < len(found):
        yield ""


def _versions() -> str:
    found = []
    for name in ("optuna", "torch", "cmaes", "scipy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _processor() -> str:
    try:
        names = [
            row.partition(":")[2] for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def main() -> None:
    known = [*(engine for engine in ENGINES if engine != "grid"), *PROBLEMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=known, default=[], metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--seeds", type=int, default=5, help="searches per engine and problem")
    parser.add_argument("--trials", type=int, default=50, help="trials of a search")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="searches at once")
    parser.add_argument("--json", metavar="FILE", help="keep every figure")
    options = parser.parse_args()
    if min(options.seeds, options.trials, options.jobs) < 1:
        parser.error("--seeds, --trials and --jobs are at least 1")
    problems = [name for name in PROBLEMS if name in options.only] or list(PROBLEMS)
    engines = [name for name in ENGINES if name in options.only] or list(ENGINES)
    engines = list(dict.fromkeys(["random", *engines]))  # what all others are compared with

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # the searches run beside each other, each in a process that begins with this
    began = time.perf_counter()
    print(f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, {_processor()}, {os.cpu_count()} cores, {platform.system()}")
    print(f"Python {platform.python_version()}, {_versions()}; {options.seeds} seeds, {options.trials} trials")
    print(f"`python {' '.join(sys.argv)}`\n", flush=True)
    kept = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for problem in problems:
            kept[problem] = measured(pool, problem, engines, options.seeds, options.trials)
            print("\n".join(lines(problem, kept[problem])), flush=True)
    print(f"{time.perf_counter() - began:.0f} s in all, {options.jobs} searches at once")
    if options.json:
        Path(options.json).write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
