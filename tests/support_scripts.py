"""Processes that run Python code of a test: forked from one that has imported the program, but not Prefect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

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
        self.stdin.close()
        said = self.stdout.read()
        self.stdout.close()
        self.wait(timeout)
        return said, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.communicate()


def begin_script(code: str, *arguments: object, **environment: str) -> Any:
    """Start Python code as ``python -c`` does, with pipes to and from it, in this process's environment and folder.

    It is a process of its own, a child of the one that it is forked from; with HOLDFAST_TEST_FRESH a new interpreter.
    """
    words, given = [*map(str, arguments)], {**os.environ, **environment}
    if not WANTED:
        return subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env=given,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with open(theirs_in, "rb") as source, open(theirs_out, "wb") as output:
        process = light().start(words, folder=Path.cwd(), environment=given, output=output, source=source, code=code)
    return Script(process, open(ours_out, "w"), open(ours_in))


def run_script(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code to its end; its errors are part of its output."""
    script = begin_script(code, *arguments, **environment)
    said, _ = script.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess([code, *map(str, arguments)], script.returncode, said, said)
