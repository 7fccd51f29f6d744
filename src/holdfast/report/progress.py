"""Progress of a search: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from holdfast.core.failure_section import FailureSection
from holdfast.core.ranking import Candidate, candidates_of, group_of, ranked
from holdfast.core.resume import Planned
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import ACTIVE, ERRORED, SCORED, Trial, TrialStatus
from holdfast.locate import Opened
from holdfast.report.observer import Observer, is_retry, restore_command, waiting_words
from holdfast.report.ranking import Ranking
from holdfast.report.restored import restored_lines
from holdfast.report.tables import brief, config_words, plan_words
from holdfast.report.texts import printable
from holdfast.result import SearchResult

_COUNTED = SCORED | ERRORED
"""What can change which trial is the best: the worst of repeats is no candidate when one of them errored."""


class Progress(Observer):
    """Writes what happens to a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._opened: Opened | None = None
        self._trials: dict[int, Trial] = {}
        self._counts: Counter[TrialStatus] = Counter()
        self._started = time.monotonic()
        self._ended_here = 0
        self._live: Live | None = None
        self._groups: dict[int, dict[int, Trial]] = {}
        self._leader: Candidate | None = None
        self._comparing = threading.Lock()
        self._behind = False
        """whether there are trials to be compared that nobody has looked for since: then all of them are, at once"""

    def say(self, text: str) -> None:
        self._print(text)

    def opened(self, opened: Opened, *, restored: bool) -> None:
        self._opened = opened
        self._print(f"{'restoring' if restored else 'experiment'} {opened.record.name}: {opened.folder.location}")
        self._print(f"after a crash: {restore_command(opened)}")
        if opened.spec.search.chosen:
            self._print(opened.spec.search.chosen)

    def planned(self, plan: Sequence[Planned]) -> None:
        self._print(f"trials: {plan_words(plan)}")
        for planned in plan:
            if "not used" in planned.reason:
                self._print(f"trial {planned.trial}: {planned.reason}")

    def running(self, api_url: str | None) -> None:
        if api_url is not None:
            self._print(f"Prefect API: {api_url}")
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._render, transient=True)
            self._live.start()

    def trial(self, trial: Trial) -> None:
        before = self._trials.get(trial.number)
        with self._comparing:
            self._trials[trial.number] = trial
            if before is not None:
                self._counts[before.status] -= 1
            self._counts[trial.status] += 1
            self._lead(trial, before)
        if self._live is not None and trial.error is None and not is_retry(trial):
            if trial.status not in ACTIVE and before is not None:
                self._ended_here += 1
            return
        if trial.status in ACTIVE and not (trial.status is TrialStatus.PENDING and trial.attempt.number > 1):
            return
        if trial.status is TrialStatus.PENDING and trial.attempt.reason == "resume" and self._is_population:
            return  # each member waits so at each end of a generation
        if before is None and trial.status not in ACTIVE:
            return  # it had ended before this run
        if trial.status not in ACTIVE:
            self._ended_here += 1
        self._print(self._words(trial))

    def ended(self, result: SearchResult) -> None:
        self._stop()
        if self._opened is None:
            return
        counts = Counter(trial.status for trial in result.trials)
        numbers = ", ".join(f"{counts[status]} {status.value}" for status in TrialStatus if counts[status])
        self._print(f"{result.reason}: {numbers or 'no trial'}")
        for line in () if result.restored is None else restored_lines(result.restored):
            self._print(line)
        for part in Ranking(result.trials, self._opened.spec).parts():
            if isinstance(part, str):
                self._print(part)
            else:
                self._console.print(part)
        self._print(f"path: {result.path}")
        self._print(f"restore: {restore_command(self._opened)}")

    def close(self) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    @property
    def _is_population(self) -> bool:
        return self._opened is not None and self._opened.spec.population is not None

    def _words(self, trial: Trial) -> str:
        if trial.status is TrialStatus.PENDING:
            failure = FailureSection() if self._opened is None else self._opened.spec.failure
            return waiting_words(trial, failure, datetime.now(UTC))
        words = f"trial {trial.number} {trial.status.value}"
        if self._opened is not None and trial.status in SCORED:
            values = (f"{goal.name}={brief(trial.metrics.get(goal.name))}" for goal in self._opened.spec.goals)
            words += f"  {' '.join(values)}"
        if trial.status is TrialStatus.PRUNED and trial.attempt.note:
            words += f"  {trial.attempt.note}"
        elif trial.error is not None:
            words += f"  {trial.error.kind}: {trial.error.message.splitlines()[0] if trial.error.message else ''}"
        return printable(f"{words}  {config_words(trial)}")

    def _render(self) -> Group:
        counted = [(self._counts[status], status.value.lower()) for status in TrialStatus]
        numbers = "  ".join(f"{count} {status}" for count, status in counted if count)
        return Group(Text(numbers or "starting"), Text(self._pace()))

    def _pace(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        words = [f"{seconds:.0f} s"]
        if self._ended_here and self._opened is not None:
            rate = self._ended_here / seconds
            words.append(f"{rate * 60:.1f} trials/min" if rate < 1 else f"{rate:.1f} trials/s")
            total = self._opened.spec.search.num_trials
            if total is not None:
                ended = sum(self._counts[status] for status in TrialStatus if status not in ACTIVE)
                words.append(f"about {max(total - ended, 0) / rate:.0f} s left")
        best = self._best()
        if best is not None:
            words.append(best)
        return "  ".join(words)

    def _lead(self, trial: Trial, before: Trial | None) -> None:
        """Keep the best one up to date: a trial, with its repeats, is compared with the best so far alone unless it is that."""
        members = self._groups.setdefault(group_of(trial), {})
        members[trial.number] = trial
        counts = trial.status in _COUNTED or (before is not None and before.status in _COUNTED)
        if self._opened is None or self._behind or not counts:
            return
        if before is None:
            self._behind = True
            return
        spec, leader = self._opened.spec, self._leader
        if leader is None or group_of(leader.trial) != group_of(trial):
            found = [*candidates_of(members.values(), spec), *([] if leader is None else [leader])]
        else:
            found = candidates_of(self._trials.values(), spec)
        self._leader = _first(found, spec)

    def _best(self) -> str | None:
        if self._opened is None:
            return None
        with self._comparing:  # the thread of the search changes it
            if self._behind:
                self._leader = _first(candidates_of(list(self._trials.values()), self._opened.spec), self._opened.spec)
                self._behind = False
            leader = self._leader
        if leader is None:
            return None
        return f"best {self._opened.spec.goals[0].name} {brief(leader.values[0])} (trial {leader.trial.number})"


def _first(found: Sequence[Candidate], spec: ExperimentSpec) -> Candidate | None:
    order = ranked(sorted(found, key=lambda candidate: candidate.trial.number), spec.goals)
    return order[0][1] if order else None
