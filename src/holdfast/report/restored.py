"""What became of each trial in a restored search, and how much work the crash had cost: pure, from the plan and the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.core.resume import Action, Planned
from holdfast.core.trial import Trial, TrialStatus

SHOWN = 20
"""Trials that people are shown one by one; the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class RestoredTrial:
    """One trial that a restore did something with."""

    number: int
    before: TrialStatus
    """as the restore found it"""
    action: Action
    step: int | None
    """the checkpoint's step that it went on from; None: from the beginning, or it did not run"""
    lost: int
    """steps that had been reported beyond it"""
    status: TrialStatus
    """when the search ended"""


@dataclass(frozen=True, kw_only=True)
class RestoreSummary:
    """What became of the trials that a restore found, and which came after: numbers, in rising order."""

    kept: tuple[int, ...]
    """they had ended, and stayed as they were"""
    trials: tuple[RestoredTrial, ...]
    """all others that were there"""
    proposed: tuple[int, ...]
    """new ones"""
    queued: tuple[int, ...]
    """those that people queued meanwhile"""

    def _of(self, action: Action) -> tuple[int, ...]:
        return tuple(trial.number for trial in self.trials if trial.action is action)

    @property
    def adopted(self) -> tuple[int, ...]:
        """They were found to have ended before the crash."""
        return self._of(Action.ADOPT)

    @property
    def resumed(self) -> dict[int, int | None]:
        """The steps of the checkpoints that they went on from; None: there was none, so from the beginning."""
        return {trial.number: trial.step for trial in self.trials if trial.action is Action.RESUME}

    @property
    def restarted(self) -> tuple[int, ...]:
        return self._of(Action.RESTART)

    @property
    def started(self) -> tuple[int, ...]:
        """They had been waiting for their first start."""
        return self._of(Action.RUN)

    @property
    def skipped(self) -> tuple[int, ...]:
        """They were left out; a later restore may still run them."""
        return self._of(Action.SKIP)

    @property
    def work_lost(self) -> int:
        """Steps, of all trials, that had been reported and were done again."""
        return sum(trial.lost for trial in self.trials)

    @property
    def counts(self) -> dict[str, int]:
        """How many trials were treated in each way."""
        found = {
            "kept": self.kept,
            "adopted": self.adopted,
            "resumed": self.resumed,
            "restarted": self.restarted,
            "started": self.started,
            "skipped": self.skipped,
            "proposed": self.proposed,
            "queued": self.queued,
        }
        return {name: len(numbers) for name, numbers in found.items()}


def summary_of(plan: Sequence[Planned], trials: Sequence[Trial]) -> RestoreSummary:
    """Return what became of ``plan``, from the experiment's own ``trials`` as they stand at the end."""
    now = {trial.number: trial for trial in trials}
    there = {planned.trial for planned in plan}
    new = [trial for trial in trials if trial.number not in there]
    return RestoreSummary(
        kept=tuple(planned.trial for planned in plan if planned.action is Action.KEEP),
        trials=tuple(
            RestoredTrial(
                number=planned.trial,
                before=planned.status,
                action=planned.action,
                step=planned.step,
                lost=planned.lost,
                status=now[planned.trial].status,
            )
            for planned in plan
            if planned.action is not Action.KEEP
        ),
        proposed=tuple(trial.number for trial in new if trial.source != "queued"),
        queued=tuple(trial.number for trial in new if trial.source == "queued"),
    )


def restored_json(summary: RestoreSummary) -> dict[str, Any]:
    """Return a summary as ``restore --json`` prints it under ``restored``."""
    return {
        "counts": summary.counts,
        "work_lost": summary.work_lost,
        "trials": [
            {
                "trial": trial.number,
                "before": trial.before.value,
                "action": trial.action.value,
                "step": trial.step,
                "lost": trial.lost,
                "status": trial.status.value,
            }
            for trial in summary.trials
        ],
        "proposed": list(summary.proposed),
        "queued": list(summary.queued),
    }


def restored_lines(summary: RestoreSummary) -> Iterator[str]:
    """Yield the table for people; nothing when every trial was kept and no new one came."""
    if not (summary.trials or summary.proposed or summary.queued):
        return
    counts = ", ".join(f"{count} {_WORDS.get(name, name)}" for name, count in summary.counts.items() if count)
    yield f"restored: {counts}; {_steps(summary.work_lost)} lost"
    if not summary.trials:
        return
    rows = [("trial", "was", "restore", "lost", "is")]
    rows += [
        (str(trial.number), trial.before.value, _did(trial), _steps(trial.lost) if trial.lost else "", trial.status.value)
        for trial in _first(summary.trials)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for number, *cells in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield f"  {number.rjust(widths[0])}  {'  '.join(padded)}".rstrip()
    if len(summary.trials) > SHOWN:
        yield f"  and {len(summary.trials) - SHOWN} more: --json has every one"


def _first(trials: Sequence[RestoredTrial]) -> list[RestoredTrial]:
    """Return those to show: of many, the ones that lost most before the others."""
    chosen = sorted(trials, key=lambda trial: -trial.lost)[:SHOWN]
    return sorted(chosen, key=lambda trial: trial.number)


_WORDS = {"skipped": "left out", "proposed": "newly proposed", "queued": "newly queued"}
_DID = {
    Action.ADOPT: "adopted",
    Action.RESTART: "restarted at step 0",
    Action.RUN: "started",
    Action.SKIP: "left out",
}


def _did(trial: RestoredTrial) -> str:
    if trial.action is Action.RESUME:
        return "resumed from the beginning" if trial.step is None else f"resumed after step {trial.step}"
    return _DID[trial.action]


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"
