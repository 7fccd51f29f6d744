"""What the command line shows of stored experiments, for people and (as JSON values) for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from holdfast.core.checkpoint import Checkpoint
from holdfast.core.objective import Objective
from holdfast.core.ranking import group_of
from holdfast.core.resume import Action, Planned
from holdfast.core.trial import SCORED, Trial, TrialStatus
from holdfast.core.values import strict
from holdfast.experiment import Experiment
from holdfast.report.texts import printable
from holdfast.upkeep import Leftover

COLOURS = {
    TrialStatus.COMPLETED: "green",
    TrialStatus.PRUNED: "cyan",
    TrialStatus.RUNNING: "blue",
    TrialStatus.FAILED: "red",
    TrialStatus.TIMED_OUT: "red",
}


def brief(value: object) -> str:
    """Return a value as short text that can be printed: floats with five significant digits."""
    return f"{value:.5g}" if isinstance(value, float) else str(value).encode("utf-8", "backslashreplace").decode()


def config_words(trial: Trial) -> str:
    """Return a config in one line."""
    return " ".join(f"{name}={brief(value)}" for name, value in trial.config.items())


def trial_json(trial: Trial) -> dict[str, Any]:
    """Return a trial as ``trials --json`` prints it."""
    error = trial.error
    return {
        "number": trial.number,
        "status": trial.status.value,
        "config": strict(trial.config),
        "metrics": strict(trial.metrics),
        "step": trial.step,
        "attempts": trial.attempts,
        "error": None if error is None else f"{error.kind}: {error.message}",
    }


def summary_json(experiment: Experiment) -> dict[str, Any]:
    """Return what is known of an experiment without reading its trials."""
    lease = experiment.lease
    return {
        "name": experiment.name,
        "id": experiment.id,
        "status": experiment.status,
        "path": str(experiment.path),
        "epoch": lease.epoch,
        "trials": {status.value: count for status, count in experiment.counts().items()},
    }


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint as ``checkpoints --json`` prints it."""
    return {
        "trial": checkpoint.trial,
        "step": checkpoint.step,
        "status": checkpoint.status.value,
        "bytes": checkpoint.bytes,
        "metrics": strict(checkpoint.metrics),
        "path": checkpoint.path,
        "attempt": checkpoint.attempt,
        "reason": checkpoint.reason,
        "pinned": checkpoint.pinned,
    }


def planned_json(planned: Planned) -> dict[str, Any]:
    """Return one line of a plan as ``restore --plan --json`` prints it."""
    return {
        "trial": planned.trial,
        "status": planned.status.value,
        "action": planned.action.value,
        "step": planned.step,
        "reason": planned.reason,
    }


