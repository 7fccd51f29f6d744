"""Processes: which one a number means, whether it still runs, and how to end it with everything in its session."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

from holdfast.core.errors import Infrastructure

MARKER = "HOLDFAST_WORKER"
"""The environment variable that every worker, and what it starts, carries."""

LINUX = sys.platform == "linux"
GONE = "ZX"  # states of a process that has ended and is not reaped


@functools.cache
def _boot() -> str:
    """Return what makes process numbers of this system, since it was started, comparable."""
    if not LINUX:
        return "-"
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


@functools.cache
def same_host() -> str:
    """Return the identity of this host: processes recorded under an equal one can be looked up by their number."""
    return f"{socket.gethostname()}/{_boot()}"


def identity(pid: int) -> str | None:
    """Return what tells process ``pid`` apart from a later one with its number, or None when there is none.

    A process that has ended counts as there until it is reaped.
    """
    if LINUX:
        fields = _stat(pid)
        return f"{_boot()}/{fields[19]}" if fields else None
    import psutil

    try:
        return f"{_boot()}/{psutil.Process(pid).create_time():.3f}"
    except psutil.Error:
        return None


def is_alive(host: str, pid: int, started: str) -> bool | None:
    """Tell whether the recorded process still runs; None when it is another host's, which cannot be known."""
    if host != same_host():
        return None
    return identity(pid) == started and not _ended(pid)


def is_suspended(host: str, pid: int, started: str) -> bool:
    """Tell whether the recorded process is one of this host that was stopped (SIGSTOP, Ctrl-Z, a debugger)."""
    if host != same_host() or identity(pid) != started:
        return False
    if LINUX:
        fields = _stat(pid)
        return bool(fields) and fields[0] in "Tt"
    import psutil

    try:
        return bool(psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    except psutil.Error:
        return False


def kill(pid: int, started: str, *, timeout: float = 10.0) -> None:
    """End the recorded process alone and wait until it is gone; nothing is done when its number means another one now.

    Infrastructure when it does not end within ``timeout``, or is another user's.
    """
    handle = os.pidfd_open(pid) if LINUX and identity(pid) is not None else None
    try:
        if identity(pid) != started:
            return
        if handle is None:
            os.kill(pid, signal.SIGKILL)
        else:  # whoever gets the number meanwhile is not meant
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return
    except PermissionError:
        raise Infrastructure(f"process {pid} is another user's; end it, then try again") from None
    finally:
        if handle is not None:
            os.close(handle)
    deadline = time.monotonic() + timeout
    while identity(pid) == started and not _ended(pid):
        if time.monotonic() > deadline:
            raise Infrastructure(f"process {pid} does not end; end it, then try again")
        time.sleep(0.005)


def kill_group(pid: int, started: str, *, timeout: float = 10.0) -> bool:
    """End the recorded worker and what is left of its session, and wait until they are gone.

    Does nothing, and returns False, unless it is that very process, or one that it left behind: a member of its session
    that carries the workers' environment variable. Infrastructure when something does not end within ``timeout``.
    """
    if pid in (os.getpid(), os.getsid(0)):
        return False
    now = identity(pid)
    if now == started:
        ended = end_session(pid, timeout=timeout)
    elif now is None and started.rpartition("/")[0] == _boot():
        ended = end_session(pid, timeout=timeout, marked=True)
    else:
        return False
    return ended


def end_session(pid: int, *, timeout: float = 10.0, marked: bool = False) -> bool:
    """Kill every process of session ``pid``, with ``marked`` only ours; return whether there was one.

    The caller makes sure that the number means the session it thinks of.
    """
    deadline = time.monotonic() + timeout
    found = False
    if not marked:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
            found = True
    while members := [member for member in _session(pid) if not marked or _is_marked(member)]:
        found = True
        for member in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise Infrastructure(f"processes {members} of worker {pid} do not end; end them, then try again")
        time.sleep(0.005)
    return found


def _session(pid: int) -> Iterator[int]:
    """Yield the running processes of session ``pid``."""
    for number in _numbers():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(number) == pid and not _ended(number):
                yield number


def _numbers() -> list[int]:
    if LINUX:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    import psutil

    return list(psutil.pids())


def _ended(pid: int) -> bool:
    if LINUX:
        fields = _stat(pid)
        return not fields or fields[0] in GONE
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def _is_marked(pid: int) -> bool:
    try:
        if LINUX:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return any(entry.startswith(MARKER.encode() + b"=") for entry in file.read().split(b"\0"))
        import psutil

        return MARKER in psutil.Process(pid).environ()
    except Exception:  # noqa: BLE001  # gone, or another user's: then it is not ours
        return False


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()  # the name before it may hold anything
    except (FileNotFoundError, ProcessLookupError):
        return []
