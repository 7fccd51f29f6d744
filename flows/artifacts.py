"""What people are shown of a search in Prefect: how far it is, its best trials, a summary. Pure: from trials as they stand.

A tally takes in the trials that changed; what it costs to show them does not grow with those that did not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.objective import Direction
from holdfast.core.ranking import Candidate, candidates_of, front_of, group_of, ranked
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ACTIVE, ERRORED, SCORED, Trial, TrialStatus
from holdfast.core.values import Json, strict
from holdfast.report.tables import brief, config_words
from holdfast.report.texts import code_block, command_block, marked_down, one_line

KINDS = ("progress", "leaderboard", "summary")
TYPES = {"progress": "progress", "leaderboard": "table", "summary": "markdown"}
"""The artifacts, and what Prefect calls their types."""

LEADERS = 20
"""Rows of the leaderboard."""
ERRORS = 10
"""Kinds of errors that the summary shows."""
PARAMETERS = 8
"""Columns of parameters that it has at most: of more than so many it shows all in one."""
NUMBERS = 8
"""Trials that are named for each of them."""
KINDS_KEPT = 1000
"""Kinds of errors that are told apart; more are counted as one."""

_CELL, _CONFIG, _ERROR = 100, 1000, 300
_COUNTED = SCORED | ERRORED
_WHOLE = 1 << 53


def safe(value: Json) -> Json:
    """Return a metric as a value that every reader of JSON takes: no NaN, no long text, no number that loses digits."""
    if isinstance(value, str):
        return one_line(value, _CELL)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < _WHOLE else one_line(str(value), _CELL)
    return strict(value) if isinstance(value, float) else one_line(str(value), _CELL)


def error_words(trial: Trial, limit: int = _ERROR) -> str:
    """Return why a trial errored in one line; nothing when it did not."""
    error = trial.error
    return "" if error is None or trial.status not in ERRORED else one_line(f"{error.kind}: {error.message}", limit)


class Tally:
    """The trials of an experiment, counted and compared as they change."""

    def __init__(self, spec: ExperimentSpec) -> None:
        self.counts: Counter[TrialStatus] = Counter()
        self._spec = spec
        self._trials: dict[int, Trial] = {}
        self._groups: dict[int, dict[int, Trial]] = {}
        self._errors: dict[str, dict[int, None]] = {}
        """the numbers of the trials that errored alike"""
        self._filed: dict[int, str] = {}
        self._changed: set[int] = set()
        """groups that have to be compared"""
        self._leaders: list[Candidate] = []

    def __len__(self) -> int:
        return len(self._trials)

    def take(self, trial: Trial) -> None:
        """Take in a trial as it stands now."""
        before = self._trials.get(trial.number)
        self._trials[trial.number] = trial
        self.counts[trial.status] += 1
        if before is not None:
            self.counts[before.status] -= 1
            self._errors.get(self._filed.pop(trial.number, ""), {}).pop(trial.number, None)
        if trial.status in ERRORED:
            kind = error_words(trial)
            kind = kind if kind in self._errors or len(self._errors) < KINDS_KEPT else "other errors"
            self._errors.setdefault(kind, {})[trial.number] = None
            self._filed[trial.number] = kind
        group = group_of(trial)
        self._groups.setdefault(group, {})[trial.number] = trial
        if trial.status in _COUNTED or (before is not None and before.status in _COUNTED):
            self._changed.add(group)

    @property
    def ended(self) -> int:
        """How many trials will not run any more."""
        return len(self._trials) - sum(self.counts[status] for status in ACTIVE)

    def leaders(self) -> list[Candidate]:
        """Return the best, or with several objectives the front, best first; only what changed is compared anew."""
        if self._changed:
            if any(group_of(leader.trial) in self._changed for leader in self._leaders):
                pool = candidates_of(self._trials.values(), self._spec)  # one that led may lead no more
            else:
                members = [trial for group in self._changed for trial in self._groups[group].values()]
                pool = [*self._leaders, *candidates_of(members, self._spec)]
            self._changed.clear()
            self._leaders = self._best(pool)
        return self._leaders

    def _best(self, pool: Iterable[Candidate]) -> list[Candidate]:
        found = sorted(pool, key=lambda candidate: candidate.trial.number)
        goals = self._spec.goals
        if len(goals) == 1:
            return [candidate for _, candidate in ranked(found, goals)[:LEADERS]]
        sign = 1.0 if goals[0].direction is Direction.MIN else -1.0
        return sorted(front_of(found, goals), key=lambda candidate: sign * candidate.values[0])

    def errors(self) -> list[tuple[str, list[int]]]:
        """Return errors and the trials that had them, the most frequent first."""
        found = [(words, list(numbers)) for words, numbers in self._errors.items() if numbers]
        return sorted(found, key=lambda pair: (-len(pair[1]), pair[1][0]))

    def words(self) -> str:
        """Say how many trials have each status."""
        return ", ".join(f"{self.counts[status]} {status.value}" for status in TrialStatus if self.counts[status]) or "no trial"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is shown beside the trials."""

    name: str
    path: str
    command: str
    """what restores it"""
    spec: ExperimentSpec
    total: int | None
    """trials that are to run, where that is known"""
    epoch: int
    restored: bool
    """whether this drive is a restore's"""
    lost: int = 0
    """steps that it does again"""
    continues: bool = False
    """whether its flow run goes on from another one"""
    ended: str | None = None
    """interrupted, stopped, continued (in a new flow run), completed or failed once it has ended, else None"""
    reason: str = ""
    """why it ended"""


