"""The command that heals: watch."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

from holdfast.cli.common import Commands, command, database_option, print_json, storage_option, storage_options

if TYPE_CHECKING:
    from holdfast.flows.watching import Watch


def add_watching(commands: Commands) -> None:
    watch = command(commands, "watch", _watch, "restore searches that were cut off, each by its own section recovery")
    watch.add_argument("storages", metavar="STORAGE", nargs="*", default=["./runs"])
    watch.add_argument("--dry-run", action="store_true", help="only say what would be done; nothing is written")
    watch.add_argument(
        "--deployment",
        metavar="NAME",
        help="let a deployment of the flow restore do it, such as restore/gpu; else it is done here",
    )
    watch.add_argument("--at-once", type=int, default=2, metavar="N", help="restores that run here side by side at most (2)")
    watch.add_argument("--every", type=_seconds, metavar="SECONDS", help="look again and again until SIGTERM or SIGINT")
    database_option(watch)
    storage_option(watch)


def _seconds(text: str) -> float:
    """Read a number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return found


class _Ended(BaseException):
    """A signal that ends the watch."""

    def __init__(self, number: int) -> None:
        self.number = number


def _watch(options: argparse.Namespace) -> int:
    from holdfast.flows.abandoned import Places
    from holdfast.flows.launching import Children, Deployment, Launcher
    from holdfast.flows.watching import Surroundings, Watch
    from holdfast.settings import hush_prefect

    hush_prefect()
    places = Places(storages=tuple(options.storages), database=options.database, options=storage_options(options))
    launcher: Launcher = Deployment(options.deployment, places) if options.deployment else Children(places)
    around = Surroundings(say=_say, warn=_say, close_runs=_close_runs)
    watch = Watch(places, launcher, around, at_once=options.at_once, dry_run=options.dry_run)
    before = {number: signal.signal(number, _raise) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        watch.look()
        if options.every is None:
            watch.finish()
            _show(options, watch)
            return watch.exit_code()
        _again_and_again(options, watch)
    except _Ended as ended:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # ending is bounded
        watch.end()
        return 128 + ended.number
    except BaseException:
        watch.end()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _again_and_again(options: argparse.Namespace, watch: Watch) -> None:
    """Look every so many seconds, and go on with restores meanwhile; what was found is shown when it has changed."""
    clock = threading.Event()
    shown = ""
    while True:
        now = "\n".join(watch.lines())
        if now != shown:
            _show(options, watch)
            shown = now
        waited = 0.0
        while waited < options.every:
            part = min(options.every - waited, 0.5 if watch.is_busy else options.every)
            clock.wait(part)
            waited += part
            watch.go_on()
        watch.look()


def _raise(number: int, frame: FrameType | None) -> None:
    raise _Ended(number)


def _say(text: str) -> None:
    print(f"holdfast: {text}", file=sys.stderr, flush=True)


def _close_runs(examined: object) -> None:
    from holdfast.flows.serving import adopt
    from holdfast.settings import names_api

    if adopt() or names_api():
        from holdfast.flows import watched_runs

        watched_runs.close_runs(examined)  # type: ignore[arg-type]  # typed there; this module imports late


def _show(options: argparse.Namespace, watch: Watch) -> None:
    if options.json:
        print_json(watch.summary())
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        sys.stdout.writelines(f"{line}\n" for line in watch.lines(width))
    sys.stdout.flush()
