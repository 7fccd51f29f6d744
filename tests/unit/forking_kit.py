"""What the tests of forks share."""

from __future__ import annotations

from typing import Any

import holdfast
from holdfast.core.resume import ResumePolicy
from holdfast.experiment import Experiment
from holdfast.flows import reconcile
from holdfast.locate import Opened
from holdfast.storage.database.reads import Reader


def fork(opened: Opened, name: str = "fork", **how: Any) -> Experiment:
    return holdfast.fork(opened.folder.path, name, **how)


def statuses(experiment: Experiment) -> list[str]:
    return [trial.status.value for trial in experiment.trials]


def rows(experiment: Experiment) -> list[Any]:
    """Return what a fork must not change of trials, history and checkpoints."""
    trials = [
        (t.number, t.config, t.seed, t.metrics, t.step, t.error, t.ended_seq, t.source, t.group, t.state)
        for t in experiment.trials
    ]
    return [
        trials,
        experiment.history(),
        experiment.telemetry(),
        [(c.path, c.digest, c.status, c.pinned) for c in experiment.checkpoints()],
    ]


def plan(opened: Opened) -> dict[int, tuple[str, int | None]]:
    survey = reconcile.Survey(Reader(opened.database, opened.record.id), opened.folder, ResumePolicy(), opened.spec)
    return {planned.trial: (planned.action.value, planned.step) for planned in survey.plan()}
