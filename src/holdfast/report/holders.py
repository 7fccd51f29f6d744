"""Who drives an experiment, or how the last drive ended: for people and, as JSON values, for programs."""

from __future__ import annotations

from typing import Any

from holdfast.experiment import Experiment
from holdfast.report.texts import printable
from holdfast.report.working import beats
from holdfast.storage.database.leases import describe

_NAMED = 3


def lease_json(experiment: Experiment) -> dict[str, Any]:
    """Return the lease as ``show --json`` prints it; ``remaining`` is in seconds, 0 when nobody holds it."""
    lease = experiment.lease
    holder = lease.holder or {}
    return {
        "driven": experiment.is_driven,
        "held": lease.is_held,
        "epoch": lease.epoch,
        "host": holder.get("hostname"),
        "pid": holder.get("pid"),
        "remaining": max(lease.remaining, 0.0) if lease.holder is not None else 0.0,
    }


def holder_words(experiment: Experiment) -> str:
    """Say who drives the experiment; when nobody does, how the last drive ended, and which of its workers still live."""
    alive = [] if experiment.is_driven else [worker.name for worker in experiment.workers() if beats(worker)]
    named = ", ".join(printable(name) for name in alive[:_NAMED])
    more = f" and {len(alive) - _NAMED} more" if len(alive) > _NAMED else ""
    return _holder_words(experiment) + (f"; still alive of its workers: {named}{more}" if alive else "")


def _holder_words(experiment: Experiment) -> str:
    lease, driven = experiment.lease, experiment.is_driven
    if lease.holder is None:
        if lease.epoch == 0:
            return "nobody; it was never driven"
        ended = experiment.ended
        return "nobody; the last drive was cut off" if ended is None else f"nobody; the last drive ended: {ended}"
    who = f"{describe(lease.holder)}, epoch {lease.epoch}"
    if driven:
        return f"{who}, for another {lease.remaining:.0f} s unless renewed"
    why = "is gone" if lease.is_held else "fell silent: its lease has run out"
    return f"nobody; the last drive was cut off: {who}, {why}"
