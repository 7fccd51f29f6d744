"""The command line. Bad input is refused before Prefect is imported."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from holdfast.cli.checkpoints import add_checkpoints
from holdfast.cli.common import EXIT_CODES, fail
from holdfast.cli.databases import add_databases
from holdfast.cli.deploying import add_deploying
from holdfast.cli.forking import add_forking
from holdfast.cli.managing import add_managing
from holdfast.cli.queueing import add_queueing
from holdfast.cli.reading import add_reading
from holdfast.cli.receiving import add_receiving
from holdfast.cli.running import add_running
from holdfast.cli.serving import add_serving
from holdfast.cli.transferring import add_transferring
from holdfast.cli.watching import add_watching
from holdfast.core.errors import HoldfastError, Infrastructure
from holdfast.flows import blocks_here


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # in whatever encoding, no text ends a command
    try:
        _install_fault()
        blocks_here()
        return int(options.run(options))
    except HoldfastError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has gone: so do we
        return 0
    except OSError as error:
        return fail(f"{error.filename or 'storage'}: {error.strerror or error}", Infrastructure.exit_code)
    except Exception as error:
        code = _prefect_failure(error)
        if code is None:
            raise
        return fail(f"Prefect: {error}", code)


def _prefect_failure(error: Exception) -> int | None:
    """Return the exit code for what Prefect raises when its API cannot be used, or None when it is something else."""
    module = type(error).__module__.partition(".")[0]
    return Infrastructure.exit_code if module in ("prefect", "httpx", "httpcore", "websockets") else None


def _install_fault() -> None:
    from holdfast.settings import settings

    fault = settings().fault
    if fault:
        from holdfast.testing.faults import install

        install(fault)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="holdfast", description="Hyperparameter searches that survive anything.", epilog=EXIT_CODES
    )
    from holdfast import __version__

    parser.add_argument("--version", action="version", version=f"holdfast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_running(commands)
    add_reading(commands)
    add_checkpoints(commands)
    add_managing(commands)
    add_forking(commands)
    add_transferring(commands)
    add_databases(commands)
    add_queueing(commands)
    add_watching(commands)
    add_deploying(commands)
    add_receiving(commands)
    add_serving(commands)
    return parser
