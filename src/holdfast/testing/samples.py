"""Small valid values for tests: a spec and trials, with everything but what matters filled in."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import Attempt, Trial, TrialStatus
from holdfast.core.values import Config, Metrics


def sample_spec(**changes: Any) -> ExperimentSpec:
    """Return a spec of 20 random trials of one parameter; each keyword replaces a whole section."""
    data: dict[str, Any] = {
        "name": "sample",
        "trainable": "train.py:train",
        "objectives": {"loss": "min"},
        "space": {"x": {"type": "float", "low": 0.0, "high": 1.0}},
        "search": {"engine": "random", "num_trials": 20, "seed": 1},
    }
    return ExperimentSpec.parse({**data, **changes})


def sample_trial(
    number: int,
    status: TrialStatus = TrialStatus.PENDING,
    *,
    config: Config | None = None,
    metrics: Mapping[str, Any] | None = None,
    attempt: int = 1,
    claimed: bool | None = None,
    ts_start: datetime | None = None,
    source: str = "proposed",
    group: int | None = None,
    repeat: int = 0,
) -> Trial:
    """Return a trial as a store would; its attempt counts as claimed unless the trial is PENDING for the first time."""
    started = claimed if claimed is not None else status is not TrialStatus.PENDING
    found: Metrics = dict(metrics or {})
    return Trial(
        number=number,
        status=status,
        config={} if config is None else config,
        config_id=number + 1,
        seed=number,
        seq=number + 1,
        attempt=Attempt(id=number * 100 + attempt, number=attempt, claimed=started),
        attempts=attempt if started else attempt - 1,
        metrics=found,
        step=0 if found else None,
        ts_start=ts_start,
        source=source,
        group=group,
        repeat=repeat,
    )