def trials_table(trials: Sequence[Trial], objectives: Sequence[Objective], width: int) -> Table:
    """Return trials as a table: number, status, place among repeats if any, objectives, step, attempts, config.

    Where the config would be squeezed, attempts and groups are left out: they are in what a pipe gets, and in JSON. Why a
    trial failed, or was stopped, is for :func:`note_lines`.
    """
    repeated = any(trial.group is not None for trial in trials)
    header = _header(objectives, repeated=repeated)
    rows = [[*_cells(trial, objectives, repeated=repeated), config_words(trial)] for trial in trials]
    columns = [*range(len(header))]
    needed = [max(len(cells[column]) for cells in [header, *rows]) + 2 for column in columns]
    least = min(needed[-1], _CONFIG)
    for dispensable in ("attempts", "group"):
        if sum(needed[column] for column in columns[:-1]) + least > width and dispensable in header:
            columns.remove(header.index(dispensable))
    metrics = range(header.index("step") - len(objectives), header.index("step"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        if column in metrics:
            add_numbers(table, header[column], [cells[column] for cells in rows])
        elif column == columns[-1]:
            table.add_column("config", overflow="fold")
        else:
            table.add_column(header[column], justify="left" if header[column] == "status" else "right", no_wrap=True)
    for trial, cells in zip(trials, rows, strict=True):
        shown = [Text(cell) for cell in cells]
        shown[1].style = COLOURS.get(trial.status, "")
        table.add_row(*(shown[column] for column in columns))
    return table


_CONFIG = 30
"""Columns that a config needs to be readable."""


def note_lines(trials: Sequence[Trial]) -> Iterator[str]:
    """Yield why trials failed, or were stopped by a rule."""
    for trial in trials:
        if words := _note(trial):
            yield printable(f"trial {trial.number}: {words}")


def add_numbers(table: Table, name: str, cells: Sequence[str]) -> None:
    """Add the column of a metric: where it is narrow its name is folded, and a number is not."""
    width = min(max(map(len, cells), default=1), _NUMBER)
    table.add_column(Text(name), justify="right", overflow="fold", min_width=max(width, 1))


_NUMBER = len("-1.2346e-300")


def _note(trial: Trial) -> str:
    """Return why a trial failed, or was stopped by a rule, in one line; nothing for others."""
    if trial.error is not None and trial.status not in SCORED:
        return f"{trial.error.kind}: {trial.error.message.splitlines()[0] if trial.error.message else ''}"
    return trial.attempt.note if trial.status is TrialStatus.PRUNED else ""


def _header(objectives: Sequence[Objective], *, repeated: bool) -> list[str]:
    place = ["group", "repeat"] if repeated else []
    return ["trial", "status", *place, *(objective.name for objective in objectives), "step", "attempts", "config"]


def _cells(trial: Trial, objectives: Sequence[Objective], *, repeated: bool) -> list[str]:
    """Return a trial as the columns of a table, but for its config."""
    place = [str(group_of(trial)), str(trial.repeat)] if repeated else []
    return [
        str(trial.number),
        trial.status.value,
        *place,
        *(brief(trial.metrics.get(objective.name, "")) for objective in objectives),
        "" if trial.step is None else str(trial.step),
        str(trial.attempts),
    ]


def trial_lines(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Iterator[str]:
    """Yield trials as the lines of a plain table, one each: what a pipe gets, and a table that is too long to be drawn."""
    repeated = any(trial.group is not None for trial in trials)
    words = ("  ".join(filter(None, (config_words(trial), _note(trial)))) for trial in trials)
    rows = ([*_cells(trial, objectives, repeated=repeated), last] for trial, last in zip(trials, words, strict=True))
    return _lines([_header(objectives, repeated=repeated), *rows], left=(1,))


def _lines(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> Iterator[str]:
    """Yield rows with their columns aligned: those of ``left`` to the left, others to the right, the last one as it is."""
    rows = [[cell if cell.isprintable() else printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *cells, words in rows:
        aligned = zip(cells, widths, strict=False)  # the last column is not among the cells
        padded = [cell.ljust(width) if place in left else cell.rjust(width) for place, (cell, width) in enumerate(aligned)]
        yield f"{'  '.join(padded)}  {words}".rstrip()


def plan_table(plan: Sequence[Planned]) -> Table:
    """Return a restore's plan as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", justify="right")
    table.add_column("status")
    table.add_column("action")
    table.add_column("from step", justify="right")
    losing = any(planned.lost for planned in plan)
    if losing:
        table.add_column("lost steps", justify="right")
    table.add_column("reason", overflow="fold")
    for planned in plan:
        step = "" if planned.step is None else str(planned.step)
        lost = [str(planned.lost or "")] if losing else []
        table.add_row(str(planned.trial), planned.status.value, planned.action.value, step, *lost, escape(planned.reason))
    return table


_CHECKPOINT = ("trial", "attempt", "step", "size", "status")


def checkpoints_table(checkpoints: Sequence[Checkpoint], width: int) -> Table:
    """Return checkpoints as a table: trial, attempt, step, size, status, and the directory's name where that fits whole.

    The whole path would not fit: it is in what a pipe gets, and in JSON. What is wrong is for :func:`reason_lines`.
    """
    rows = [[*_checkpoint_cells(item), escape(item.path.rpartition("/")[2])] for item in checkpoints]
    header = [*_CHECKPOINT, "name"]
    columns = [*range(len(header))]
    needed = [max(len(cells[column]) for cells in [header, *rows]) + 2 for column in columns]
    for dispensable in ("name", "size"):  # trial, attempt and step tell checkpoints apart
        if sum(needed[column] for column in columns) - 2 > width:
            columns.remove(header.index(dispensable))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(header[column], justify="right" if column < 4 else "left", no_wrap=True)
    for item, cells in zip(checkpoints, rows, strict=True):
        cells[4] = f"[red]{cells[4]}[/]" if item.status == "corrupt" else cells[4]
        table.add_row(*(cells[column] for column in columns))
    return table


def _checkpoint_cells(item: Checkpoint) -> list[str]:
    words = [item.status.value, *(["pinned"] if item.pinned else []), *(["lent"] if item.lent else [])]
    status = ", ".join(words)
    return [str(item.trial), str(item.attempt), str(item.step), size(item.bytes), status]


def checkpoint_lines(checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    """Yield checkpoints as the lines of a plain table; see :func:`trial_lines`."""
    return _lines([[*_CHECKPOINT, "path"], *([*_checkpoint_cells(item), item.path] for item in checkpoints)], left=(4,))


def reason_lines(checkpoints: Sequence[Checkpoint], place: object, *, trials: bool = True) -> Iterator[str]:
    """Yield what is wrong with each corrupt checkpoint, with paths relative to ``place``, where all of them lie."""
    for item in checkpoints:
        if item.status == "corrupt":
            whose = f"trial {item.trial} step {item.step}" if trials else f"step {item.step}"
            yield printable(f"{whose}: {item.reason.replace(f'{place}/', '')}")


def leftover_lines(leftovers: Sequence[Leftover]) -> Iterator[str]:
    """Yield what a collection of garbage removed: size, why, path."""
    return _lines([[size(item.bytes), item.why, item.path] for item in leftovers], left=(1,))


def size(count: int) -> str:
    """Return a number of bytes in the greatest unit of which there is at least one: 1.5 MiB."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def plan_words(plan: Sequence[Planned]) -> str:
    """Say in one line what a plan does: how many trials are kept, resumed from where, restarted, left out."""
    words = []
    for action in Action:
        chosen = [planned for planned in plan if planned.action is action]
        if not chosen:
            continue
        text = f"{len(chosen)} {VERBS[action]}"
        if action is Action.RESUME:
            text += " (" + ", ".join(_from(planned) for planned in chosen[:8]) + (", ..." if len(chosen) > 8 else "") + ")"
        words.append(text)
    return ", ".join(words) or "no trial yet"


VERBS = {
    Action.KEEP: "kept",
    Action.ADOPT: "adopted",
    Action.RESUME: "resumed",
    Action.RESTART: "restarted",
    Action.RUN: "started",
    Action.SKIP: "left out",
}


def _from(planned: Planned) -> str:
    start = "from the beginning" if planned.step is None else f"after step {planned.step}"
    return f"trial {planned.trial} {start}"
