"""What the tests of restores share: an experiment whose driver is gone, trials with checkpoints, a restore that is left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text
from store_kit import create
from upkeep_kit import Shop

from holdfast.flows.session import Session
from holdfast.locate import Opened
from holdfast.storage.database.engine import Statement
from holdfast.tasks.workers import processes

TRAINABLE = "def train(trial):\n    return {'loss': 0.0}\n"
GONE = {"host": processes.same_host(), "hostname": "here", "pid": 2**22, "started": "long ago"}
"""A holder whose process is gone from this host."""
SPACE: dict[str, Any] = {"x": {"type": "float", "low": 0.0, "high": 1.0}, "n": {"type": "int", "low": 1, "high": 4}}


@contextmanager
def made(folder: Path) -> Iterator[Opened]:
    """Make an experiment of inline trials below ``folder``."""
    (folder / "train.py").write_text(TRAINABLE)
    changes: dict[str, Any] = {
        "trainable": f"{folder}/train.py:train",
        "execution": {"isolation": "inline"},
        "space": SPACE,
    }
    with closing(create(folder / "runs", **changes)) as opened:
        yield opened


def deserted(opened: Opened) -> Shop:
    """Let the driver of an experiment be gone without a word."""
    shop = Shop.of(opened)
    alter(opened, f"UPDATE experiment SET holder = '{json.dumps(GONE)}'")
    return shop


def alter(opened: Opened, statement: str) -> None:
    with opened.database.write() as tx:
        tx.run(Statement(text(statement.replace(":", r"\:"))))


def saved(shop: Shop, *steps: int, reported: tuple[int, ...] = ()) -> tuple[int, list[str]]:
    """Start a trial that saves ``steps`` and reports some more; return its number, and where its checkpoints are."""
    number = len(shop.lab.reader.trials())
    writer = shop.lab.claim(shop.lab.driver.propose({"x": number / 64, "n": 1}))
    paths = [shop.save(writer, step, trial=number) for step in steps]
    for step in reported:
        writer.report(step, {"loss": float(step)})
    return number, paths


def leave(session: Session | None) -> None:
    """Let a prepared session go as if its process had died."""
    assert session is not None
    session.close()
