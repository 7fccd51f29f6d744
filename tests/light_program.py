"""The command line, and whether it imported Prefect: what laboratories run where it must do without."""

from __future__ import annotations

import gc
import sys

from holdfast.cli import main as command_line


def main() -> None:
    """Run the command that the arguments name; the last line says whether Prefect was imported."""
    code = command_line(sys.argv[1:])
    gc.collect()  # what was not closed is closed, as at the end of an interpreter: a forked run ends without
    sys.stdout.flush()
    print("Prefect was imported:", "prefect" in sys.modules, flush=True)
    sys.exit(code)
