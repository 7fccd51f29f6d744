"""A process that outlives this one by a moment, to end what its workers started.

When this process is killed, the kernel ends its workers at once, too early for them to take along the subprocesses of
user code. A shell that reads the workers' numbers from a pipe needs one megabyte, and does it when the pipe closes.
"""

from __future__ import annotations

import contextlib
import subprocess

SCRIPT = """
trap '' TERM INT HUP
set -f
all=' '
while read -r line; do
    pid=${line#?}
    case $line in
        +*) all="$all$pid " ;;
        -*) case $all in *" $pid "*) all="${all%% $pid *} ${all#* $pid }" ;; esac ;;
    esac
done
for pid in $all; do kill -s KILL -- "-$pid"; done
"""


class Reaper:
    """Ends the process groups that were added and not removed, once this process is gone or calls :meth:`close`."""

    def __init__(self) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )

    def add(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def remove(self, pid: int) -> None:
        """Forget a process that is reaped: its number may soon be another's."""
        self._tell(f"-{pid}\n")

    def _tell(self, line: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # somebody killed it: then there is one safeguard less
            self._shell.stdin.write(line.encode())  # so short that writes of several threads do not mix

    def close(self) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(OSError):
            self._shell.stdin.close()
        self._shell.wait()
