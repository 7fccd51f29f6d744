"""A driver that was killed is dead, also before anybody has waited for its process."""

import os
import signal
import subprocess
import sys

from holdfast.holding import holder, liveness
from holdfast.tasks.workers import processes


def test_a_killed_process_that_nobody_has_waited_for_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other = {**holder(), "pid": process.pid, "started": processes.identity(process.pid)}
    assert liveness(other) is True
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays unreaped
    assert liveness(other) is False
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()


def test_a_process_of_another_host_cannot_be_judged():
    assert liveness({**holder(), "host": "elsewhere/boot"}) is None
    assert liveness(holder()) is True
