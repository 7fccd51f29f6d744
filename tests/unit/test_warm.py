"""A program that is imported once and forked for every run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.tasks.workers import processes
from holdfast.testing.warm import AVAILABLE, Forked, Warm

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="forking a warm process needs Linux")

PROGRAM = """
import atexit, os, signal, sys, threading, time
IMPORTED = os.getpid()

def main():
    do = sys.argv[1]
    if do == "describe":
        print(sys.argv[1:], os.getcwd(), os.environ.get("GIVEN"), os.environ.get("EARLY"), os.getsid(0) == os.getpid())
        print(IMPORTED != os.getpid(), os.listdir("/proc/self/fd").__len__(), sys.stdin.read() == "", file=sys.stderr)
    elif do == "exit":
        return int(sys.argv[2])
    elif do == "words":
        sys.exit("no such thing")
    elif do == "raise":
        raise ValueError("no luck")
    elif do == "late":
        atexit.register(print, "at exit")
        print("main")
        threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
    elif do == "hang":
        print("hanging", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Warm]:
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    warm = Warm("program:main", environment={**os.environ, "PYTHONPATH": path, "EARLY": "yes"})
    yield warm
    warm.close()


def start(warm: Warm, folder: Path, *arguments: str, **environment: str) -> tuple[Forked, Path]:
    output = folder / f"{'-'.join(arguments)}.txt"
    with output.open("wb") as stream:
        return warm.start(arguments, folder=folder, environment=environment, output=stream), output


def test_a_run_is_what_a_shell_would_start(warm: Warm, tmp_path: Path) -> None:
    for _ in range(3):
        run, output = start(warm, tmp_path, "describe", "x", GIVEN="this")
        assert run.wait(60) == 0
        # its own folder, environment and session; the standard descriptors and the listing's own one
        assert sorted(output.read_text().splitlines()) == [
            "True 4 True",
            f"['describe', 'x'] {tmp_path} this None True",
        ]


def test_how_it_ends_is_told(warm: Warm, tmp_path: Path) -> None:
    """Several at once, waited for in another order than they end."""
    hanging, output = start(warm, tmp_path, "hang")
    assert hanging.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        hanging.wait(0.01)
    seven, _ = start(warm, tmp_path, "exit", "7")
    none, _ = start(warm, tmp_path, "nothing")
    words, said = start(warm, tmp_path, "words")
    failed, trace = start(warm, tmp_path, "raise")
    late, last = start(warm, tmp_path, "late")
    assert (late.wait(60), failed.wait(60), words.wait(60), none.wait(60), seven.wait(60)) == (0, 1, 1, 0, 7)
    assert said.read_text() == "no such thing\n"
    assert "ValueError: no luck" in trace.read_text()
    assert last.read_text().splitlines() == ["main", "thread", "at exit"]
    hanging.send_signal(signal.SIGKILL)
    assert hanging.wait(60) == -signal.SIGKILL == hanging.poll()
    hanging.send_signal(signal.SIGKILL)  # the number may be another one's by now: nothing is sent
    assert output.exists()


def test_runs_end_with_whoever_started_them(warm: Warm, tmp_path: Path) -> None:
    run, _ = start(warm, tmp_path, "hang")
    host, started = processes.same_host(), str(processes.identity(run.pid))
    assert processes.is_alive(host, run.pid, started)
    warm.close()
    deadline = time.monotonic() + 60
    while processes.is_alive(host, run.pid, started):  # killed, not waited for by us
        assert time.monotonic() < deadline
    with pytest.raises(ChildProcessError):
        run.wait()
    with pytest.raises(ChildProcessError):
        start(warm, tmp_path, "exit", "0")


def test_a_program_whose_import_starts_threads_is_not_forked(tmp_path: Path) -> None:
    (tmp_path / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\ndef main(): ...\n"
    )
    warm = Warm("threads:main", environment={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
    try:
        with pytest.raises(ChildProcessError):
            start(warm, tmp_path, "describe")
    finally:
        warm.close()
