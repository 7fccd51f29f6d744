"""The attempts of one trial, through all restores, with their original errors: for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.core.trial import Attempt
from holdfast.report.texts import printable
from holdfast.report.working import worker_json
from holdfast.storage.database.workers import WorkerRow


def attempt_json(attempt: Attempt, workers: Mapping[int, WorkerRow]) -> dict[str, Any]:
    """Return an attempt as ``trials --trial N --json`` prints it; times are ISO 8601 in UTC. ``workers`` are by row id."""
    error = attempt.error
    return {
        "number": attempt.number,
        "reason": attempt.reason,
        "outcome": None if attempt.outcome is None else attempt.outcome.value,
        "parent": attempt.parent,
        "step": attempt.parent_step,
        "donor": None if attempt.donor is None else {"trial": attempt.donor[0], "attempt": attempt.donor[1]},
        "epoch": attempt.epoch,
        "started": None if attempt.started is None else attempt.started.isoformat(),
        "ended": None if attempt.ended is None else attempt.ended.isoformat(),
        "host": _host(attempt),
        "pid": attempt.pid,
        "worker": worker_json(_worker(attempt, workers)),
        "flow_run_id": attempt.flow_run_id,
        "task_run_id": attempt.task_run_id,
        "note": attempt.note,
        "error": None if error is None else {"kind": error.kind, "message": error.message, "traceback": error.traceback},
    }


def attempt_lines(attempts: Sequence[Attempt], workers: Mapping[int, WorkerRow]) -> Iterator[str]:
    """Yield each attempt for people: what it was, from where to when, and below it its note, error and traceback."""
    for attempt in attempts:
        yield f"attempt {attempt.number} ({attempt.reason}): {_state(attempt)}{_origin(attempt)}"
        if attempt.started is not None:
            ended = "" if attempt.ended is None else f", ended {attempt.ended:%Y-%m-%d %H:%M:%S} UTC"
            place = "" if attempt.host is None else f", process {attempt.pid} on {_host(attempt)}"
            worker = _worker(attempt, workers)
            place += "" if worker is None else f", worker {printable(worker.name)}"
            yield f"  started {attempt.started:%Y-%m-%d %H:%M:%S} UTC{ended}{place}"
        if attempt.note:
            yield f"  {printable(attempt.note)}"
        if attempt.error is not None:
            message = [printable(line) for line in attempt.error.message.splitlines()] or [""]
            yield f"  {printable(attempt.error.kind)}: {message[0]}"
            yield from (f"    {line}" for line in message[1:])
            yield from (f"    {printable(line)}".rstrip() for line in attempt.error.traceback.splitlines())


def _state(attempt: Attempt) -> str:
    if attempt.outcome is not None:
        return attempt.outcome.value
    return "running" if attempt.claimed else "not started"


def _origin(attempt: Attempt) -> str:
    if attempt.parent_step is None:
        return ", from step 0"
    if attempt.donor is not None:
        whose = f"attempt {attempt.donor[1]} of trial {attempt.donor[0]}"
    else:
        whose = f"attempt {attempt.parent}"
    return f", after step {attempt.parent_step} of {whose}"


def _worker(attempt: Attempt, workers: Mapping[int, WorkerRow]) -> WorkerRow | None:
    return None if attempt.worker is None else workers.get(attempt.worker)


def _host(attempt: Attempt) -> str | None:
    return None if attempt.host is None else attempt.host.partition("/")[0]
