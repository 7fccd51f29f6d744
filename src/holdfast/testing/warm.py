"""A program that is imported once and forked for every run: for tests that start it hundreds of times.

What is forked is a process that has imported the program and done nothing else: one thread, no open files but the standard
ones. Each run is a process of its own session and group, with its own arguments, environment, folder and output, in which the
program's own entry point runs to its end as if a shell had started it. Two things differ from a fresh process: modules were
imported under the environment of the first one, so only variables that no import reads may differ between runs; and runs of one
:class:`Warm` order sets alike, so whoever compares runs takes turns between two. For Linux.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn, Protocol

AVAILABLE = sys.platform == "linux"
WANTED = AVAILABLE and not os.environ.get("HOLDFAST_TEST_FRESH")
"""Whether tests may fork what they start."""
MESSAGE = 1 << 18
"""The most bytes of one request: arguments and environment."""


def environment() -> dict[str, str]:
    """Return the environment of this process."""
    return dict(os.environ)


class Process(Protocol):
    """What runs of a program have in common, forked ones and those of ``subprocess.Popen``."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


class Forked:
    """A run; used like a ``subprocess.Popen``."""

    def __init__(self, reports: socket.socket) -> None:
        self._reports = reports
        self._buffer = b""
        self.returncode: int | None = None
        self.pid = int(self._line(None))

    def _line(self, timeout: float | None) -> str:
        """Return the next line that is told of the run, or nothing when none comes in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reports], [], [], left)[0]:
                return ""
            data = self._reports.recv(64)
            if not data:
                raise ChildProcessError("the process that forks runs has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            line = self._line(timeout)
            if line:
                self.returncode = int(line)
                self._reports.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, -N for signal N, or None while it runs."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)


class Warm:
    """A process that has imported a program, such as ``holdfast.cli:main``, and forks a run of it on request.

    ``imports`` are modules that the program imports late. ``environment`` is the one in which they are imported. The first run
    waits for the imports. Safe for several threads.
    """

    def __init__(self, program: str, *, imports: Sequence[str] = (), environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE)
        self._sending = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "holdfast.testing.warm", str(theirs.fileno()), program, *imports],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )

    def start(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        output: IO[bytes],
        errors: IO[bytes] | None = None,
        source: IO[bytes] | None = None,
        code: str | None = None,
    ) -> Forked:
        """Start a run with its output in ``output``, errors included unless they have a place of their own.

        ChildProcessError when it cannot be forked. It reads ``source``, or nothing. ``code`` is run in place of the program, as
        ``python -c`` does.
        """
        mine, theirs = socket.socketpair()
        given = [theirs.fileno(), output.fileno(), (errors or output).fileno(), *([] if source is None else [source.fileno()])]
        request = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment), "code": code}
        with theirs:
            try:
                with self._sending:
                    socket.send_fds(self._control, [json.dumps(request).encode()], given)
            except OSError as error:
                raise ChildProcessError(f"the process that forks runs: {error}") from error
        return Forked(mine)

    def close(self) -> None:
        """End the process, and every run with it."""
        self._control.close()
        self._process.wait()


class _Forker:
    """The process's side: one thread that forks, waits for the ends of runs, and tells of them."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)
        self._runs: dict[int, tuple[int, socket.socket]] = {}
        """(process, where to tell of it) by the descriptor that says that it has ended"""

    def serve(self) -> dict[str, Any]:
        """Fork for every request; return it in the new process."""
        while True:
            for descriptor, _ in self._poller.poll():
                if descriptor in self._runs:
                    self._tell(descriptor)
                    continue
                message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE, 4)
                if not message:
                    self._end()
                request = json.loads(message)
                if self._fork(request, *descriptors):
                    return dict(request)

    def _fork(self, request: dict[str, Any], reports: int, *streams: int) -> bool:
        """Fork; tell whether this is the new process."""
        pid = os.fork()
        if not pid:
            _become(request, *streams)
            return True
        for descriptor in streams:
            os.close(descriptor)
        teller = socket.socket(fileno=reports)
        ended = os.pidfd_open(pid)
        self._runs[ended] = (pid, teller)
        self._poller.register(ended, select.POLLIN)
        _say(teller, pid)
        return False

    def _tell(self, descriptor: int) -> None:
        pid, teller = self._runs.pop(descriptor)
        self._poller.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        with teller:
            _say(teller, os.waitstatus_to_exitcode(status))

    def _end(self) -> NoReturn:
        for pid, _ in self._runs.values():  # not reaped yet, so the number is still its own
            with suppress(ProcessLookupError):  # it has not come to its session yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def _say(teller: socket.socket, number: int) -> None:
    try:
        teller.send(f"{number}\n".encode(), socket.MSG_NOSIGNAL)
    except OSError:
        return  # nobody waits for it any more


def _become(request: dict[str, Any], output: int, errors: int, source: int | None = None) -> None:
    """Turn the forked process into one as a shell would start it."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have had it ignored
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno() if source is None else source, 0)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), sys.stdin.encoding, sys.stdin.errors)
    sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()


def _stream(descriptor: int, like: Any) -> IO[str]:
    """Return a stream as the interpreter makes it: the one before takes a terminal for the file that it was made on."""
    return io.TextIOWrapper(
        open(descriptor, "wb", buffering=0 if like.write_through else -1, closefd=False),
        encoding=like.encoding,
        errors=like.errors,
        line_buffering=like.line_buffering or os.isatty(descriptor),
        write_through=like.write_through,
    )


def main() -> NoReturn:
    """Import the program that the arguments name, fork runs of it, and be one."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    module, _, function = sys.argv[2].partition(":")
    entry = getattr(importlib.import_module(module), function)
    for name in sys.argv[3:]:
        importlib.import_module(name)
    if threading.active_count() > 1:  # a fork has one of them only, and whatever the others had locked
        raise SystemExit(f"importing {sys.argv[2]} started threads: {threading.enumerate()}")
    script = Path(sys.executable).with_name(module.partition(".")[0])
    sys.path.insert(0, str(script.parent))  # as for a console script
    gc.collect()
    gc.freeze()  # a collection in a run would write to, and so copy, all that it shares
    request = _Forker(control).serve()
    if request["code"] is None:
        sys.argv = [str(script), *request["arguments"]]
        _run(entry)
    sys.argv = ["-c", *request["arguments"]]
    sys.path[0] = ""
    sys.modules["__main__"] = program = ModuleType("__main__")
    _run(lambda: exec(compile(request["code"], "<string>", "exec"), vars(program)))


def _run(entry: Callable[[], object]) -> NoReturn:
    """Call the entry point and end the process as the interpreter does, but for taking apart what it shares."""
    code: object = 1
    try:
        code = entry()
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001  # the interpreter's last word on it
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at the end of every program
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    main()
