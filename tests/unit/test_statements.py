"""How many statements a call costs: as many for 1,000 trials as for 10."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from store_kit import create

from holdfast.core.trial import ErrorInfo, Outcome
from holdfast.experiment import Experiment
from holdfast.storage.database.attempts import Saved
from holdfast.storage.database.driver import Driver, Ending
from holdfast.storage.database.leases import Leases

FEW, MANY = 10, 1000
READS: dict[str, Callable[[Experiment], Any]] = {
    "load": lambda experiment: experiment.load(),
    "load, the rest": lambda experiment: experiment.load(5),
    "trials": lambda experiment: experiment.trials,
    "best_trial": lambda experiment: experiment.best_trial(),
    "counts": lambda experiment: experiment.counts(),
    "status": lambda experiment: experiment.status,
    "pending_trials": lambda experiment: experiment.pending_trials(datetime.now(UTC), running=True),
    "history": lambda experiment: experiment.history(),
    "telemetry": lambda experiment: experiment._reader.telemetry(),
    "load_telemetry": lambda experiment: experiment.load_telemetry(3),
    "checkpoints": lambda experiment: experiment.checkpoints(),
    "results_df": lambda experiment: experiment.results_df(),
    "history_df": lambda experiment: experiment.history_df(),
}


class Filled:
    """An experiment that is filled up by and by, and counts the statements that SQLite runs for it."""

    def __init__(self, folder: Path) -> None:
        self.opened = create(folder)
        self.statements: list[str] = []
        self.trials = 0
        Leases(self.opened.database, self.opened.record.id).take(seen=0, epoch=1, holder={}, action="started", detail={})
        self.driver = Driver(self.opened.database, self.opened.record.id, 1, seed=1)
        self.opened.database.close()
        event.listen(self.opened.database.engine, "connect", self._trace)

    def _trace(self, connection: Any, _: Any) -> None:
        connection.set_trace_callback(self.statements.append)

    def fill(self, count: int) -> None:
        """Add trials until there are ``count``: of every sort, each with its share of every table."""
        while self.trials < count:
            writer = self.driver.start({"x": self.trials / MANY}, token="t")
            writer.report(0, {"loss": float(self.trials)}, saved=Saved(path=f"p{self.trials}", digest="d", bytes=1))
            writer.telemetry([(self.trials, "cpu", 0.5)])
            match self.trials % 4:
                case 0:
                    self.driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED, metrics={"loss": 0.5}))
                case 1:
                    self.driver.end(writer.attempt, Ending(outcome=Outcome.LOST))
                case 2:
                    writer.fail(Ending(outcome=Outcome.FAILED, error=ErrorInfo(kind="E", message="m")), max_failures=0)
            self.trials += 1

    def cost(self, read: Callable[[Experiment], Any]) -> int:
        experiment = Experiment(self.opened)
        read(experiment)  # connections are open, statements compiled
        self.statements.clear()
        read(experiment)
        return len([text for text in self.statements if text.startswith("SELECT")])


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, int]]:
    """The number of statements of each read, at each number of trials."""
    filled = Filled(tmp_path_factory.mktemp("store"))
    found = {}
    with closing(filled.opened):
        for count in (FEW, MANY):
            filled.fill(count)
            found[count] = {name: filled.cost(read) for name, read in READS.items()}
    return found


@pytest.mark.parametrize("name", READS)
def test_a_read_costs_as_many_statements_however_many_trials(name: str, costs: dict[int, dict[str, int]]) -> None:
    assert 1 <= costs[FEW][name] == costs[MANY][name] <= 5
