"""What a batch of the journal costs: as many of SQLite's instructions after 2,000 trials as after 200."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from holdfast.core.trial import Outcome
from holdfast.storage.database.engine import sqlite_url
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.outbox import Outbox
from holdfast.testing.lab import Lab

FEW, MANY = 200, 2000
GRAIN = 10


@contextmanager
def instructed() -> Iterator[list[int]]:
    """Count, in tens, the instructions that SQLite's virtual machine executes for connections opened within."""
    count = [0]

    def step() -> int:
        count[0] += 1
        return 0

    def watch(connection: Any, _: Any) -> None:
        connection.set_progress_handler(step, GRAIN)

    event.listen(Engine, "connect", watch)
    try:
        yield count
    finally:
        event.remove(Engine, "connect", watch)


@pytest.mark.parametrize("wrote", ["nothing", "reports", "telemetry", "both"])
def test_what_changed_is_found_without_a_look_at_all_trials(tmp_path: Path, wrote: str) -> None:
    cost: dict[int, int] = {}
    with instructed() as count, closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
        lab = Lab.new(database, "long")
        outbox = Outbox(database, lab.id, lab.epoch)
        end = outbox(-1).end
        for number in range(MANY):
            writer = lab.started(number / MANY)
            if wrote in ("reports", "both"):
                writer.report(0, {"loss": 1.0})
            if wrote in ("telemetry", "both"):
                writer.telemetry([(number, "load", 0.5)])
            lab.end(writer, Outcome.COMPLETED)
            before = count[0]
            batch = outbox(end)
            end = batch.end
            cost[number + 1] = count[0] - before
            assert [row[0] for row in batch.rows["trial"]] == [number]
            assert len(batch.rows["report"]) == (wrote in ("reports", "both"))
            assert len(batch.rows["telemetry"]) == (wrote in ("telemetry", "both"))
    assert cost[FEW] > 5
    assert cost[MANY] <= 1.5 * cost[FEW]
