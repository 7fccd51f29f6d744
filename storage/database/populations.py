"""Populations in the store: what one generation changes, in one transaction, and what is lent between trials."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import text

from holdfast.core.errors import Conflict
from holdfast.core.population import Change
from holdfast.core.space import config_text
from holdfast.core.trial import TrialStatus
from holdfast.core.values import Json, digest
from holdfast.storage.database import statements as sql
from holdfast.storage.database.engine import Statement, Transaction

EVOLVED = "evolved"
"""The audit row of a generation: who went on from whom, and with what."""


def _sql(body: str) -> Statement:
    return Statement(text(body))


GENERATIONS = _sql(f"SELECT COUNT(*) FROM audit WHERE experiment_id = :experiment AND action = '{EVOLVED}'")

SET_CONFIG = _sql("UPDATE attempt SET config_id = :config WHERE id = :attempt")

_STANDING = _sql("SELECT id, parent_id, parent_step, config_id FROM attempt WHERE trial_id = :trial AND number = :number")

# The waiting attempt of a trial, and what it would continue from.
_WAITING = _sql(
    "SELECT t.id, a.id, a.number, a.parent_id, a.parent_step, p.number, p.trial_id FROM trial t"
    " JOIN attempt a ON a.trial_id = t.id AND a.number = t.current_attempt LEFT JOIN attempt p ON p.id = a.parent_id"
    " WHERE t.experiment_id = :experiment AND t.number = :number AND t.status = :status AND a.claimed_by IS NULL"
)

_EXPLOIT = _sql(
    "UPDATE attempt SET config_id = :config, parent_id = :parent, parent_step = :step, reason = 'exploit', note = :note"
    " WHERE id = :attempt AND claimed_by IS NULL AND outcome IS NULL"
)

_TOUCH = _sql("UPDATE trial SET seq = :seq WHERE id = :trial")

_LEND = _sql(
    "UPDATE checkpoint SET pinned = pinned | 2, seq = :seq WHERE attempt_id = :parent AND step = :step AND status = 'valid'"
    " RETURNING id"
)

_LENT = _sql(
    "SELECT c.attempt_id, c.step FROM checkpoint c JOIN attempt a ON a.id = c.attempt_id JOIN trial t ON t.id = a.trial_id"
    " WHERE t.experiment_id = :experiment AND c.pinned >= 2"
)

_PARENT = _sql("SELECT parent_id, parent_step FROM attempt WHERE id = :attempt")

# Only once nobody who has not ended, and has saved nothing since, goes on from it.
_RELEASE = _sql(
    "UPDATE checkpoint SET pinned = pinned & 1, seq = :seq WHERE attempt_id = :parent AND step = :step AND pinned >= 2"
    " AND NOT EXISTS (SELECT 1 FROM attempt a JOIN trial t ON t.id = a.trial_id AND t.current_attempt = a.number"
    " WHERE a.parent_id = checkpoint.attempt_id AND a.parent_step = checkpoint.step"
    " AND t.id <> (SELECT o.trial_id FROM attempt o WHERE o.id = checkpoint.attempt_id)"
    " AND t.status IN ('PENDING', 'RUNNING', 'SKIPPED')"
    " AND NOT EXISTS (SELECT 1 FROM checkpoint s WHERE s.attempt_id = a.id AND s.status = 'valid'))"
    " RETURNING id"
)


def standing(tx: Transaction, trial: int, number: int) -> tuple[int, tuple[int, int] | None, int]:
    """Return an attempt's row id, (attempt row id, step) that it continues, and its config (row id)."""
    identity, parent, step, config = tx.run(_STANDING, trial=trial, number=number)[0]
    return identity, None if parent is None else (parent, step), config


def evolve(tx: Transaction, experiment: int, seq: int, generation: int, changes: Sequence[Change]) -> dict[str, Json]:
    """Give each changed member its config and parent; return what the audit tells of the generation.

    Conflict when it is not the generation that comes next, or a member or its donor does not wait at its end.
    """
    done = int(tx.run(GENERATIONS, experiment=experiment)[0][0])
    if generation != done:
        raise Conflict(f"generation {generation} cannot be evolved: {done} generations were; nothing was written")
    told: list[Json] = []
    donors = {change.donor: _waiting(tx, experiment, change.donor) for change in changes}
    for change in changes:
        donor = donors[change.donor]
        if donor[3] is None or donor[4] != change.step:
            raise Conflict(f"trial {change.donor} has no checkpoint of step {change.step} to go on from; nothing was written")
        trial, attempt, number, *_ = _waiting(tx, experiment, change.trial)
        body = config_text(change.config)
        config = tx.run(sql.CONFIG, digest=digest(body), body=body)[0][0]
        for checkpoint in _lent(tx, seq, change, donor[3]):
            tx.run(sql.TOUCH_TRIAL, checkpoint=checkpoint, seq=seq)
        tx.run(_EXPLOIT, attempt=attempt, config=config, parent=donor[3], step=change.step, note=change.note)
        tx.run(_TOUCH, trial=trial, seq=seq)
        differences: dict[str, Json] = {name: list(pair) for name, pair in change.changes.items()}
        told.append(
            {
                "trial": change.trial,
                "attempt": number,
                "from_trial": change.donor,
                "from_attempt": donor[5],
                "from_step": change.step,
                "changes": differences,
            }
        )
    for parent, step in tx.run(_LENT, experiment=experiment):
        _release(tx, seq, parent, step)
    return {"generation": generation, "members": told}


def _waiting(tx: Transaction, experiment: int, number: int) -> tuple[int, ...]:
    rows = tx.run(_WAITING, experiment=experiment, number=number, status=TrialStatus.PENDING.value)
    if not rows:
        raise Conflict(f"trial {number} does not wait at the end of a generation; nothing was written")
    return rows[0]


def _lent(tx: Transaction, seq: int, change: Change, parent: int) -> list[int]:
    rows = tx.run(_LEND, parent=parent, step=change.step, seq=seq)
    if not rows:
        raise Conflict(f"the checkpoint of trial {change.donor} at step {change.step} is not valid; nothing was written")
    return [row[0] for row in rows]


def give_back(tx: Transaction, seq: int, attempt: int) -> None:
    """Leave what an attempt went on from to the rules of retention, if it was lent and nobody else needs it."""
    parent, step = tx.run(_PARENT, attempt=attempt)[0]
    if parent is not None:
        _release(tx, seq, parent, step)


def _release(tx: Transaction, seq: int, parent: int, step: int) -> None:
    for row in tx.run(_RELEASE, parent=parent, step=step, seq=seq):
        tx.run(sql.TOUCH_TRIAL, checkpoint=row[0], seq=seq)
