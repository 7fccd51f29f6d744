"""Progress of a search: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from holdfast.core.objective import score
from holdfast.core.resume import Planned
from holdfast.core.trial import ACTIVE, SCORED, Trial, TrialStatus
from holdfast.experiment import SearchResult
from holdfast.locate import Opened
from holdfast.report.observer import Observer, restore_command
from holdfast.report.tables import brief, config_words, leaderboard, plan_words


class Progress(Observer):
    """Writes what happens to a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._opened: Opened | None = None
        self._trials: dict[int, Trial] = {}
        self._started = time.monotonic()
        self._ended_here = 0
        self._live: Live | None = None

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
        self._trials[trial.number] = trial
        if self._live is not None and trial.error is None:
            if trial.status not in ACTIVE and before is not None:
                self._ended_here += 1
            return
        if trial.status in ACTIVE and not (trial.status is TrialStatus.PENDING and trial.attempt.number > 1):
            return
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
        if result.best is not None:
            self._console.print(leaderboard(result.trials, self._opened.spec.goals))
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

    def _words(self, trial: Trial) -> str:
        if trial.status is TrialStatus.PENDING:
            return f"trial {trial.number} waits for attempt {trial.attempt.number} ({trial.attempt.reason})"
        words = f"trial {trial.number} {trial.status.value}"
        if self._opened is not None and trial.status in SCORED:
            values = (f"{goal.name}={brief(trial.metrics.get(goal.name))}" for goal in self._opened.spec.goals)
            words += f"  {' '.join(values)}"
        if trial.error is not None:
            words += f"  {trial.error.kind}: {trial.error.message.splitlines()[0] if trial.error.message else ''}"
        return f"{words}  {config_words(trial)}"

    def _render(self) -> Group:
        counts = Counter(trial.status for trial in list(self._trials.values()))
        numbers = "  ".join(f"{counts[status]} {status.value.lower()}" for status in TrialStatus if counts[status])
        return Group(Text(numbers or "starting"), Text(self._pace()))

    def _pace(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        words = [f"{seconds:.0f} s"]
        if self._ended_here and self._opened is not None:
            rate = self._ended_here / seconds
            words.append(f"{rate * 60:.1f} trials/min" if rate < 1 else f"{rate:.1f} trials/s")
            total = self._opened.spec.search.num_trials
            if total is not None:
                ended = sum(trial.status not in ACTIVE for trial in list(self._trials.values()))
                words.append(f"about {max(total - ended, 0) / rate:.0f} s left")
        best = self._best()
        if best is not None:
            words.append(best)
        return "  ".join(words)

    def _best(self) -> str | None:
        if self._opened is None:
            return None
        goal = self._opened.spec.goals[0]
        best: tuple[float, int] | None = None
        for trial in list(self._trials.values()):
            value = score(trial.metrics, goal) if trial.status in SCORED else None
            if value is not None and (best is None or goal.better(value, best[0])):
                best = (value, trial.number)
        return None if best is None else f"best {goal.name} {brief(best[0])} (trial {best[1]})"
