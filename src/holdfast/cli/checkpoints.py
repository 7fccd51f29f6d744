"""The commands that look after checkpoints: checkpoints, pin, gc."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from holdfast.cli.common import (
    SHOWN,
    Commands,
    command,
    database_option,
    fail,
    limit_options,
    limited,
    open_experiment,
    print_json,
    storage_option,
    storage_options,
    terminal,
)
from holdfast.core.checkpoint import Checkpoint, CheckpointStatus
from holdfast.core.errors import CheckpointNotFound, ExperimentNotFound, HoldfastError, InvalidInput, SpecError

if TYPE_CHECKING:
    from holdfast.upkeep import Collected, Verified


def add_checkpoints(commands: Commands) -> None:
    checkpoints = command(
        commands, "checkpoints", _checkpoints, "list the checkpoints of an experiment, or of a CheckpointStore"
    )
    checkpoints.add_argument(
        "--verify",
        action="store_true",
        help="read every file; bad ones are marked corrupt (exit code 1), good ones valid again",
    )
    checkpoints.add_argument("--trial", type=int, metavar="N", help="of one trial only")
    limit_options(checkpoints, "checkpoint")
    pin = command(commands, "pin", _pin, "keep a checkpoint whatever the rules of retention say", as_json=False)
    pin.add_argument("--trial", type=int, required=True, metavar="N")
    pin.add_argument("--step", type=int, required=True, metavar="S")
    pin.add_argument("--attempt", type=int, metavar="A", help="the one that this attempt saved, not the one that counts")
    pin.add_argument("--remove", action="store_true", help="leave it to the rules again")
    gc = command(commands, "gc", _gc, "remove what dead attempts left; foreign files stay")
    gc.add_argument("--dry-run", action="store_true", help="only print what would go; nothing is written")
    gc.add_argument("--corrupt", action="store_true", help="checkpoints that were found bad, too")
    for parser in (checkpoints, pin, gc):
        parser.add_argument("path", metavar="PATH")
        database_option(parser)
        storage_option(parser)


def _checkpoints(options: argparse.Namespace) -> int:
    from holdfast.upkeep import verify

    try:
        experiment = open_experiment(options)
    except ExperimentNotFound:
        if (stored := _of_store(options)) is None:
            raise
        return stored
    with experiment:
        rows = [item for item in experiment.checkpoints() if item.status is not CheckpointStatus.DELETED]
        if options.trial is not None:
            experiment.trial(options.trial)  # says which there are
            rows = [item for item in rows if item.trial == options.trial]
        note = ""
        if options.verify:
            found = verify(experiment._opened, rows, _progress(len(rows), "verified"))  # the same package
            note = _mark(options, found)
            rows = _marked(rows, found)
        return _show(options, rows, experiment.path, note)


def _of_store(options: argparse.Namespace) -> int | None:
    """List, and verify if asked, a store of its own; None when there is none."""
    from holdfast import references
    from holdfast.storage.checkpoints.store import CheckpointStore

    place, choices = references.place(options.path, storage_options(options))
    store = CheckpointStore(place, storage_options=choices)
    if not store.is_there():
        return None
    if options.trial is not None:
        raise SpecError(f"{options.path} is a store of its own: it has no trials; leave --trial out")
    if options.verify:
        store.verify()
    return _show(options, store.rows(), store.path, trials=False)


def _marked(rows: Sequence[Checkpoint], found: Verified) -> list[Checkpoint]:
    """Return the rows as they are once what was found is marked."""
    reasons = {item.id: reason for item, reason in found.bad} | {item.id: "" for item in found.good}
    return [
        replace(item, status=_STATUS[bool(reasons[item.id])], reason=reasons[item.id]) if item.id in reasons else item
        for item in rows
    ]


_STATUS = {False: CheckpointStatus.VALID, True: CheckpointStatus.CORRUPT}


def _mark(options: argparse.Namespace, found: Verified) -> str:
    """Mark what was found, bad ones so that nothing continues from them, unless somebody drives or nothing can be written.

    Return words about that.
    """
    from holdfast.storage.database.requests import acquit, quarantine
    from holdfast.upkeep import driven

    if not (found.bad or found.good):
        return ""
    count = len(found.good)
    why = ""
    try:
        with open_experiment(options, readonly=False) as experiment:
            if driven(experiment._opened):  # the same package
                why = "somebody drives the experiment, and looks at what it loads itself"
            else:
                database, identity = experiment._writable(), experiment._opened.record.id
                if found.bad:
                    quarantine(database, identity, found.bad)
                if found.good:
                    acquit(database, identity, found.good)
    except (HoldfastError, OSError) as error:
        why = str(error)
    words = []
    if count and why:
        words.append(f"{count} that {'is' if count == 1 else 'are'} marked corrupt {'is' if count == 1 else 'are'} good")
    elif count:
        words.append(
            f"{count} that {'was' if count == 1 else 'were'} marked corrupt "
            f"{'is good, and counts' if count == 1 else 'are good, and count'} again"
        )
    if found.bad and not why:
        words.append("bad ones are marked corrupt: nothing continues from them, and `holdfast gc --corrupt` removes them")
    if why:
        words.append(f"{'bad ones are not' if found.bad else 'nothing is'} marked: {why}")
    return "; ".join(words)


def _show(
    options: argparse.Namespace, rows: Sequence[Checkpoint], place: object, note: str = "", *, trials: bool = True
) -> int:
    """Print checkpoints and what is wrong with them, and after ``--verify`` the verdict; return the exit code."""
    from holdfast.report.tables import reason_lines

    shown = _print_checkpoints(options, rows)
    if not options.json:
        sys.stdout.writelines(f"{line}\n" for line in reason_lines(rows if options.verify else shown, place, trials=trials))
    if not options.verify:
        return 0
    good = sum(item.status is not CheckpointStatus.CORRUPT for item in rows)
    if not options.json:
        print(f"{good} of {len(rows)} are good{note and f'; {note}'}")
    elif note:
        print(f"holdfast: {note}", file=sys.stderr)
    return 0 if good == len(rows) else 1


def _print_checkpoints(options: argparse.Namespace, rows: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
    """Print the checkpoints that the options ask for, and return them."""
    from holdfast.report.tables import checkpoint_json, checkpoint_lines, checkpoints_table

    shown, left_out, drawn = limited(options, rows)
    if options.json:
        print_json([checkpoint_json(item) for item in shown])
    elif drawn:
        console = terminal()
        console.print(checkpoints_table(shown, console.width))
    else:
        sys.stdout.writelines(f"{line}\n" for line in checkpoint_lines(shown))
    if left_out and not options.json:
        print(f"{left_out} earlier checkpoints are not shown: --all shows every one, --limit N the last N", file=sys.stderr)
    return shown


def _progress(total: int, what: str, clock: Callable[[], float] = time.monotonic) -> Callable[[int], None]:
    """Return what says on a terminal's stderr, from the first second on, how far something has come."""
    began = last = clock()

    def show(done: int) -> None:
        nonlocal last
        now = clock()
        if not sys.stderr.isatty() or now - began < 1:
            return
        if done == total or now - last >= 0.2:
            last = now
            end = "\r\x1b[K" if done == total else ""
            print(f"\r\x1b[K{done} of {total} {what}{end}", end="", file=sys.stderr, flush=True)

    return show