def rendered(kind: str, shown: Shown, tally: Tally) -> Any:
    """Return the data of an artifact."""
    if kind == "progress":
        return percent(shown, tally)
    return json.dumps(leaderboard(shown.spec, tally), allow_nan=False) if kind == "leaderboard" else summary(shown, tally)


def percent(shown: Shown, tally: Tally) -> float:
    """Return how many of the trials that are to run have ended, of 100; a search that is complete is at 100."""
    if shown.ended == "completed":
        return 100.0
    total = max(shown.total or 0, len(tally))
    return round(100.0 * tally.ended / total, 1) if total else 0.0


def leaderboard(spec: ExperimentSpec, tally: Tally) -> list[dict[str, Any]]:
    """Return the rows of the best trials, or of the front: the columns of ``holdfast trials``.

    With few parameters each has a column of its own. Text is markdown: that is how Prefect's UI shows the cells of a table.
    """
    found = tally.leaders()[:LEADERS]
    repeated = any(len(candidate.members) > 1 for candidate in found)
    fixed = {"rank", "trial", "status", "repeats", "step", "attempts", "config"}
    goals = _columns(spec.objectives, fixed, "objective")
    parameters = _columns(
        dict.fromkeys(name for one in found for name in one.trial.config), {*fixed, *goals.values()}, "parameter"
    )
    rows = []
    for place, candidate in enumerate(found):
        trial = candidate.trial
        row: dict[str, Any] = {"rank": place + 1, "trial": trial.number, "status": trial.status.value}
        row |= {goals[name]: _cell(brief(value)) for name, value in zip(spec.objectives, candidate.values, strict=True)}
        if repeated:
            row["repeats"] = len(candidate.members)
        row |= {"step": "" if trial.step is None else trial.step, "attempts": trial.attempts}
        if len(parameters) <= PARAMETERS:
            config = trial.config
            row |= {column: _cell(brief(config[name])) if name in config else "" for name, column in parameters.items()}
        else:
            row["config"] = marked_down(config_words(trial), _CONFIG)
        rows.append(row)
    return rows


def _columns(names: Iterable[str], taken: Iterable[str], kind: str) -> dict[str, str]:
    """Return a column for each name, none of them ``taken`` or another's."""
    columns, others = dict[str, str](), {*taken}
    for name in names:
        shown = column = one_line(name, _CELL) or kind
        count = 1
        while column in others:
            column = f"{shown} ({kind})" if count == 1 else f"{shown} ({kind} {count})"
            count += 1
        columns[name] = column
        others.add(column)
    return columns


def _cell(text: str) -> str:
    return marked_down(text, _CELL)


def best_words(spec: ExperimentSpec, tally: Tally) -> str:
    """Say which trial is the best, and its values."""
    leaders = tally.leaders()
    if not leaders:
        return "none yet"
    best = leaders[0]
    values = ", ".join(f"{name} {brief(value)}" for name, value in zip(spec.objectives, best.values, strict=True))
    front = f"; {len(leaders)} trials are on the front" if len(spec.objectives) > 1 else ""
    return f"trial {best.trial.number}: {values}{front}"


_HOW: Mapping[str | None, str] = {
    None: "If its process dies, this goes on with it:",
    "interrupted": "It was cut off. This goes on with it:",
    "continued": "It goes on in a new flow run. If nothing drives it, this goes on with it:",
    "stopped": "A person stopped it. This goes on with it:",
    "completed": "Its budget is used up. This runs more trials, with a greater number in place of the dots:",
    "failed": "It failed. This runs the errored trials again, with `--resume-errored` from their newest checkpoints:",
}
_MORE = {"completed": " --set search.num_trials=...", "failed": " --restart-errored"}


def summary(shown: Shown, tally: Tally) -> str:
    """Return what somebody has to know who finds this search: how it stands, what went wrong, how to go on."""
    state = shown.ended or "running"
    of = "" if shown.total is None else f", of {shown.total}"
    lines = [
        f"# {marked_down(shown.name)}: {state}",
        "",
        "| | |",
        "|---|---|",
        *([f"| reason | {marked_down(shown.reason, 1000)} |"] if shown.reason else []),
        f"| path | {marked_down(shown.path, 1000)} |",
        f"| trials | {tally.words()}{of} |",
        f"| best | {marked_down(best_words(shown.spec, tally))} |",
        f"| driven | for the {_ordinal(shown.epoch)} time |" if shown.epoch > 1 else "| driven | for the first time |",
    ]
    if shown.restored:
        lines.append(f"| restored | {_lost_words(shown.lost)} |")
    found = tally.errors()
    if found:
        lines += ["", "## Errors", "", "| trials | numbers | error |", "|---|---|---|"]
        lines += [f"| {len(numbers)} | {_some(numbers)} | {marked_down(words, _ERROR)} |" for words, numbers in found[:ERRORS]]
        if len(found) > ERRORS:
            lines.append(f"| {sum(len(numbers) for _, numbers in found[ERRORS:])} | | {len(found) - ERRORS} other errors |")
    lines += ["", "## How to go on", "", _HOW[shown.ended], "", command_block(shown.command + _MORE.get(state, ""))]
    if found and state == "completed":
        lines += ["", "This runs the errored trials again:", "", command_block(f"{shown.command} --restart-errored")]
    lines += ["", "Or run the deployment `restore/restore` with this path:", "", code_block(shown.path)]
    return "\n".join(lines)


def _lost_words(steps: int) -> str:
    match steps:
        case 0:
            return "no work was lost"
        case 1:
            return "1 step of work was lost, and is done again"
        case _:
            return f"{steps} steps of work were lost, and are done again"


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:NUMBERS])) + (", ..." if len(numbers) > NUMBERS else "")


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
