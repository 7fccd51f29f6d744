"""By which runner trials run, and the processes that run them elsewhere: for people and, as JSON values, for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rich.table import Table
from rich.text import Text

from holdfast.core.execution_section import ExecutionSection
from holdfast.experiment import Experiment
from holdfast.report.texts import printable
from holdfast.storage.database.workers import WorkerRow

SILENT = 30.0
"""Seconds without a beat after which a worker counts as lost."""
SHOWN = 20
"""Workers that are shown to people at most; programs get all."""


def plain_address(address: str | None) -> str | None:
    """Return a cluster's address without what may be a secret: user, password and query."""
    if address is None:
        return None
    parts = urlsplit(address if "://" in address else f"//{address}")
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if parts.scheme else host


def execution_json(execution: ExecutionSection) -> dict[str, Any]:
    """Return the runner as ``show --json`` prints it."""
    address = execution.deployment if execution.runner == "workpool" else plain_address(execution.address)
    return {"runner": execution.runner, "address": address}


def runner_words(execution: ExecutionSection) -> str:
    """Say where trials run."""
    address = execution_json(execution)["address"]
    if execution.runner == "threads":
        return "threads of the search's own machine"
    return f"{execution.runner}, {printable(address) if address else 'started for the run'}"


def beats(worker: WorkerRow) -> bool:
    """Tell whether a worker lives, as far as its row says."""
    return worker.left is None and worker.silent < SILENT


def workers_json(experiment: Experiment) -> list[dict[str, Any]]:
    """Return the workers of the newest drive as ``show --json`` prints them; ``silent`` is in seconds."""
    loads = experiment.loads()
    found = []
    for worker in experiment.workers():
        run, running = loads.get(worker.id, (0, 0))
        found.append(
            {
                "name": worker.name,
                "runner": worker.engine,
                "hostname": worker.hostname,
                "pid": worker.pid,
                "run": run,
                "running": running,
                "silent": round(worker.silent, 1),
                "beats": beats(worker),
                "left": worker.left,
            }
        )
    return found


def workers_table(workers: Sequence[Mapping[str, Any]]) -> tuple[Table, int]:
    """Return workers, as :func:`workers_json` has them, as a table, and how many it leaves out: those that left long ago."""
    there = [worker for worker in workers if worker["left"] is None]
    left = [worker for worker in workers if worker["left"] is not None]
    shown = [*there, *reversed(left)][:SHOWN]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("worker", "host", "runner"):
        table.add_column(name, overflow="fold")
    for name in ("run", "running", "last beat"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("left", overflow="fold")
    for worker in shown:
        table.add_row(
            Text(printable(worker["name"])),
            Text(printable(worker["hostname"])),
            worker["runner"],
            str(worker["run"]),
            str(worker["running"]),
            f"{worker['silent']:.0f} s ago",
            Text("" if worker["left"] is None else printable(worker["left"])),
        )
    return table, len(workers) - len(shown)


def worker_json(worker: WorkerRow | None) -> dict[str, Any] | None:
    """Return the worker that ran an attempt as ``trials --json`` prints it; None: the search's own process, or nobody."""
    if worker is None:
        return None
    return {"name": worker.name, "runner": worker.engine, "hostname": worker.hostname, "pid": worker.pid}
