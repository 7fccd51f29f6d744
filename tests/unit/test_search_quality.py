"""The benchmark of engines: its functions have the optima that it subtracts, and its loop runs every engine that there is."""

from __future__ import annotations

import math
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from holdfast.core.objective import Objective
from holdfast.core.search_section import ENGINES


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    found = spec_from_file_location("search_quality", Path(__file__).parents[2] / "benchmarks" / "search_quality.py")
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    sys.modules["search_quality"] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def test_the_optima_are_right(benchmark: ModuleType) -> None:
    problems = benchmark.PROBLEMS
    for x, y in ((-math.pi, 12.275), (math.pi, 2.275), (9.42477796, 2.475)):
        assert problems["branin"].run({"x": x, "y": y})["loss"] == pytest.approx(problems["branin"].optimum, abs=1e-9)
    place = (0.20168951, 0.15001069, 0.47687398, 0.27533243, 0.31165162, 0.65730054)
    found = problems["hartmann"].run({f"x{number}": value for number, value in enumerate(place)})
    assert found["loss"] == pytest.approx(problems["hartmann"].optimum, abs=1e-9)
    best = {f"x{number}": 0.0 for number in range(16)} | {f"c{number}": "c" for number in range(4)}
    assert problems["ackley"].run(best)["loss"] == pytest.approx(0.0, abs=1e-12)
    front = [{"first": step / 4000, "second": 1 - math.sqrt(step / 4000)} for step in range(4001)]
    zdt1 = problems["zdt1"]
    assert zdt1.run({"x0": 0.25, **{f"x{number}": 0.0 for number in range(1, 10)}}) == {"first": 0.25, "second": 0.5}
    assert zdt1.measure(zdt1.spec("random", 0, 1), front) == pytest.approx(10 - 1 / 3, abs=1e-3)
    assert zdt1.spec("random", 0, 1).goals == (Objective(name="first"), Objective(name="second"))


def test_every_engine_runs_or_says_why_not(benchmark: ModuleType) -> None:
    for name, problem in benchmark.PROBLEMS.items():
        found = {engine: benchmark.search(name, engine, 0, 3) for engine in problem.engines if engine in ("random", "tpe")}
        table = {engine: {"values": [value], "times": [seconds]} for engine, (value, seconds) in found.items()}
        assert set(problem.engines) < set(ENGINES)
        printed = "\n".join(benchmark.lines(name, {**table, "gp": "not there"}))
        assert "| tpe |" in printed
        assert "gp is left out: not there" in printed
        assert all(value >= 0 for value, _ in found.values())
    assert isinstance(benchmark.search("branin", "grid", 0, 3), str)