def _pin(options: argparse.Namespace) -> int:
    with open_experiment(options, readonly=False) as experiment:
        try:
            (experiment.unpin if options.remove else experiment.pin)(options.trial, options.step, options.attempt)
        except CheckpointNotFound as error:
            return fail(str(error), InvalidInput.exit_code)
    words = "is left to the rules of retention" if options.remove else "is pinned: it is kept until `holdfast pin --remove`"
    print(f"the checkpoint of trial {options.trial} at step {options.step} {words}")
    return 0


def _gc(options: argparse.Namespace) -> int:
    from holdfast.upkeep import collect

    with open_experiment(options, readonly=options.dry_run) as experiment:
        say = (lambda _: None) if options.json else lambda text: print(f"holdfast: {text}", file=sys.stderr)
        found = collect(experiment._opened, corrupt=options.corrupt, dry_run=options.dry_run, say=say)  # the same package
    if options.json:
        print_json(_collected_json(found))
    else:
        _print_collected(found)
    if found.left:
        return fail(f"{len(found.left)} could not be removed; see to their permissions, then try again", 4)
    return 1 if found.missing else 0


def _collected_json(found: Collected) -> dict[str, Any]:
    return {
        "dry_run": found.dry_run,
        "bytes": found.bytes,
        "removed": [vars(item) for item in found.removed],
        "left": [vars(item) for item in found.left],
        "missing": [
            {"trial": item.trial, "attempt": item.attempt, "step": item.step, "path": item.path, "reason": reason}
            for item, reason in found.missing
        ],
        "good": [{"trial": item.trial, "attempt": item.attempt, "step": item.step, "path": item.path} for item in found.good],
    }


def _print_collected(found: Collected) -> None:
    from holdfast.report.tables import leftover_lines, size

    shown = found.removed[:SHOWN] if sys.stdout.isatty() else found.removed
    sys.stdout.writelines(f"{line}\n" for line in leftover_lines(shown))
    if len(shown) < len(found.removed):
        print(f"and {len(found.removed) - len(shown)} more: --json names every one")
    for item, reason in found.missing:
        marked = "" if found.dry_run else "; it is marked corrupt"
        print(f"trial {item.trial} step {item.step}: {reason}: {item.path}{marked}")
    for item in found.good:
        again = "would count again" if found.dry_run else "counts again"
        print(f"trial {item.trial} step {item.step}: it is good, and {again}: {item.path}")
    verb = "would be removed" if found.dry_run else "removed"
    print(f"{len(found.removed)} {verb}, {size(found.bytes)}" if found.removed else "nothing is left to remove")
