"""What every engine promises, on those of one machine: threads, a Dask cluster and Ray for the run."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support import warm_of

from holdfast.testing.running import TIMEOUT, Ran, RunnerContract
from holdfast.testing.runs import Runs


@pytest.mark.timeout(900)  # its fixture waits for several processes, each with patience
class OneMachine(RunnerContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, tmp_path_factory: pytest.TempPathFactory, server_environment: dict[str, str]) -> Iterator[Runs]:
        folder = tmp_path_factory.mktemp("contract")
        runs = Runs(folder, {**server_environment, "HOLDFAST_GRACE_SECONDS": "30"}, warm_of(server_environment))
        yield runs
        runs.close()


@pytest.mark.xdist_group("runner-threads")
class TestThreads(OneMachine):
    def test_the_table_of_results(self, ran: Ran) -> None:
        _same_table(ran)


@pytest.mark.xdist_group("runner-dask")
@pytest.mark.skipif(find_spec("distributed") is None, reason="the package distributed is missing")
class TestDask(OneMachine):
    execution: ClassVar[dict[str, Any]] = {"runner": "dask"}

    def test_the_table_of_results(self, ran: Ran) -> None:
        _same_table(ran)


@pytest.mark.xdist_group("runner-ray")
@pytest.mark.skipif(find_spec("ray") is None, reason="the package ray is missing")
class TestRay(OneMachine):
    execution: ClassVar[dict[str, Any]] = {"runner": "ray"}

    def test_the_table_of_results(self, ran: Ran) -> None:
        _same_table(ran)


TABLE = [
    ("cancel", "CANCELLED", 1),
    ("ok", "COMPLETED", 1),
    ("fail", "FAILED", 2),
    ("flaky", "COMPLETED", 2),
    ("segv", "FAILED", 2),
    ("exit", "FAILED", 2),
    ("prune", "PRUNED", 1),
    ("preempt", "COMPLETED", 2),
    ("hang", "TIMED_OUT", 1),
]
ERRORS = {2: "no luck in fail", 4: "SIGSEGV", 5: "exited with code 3", 8: f"of {TIMEOUT:g} s"}


def _same_table(ran: Ran) -> None:
    import holdfast

    with holdfast.open(Path(ran.place.location)) as experiment:
        frame = experiment.results_df()
    assert list(zip(frame["config.act"], frame["status"], frame["attempts"], strict=True)) == TABLE
    assert [*frame["trial"]] == [*range(len(TABLE))]
    for number, text in enumerate(frame["error"]):
        assert (ERRORS[number] in str(text)) if number in ERRORS else not isinstance(text, str) or not text, text
