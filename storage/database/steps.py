"""How far trials have got: the steps of the reports that count, of those that a restore may run again."""

from __future__ import annotations

from sqlalchemy import text

from holdfast.core.checkpoint import chain
from holdfast.core.resume import Rerun, ResumePolicy
from holdfast.core.trial import Attempt
from holdfast.storage.database import statements as sql
from holdfast.storage.database.engine import Statement
from holdfast.storage.database.losses import repeatable
from holdfast.storage.database.reads import Reader

# Finished trials, of which there may be many, are asked for only where they are to run again.
_SCOPE = (
    " WHERE t.experiment_id = :experiment AND t.number >= 0"
    " AND (t.status IN ('PENDING', 'RUNNING', 'SKIPPED') AND :unfinished = 1"
    " OR t.status IN ('FAILED', 'TIMED_OUT') AND :errored = 1"
    " OR t.status IN ('COMPLETED', 'PRUNED', 'CANCELLED') AND :finished = 1)"
)
_LINKS = Statement(
    text(
        f"SELECT t.number, a.number, {sql.OWN_PARENT}, a.parent_step FROM trial t JOIN attempt a ON a.trial_id = t.id"
        " LEFT JOIN attempt p ON p.id = a.parent_id" + _SCOPE
    )
)
_STEPS = Statement(
    text(
        "SELECT t.number, a.number, r.step FROM trial t JOIN attempt a ON a.trial_id = t.id"
        " JOIN report r ON r.attempt_id = a.id" + _SCOPE + " AND r.step >= 0"
    )
)


@repeatable
def canonical_steps(reader: Reader, policy: ResumePolicy) -> dict[int, list[int]]:
    """Return the steps of the canonical reports of each trial that ``policy`` may run again, rising."""
    scope = {
        "experiment": reader.experiment,
        "unfinished": int(policy.unfinished is not Rerun.SKIP),
        "errored": int(policy.errored is not Rerun.SKIP),
        "finished": int(policy.finished is not Rerun.SKIP),
    }
    if not any(value for name, value in scope.items() if name != "experiment"):
        return {}
    with reader.database.snapshot() as state:
        links, steps = state.run(_LINKS, **scope), state.run(_STEPS, **scope)
    attempts: dict[int, dict[int, Attempt]] = {}
    for number, attempt, parent, parent_step in links:
        attempts.setdefault(number, {})[attempt] = Attempt(id=0, number=attempt, parent=parent, parent_step=parent_step)
    limits = {number: dict(chain(max(of_trial), of_trial)) for number, of_trial in attempts.items()}
    found: dict[int, list[int]] = {}
    for number, attempt, step in sorted(steps):
        limit = limits[number].get(attempt, -1)
        if limit is None or step <= limit:
            found.setdefault(number, []).append(step)
    return {number: sorted(of_trial) for number, of_trial in found.items()}
