"""A batch of the journal costs as much after 2,000 trials as after 200, and lacks nothing when it was cut off once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from holdfast.core.errors import ConnectionLost
from holdfast.core.trial import Outcome
from holdfast.storage.database.engine import Statement, Transaction, sqlite_url
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


@pytest.mark.parametrize("cut_off_at", ["telemetry", "checkpoint", "proposer_state", "audit"])
@pytest.mark.parametrize("repeats", [True, False])
def test_a_batch_that_is_cut_off_is_read_again_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_off_at: str, *, repeats: bool
) -> None:
    """What was read before the connection was lost is no more known than what was not."""
    run, broken = Transaction.run, [False]

    def fails_once(self: Transaction, statement: Statement, **values: object) -> list[tuple[Any, ...]]:
        text = statement.text(self._dialect)[0]
        if broken[0] and any(f"{word} {cut_off_at} " in text for word in ("FROM", "JOIN")):
            broken[0] = False
            raise (ConnectionLost if repeats else OSError)("the connection was lost")
        return run(self, statement, **values)

    with closing(open_database(sqlite_url(tmp_path / "holdfast.db"), create_missing=True)) as database:
        lab = Lab.new(database, "cut off")
        outbox, writer = Outbox(database, lab.id, lab.epoch), lab.started()
        end = outbox(-1).end
        for step in range(3):
            writer.telemetry([(step, "load", 0.5)])
            lab.save(writer, step, loss=1.0)  # and a report
            lab.driver.audit("noted", {})
            broken[0] = True
            monkeypatch.setattr(Transaction, "run", fails_once)
            with nullcontext() if repeats else pytest.raises(OSError, match="lost"):
                batch = outbox(end)
            monkeypatch.undo()
            assert not broken[0]
            batch = batch if repeats else outbox(end)
            whole = Outbox(database, lab.id, lab.epoch)(end)
            assert batch.rows == whole.rows
            assert len(batch.rows["report"]) == len(batch.rows["telemetry"]) == len(batch.rows["checkpoint"]) == 1
            end = batch.end
