"""``python -m holdfast.deployments.part MODULE ...``: run a module as a part of ``holdfast up``, which it does not outlive.

With ``--prepare A,B MODULE ...`` it imports A and B first, and begins when it is told so, by a byte on its standard input.
When ``up`` is gone, this process ends at once, and with it whatever it has started: the searches that a worker runs, too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import sys

from holdfast.deployments.processes import end_descendants
from holdfast.flows.server import guard


def main() -> None:
    """Run the module that the first argument names, with the others as its command line."""
    if sys.argv[1] == "--prepare" and not _prepare(sys.argv[2]):
        return
    guard(end_descendants)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's script does that to what it starts with &; a worker that is told to end tells itself so by SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    del sys.argv[0]
    module = sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _prepare(modules: str) -> bool:
    """Import modules, which takes long, and wait for the word; False when `up` is gone instead."""
    del sys.argv[1:3]
    for module in modules.split(","):
        with contextlib.suppress(ImportError):  # whoever needs it says so
            importlib.import_module(module)
    return bool(os.read(0, 1))


if __name__ == "__main__":
    main()
