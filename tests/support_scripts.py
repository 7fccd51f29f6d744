"""Processes that run Python code of a test: forked from one that has imported the program, but not Prefect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from support import light

from holdfast.testing.runs import PATIENCE
from holdfast.testing.warm import WANTED, Process

COMMAND = "import sys\nfrom holdfast.cli import main\nsys.exit(main())"
"""Runs ``holdfast``."""


@dataclass
class Script:
    """A process; used like a ``subprocess.Popen`` with pipes, whose errors are part of its output."""

    process: Process
    stdin: IO[str]
    stdout: IO[str]
    """its output, or its errors alone when the output goes to a terminal"""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    def poll(self) -> int | None:
        return self.process.poll()

    def wait(self, timeout: float = PATIENCE) -> int:
        return self.process.wait(timeout)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Give it no more, and return the rest of its output, and no errors."""
        if self.stdout.closed:
            return "", ""
        self.stdin.close()
        said = self.stdout.read()
        self.stdout.close()
        self.wait(timeout)
        return said, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.communicate()


def begin_script(code: str, *arguments: object, terminal: int | None = None, **environment: str) -> Script:
    """Start Python code as ``python -c`` does, with pipes to and from it, in this process's environment and folder.

    What it prints goes to ``terminal``, a descriptor, when there is one. It is a process of its own, a child of the one that it
    is forked from; with HOLDFAST_TEST_FRESH a new interpreter.
    """
    words, given = [*map(str, arguments)], {**os.environ, **environment}
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with ExitStack() as stack:
        source, errors = stack.enter_context(open(theirs_in, "rb")), stack.enter_context(open(theirs_out, "wb"))
        output = errors if terminal is None else stack.enter_context(open(terminal, "wb", closefd=False))
        process: Process
        if WANTED:
            streams = {"output": output, "errors": errors, "source": source}
            process = light().start(words, folder=Path.cwd(), environment=given, code=code, **streams)
        else:
            command = [sys.executable, "-c", code, *words]
            process = subprocess.Popen(command, env=given, stdin=source, stdout=output, stderr=errors)
    return Script(process, open(ours_out, "w"), open(ours_in))


def run_script(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code to its end; its errors are part of its output."""
    script = begin_script(code, *arguments, **environment)
    said, _ = script.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess([code, *map(str, arguments)], script.returncode, said, said)
