"""Hosts of the tests are as far from each other as machines are, and leave nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import holdfast_environment
from support_hosts import PATIENCE, REPOSITORY, network, until, wanted

pytestmark = pytest.mark.timeout(900)  # it waits for several processes, each with patience

WHO = "from holdfast.tasks.workers.processes import same_host; import os; print(same_host(), os.listdir('/tmp/work'))"
CONNECT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=100) as there:
    for number in range(2):
        there.sendall(b"%d" % number)
        print("sent", number, there.recv(1).decode(), flush=True)
"""
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from support_hosts import Network
net = Network(Path(sys.argv[1]), ["one"], dict(os.environ))
process = net["one"].run("sleep", "1000")
print(process.pid, net.switch.pid, net["one"].inner.pid, net.uplink, flush=True)
assert Path("/sys/class/net", net.uplink).exists()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_hosts_share_nothing_and_a_pulled_cable_is_noticed_by_nobody(tmp_path: Path) -> None:
    with network(tmp_path, ["one", "two"], holdfast_environment()) as net, socket.socket() as listener:
        (net["one"].work / "mine").write_text("")
        said = [net[name].run(sys.executable, "-c", WHO) for name in ("one", "two")]
        assert [process.wait() for process in said] == [0, 0], [process.output for process in said]
        (one, files), (two, others) = (process.output.split(maxsplit=1) for process in said)
        assert one.startswith("one/")
        assert two.startswith("two/")
        assert one.split("/")[1:] != two.split("/")[1:]  # the kernel's identity is the same, the process numbers are not
        assert (files.strip(), others.strip()) == ("['mine']", "[]")

        listener.bind(("127.0.0.1", 0))
        listener.listen()
        got, go_on = threading.Semaphore(0), threading.Semaphore(0)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(1):
                    got.release()
                    go_on.acquire()
                    connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        port = net.offer(listener.getsockname()[1])
        process = net["two"].run(sys.executable, "-c", CONNECT, "services", port)
        assert got.acquire(timeout=PATIENCE), process.output
        net["two"].cut()
        go_on.release(2)  # the answer cannot arrive
        ping = net["one"].run(sys.executable, "-c", CONNECT.replace("timeout=100", "timeout=1"), net["two"].address, 9)
        assert ping.wait() == 1
        assert "sent" not in process.output
        net["two"].join()
        assert process.wait() == 0, process.output
        assert process.output.split() == ["sent", "0", "0", "sent", "1", "1"]


def test_nothing_survives_whoever_made_the_hosts(tmp_path: Path) -> None:
    wanted()
    path = [str(Path(__file__).parent), str(REPOSITORY / "tests")]
    words = [sys.executable, "-c", KILLED, str(tmp_path), *path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == -9, done.stderr
    *pids, link = done.stdout.split()
    assert len(pids) == 3
    until(lambda: not any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids))
    until(lambda: not Path(f"/sys/class/net/{link}").exists())
