"""Hosts on one machine: each has a network, a name, process numbers and folders of its own, and a cable that can be pulled.

A host is a set of Linux namespaces that one process holds. It ends with the process that made it, however that one ends, and
with it every process of the host, its folders and its cable: nothing is left to be cleaned up.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
PATIENCE = 300.0
"""Seconds after which something that should happen counts as not happening."""
HOME, WORK = "/tmp/home", "/tmp/work"
"""Folders that every host has for itself."""


@cache
def missing() -> str | None:
    """Return what is missing for hosts on this machine, or None."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"the program {program} is missing (packages iproute2 and util-linux)"
    words = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "ip", "link"]
    done = subprocess.run(
        [*words, "add", "hf-probe", "type", "veth", "peer", "name", "hf-probed"], capture_output=True, text=True
    )
    if done.returncode != 0:
        return f"the right to make network namespaces and virtual cables is missing: {done.stderr.strip()[-200:]}"
    return None


def wanted() -> None:
    """Skip a test where hosts cannot be made, with what is missing."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


def _run(*words: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr}"
    return done.stdout


@dataclass
class Process:
    """A process of a host. What is seen of it here is ``nsenter``, which waits for it and ends as it does."""

    entered: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Return its number outside of the host."""
        return _child(self.entered.pid)

    def poll(self) -> int | None:
        return self.entered.poll()

    def signal(self, number: int) -> None:
        """Send it a signal, and to nothing that it started."""
        os.kill(self.pid, number)

    def kill(self) -> int:
        """End it and what it started in its group by SIGKILL."""
        with suppress(ProcessLookupError):
            os.killpg(self.entered.pid, signal.SIGKILL)
        return self.entered.wait()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for its end, and return its exit code: negative when a signal ended it."""
        try:
            return self.entered.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds:g} s:\n{self.output}") from None

    def until(self, text: str, seconds: float = PATIENCE) -> None:
        """Wait until it has said something."""
        until(lambda: text in self.output, self, seconds=seconds)


def until(condition: Callable[[], object], *alive: Process, seconds: float = PATIENCE) -> None:
    """Wait for a condition; AssertionError when it does not come about, or a process ends that should not."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in alive:
            code = process.poll()
            assert code is None or condition(), f"it ended, with {code}:\n{process.output}"
        said = "\n".join(process.output for process in alive)
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain:\n{said}"
        time.sleep(0.02)


def _child(pid: int) -> int:
    """Return the only child of a process, once it is there."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.005)
    raise AssertionError(f"process {pid} has no child")


class Namespaces:
    """Namespaces that a process of ours holds until it or we are gone."""

    def __init__(self, *command: object, kinds: Sequence[str]) -> None:
        self.flags = [f"--{kind}" for kind in kinds]
        more = ["--fork", "--kill-child=SIGKILL"] if "pid" in kinds else []
        words = ["unshare", *self.flags, *more, *map(str, command)]
        self.holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self.holder.stdout is not None
        line = self.holder.stdout.readline()
        assert line == b"ready\n", f"{words[0]} ended with {self.holder.wait()}"
        self.pid = _child(self.holder.pid) if "pid" in kinds else self.holder.pid

    def enter(self, *words: object) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *self.flags, "--", *map(str, words)]

    def ip(self, *words: object) -> str:
        return _run("nsenter", f"--target={self.pid}", "--net", "ip", *words)

    def close(self) -> None:
        """End every process in them."""
        self.holder.communicate(timeout=PATIENCE)


@dataclass
class Host:
    """One host of a network."""

    name: str
    address: str
    net: Network
    inner: Namespaces
    port: str
    """its end of the cable at the switch"""
    environment: dict[str, str]
    processes: list[Process] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """The host's working folder, as it is reached from here."""
        return Path(f"/proc/{self.inner.pid}/root{WORK}")

    def run(self, *command: object, environment: Mapping[str, str] | None = None) -> Process:
        """Start a process in the host's working folder."""
        log = self.net.folder / f"{self.name}-{len(self.processes)}.txt"
        words = self.inner.enter("sh", "-c", 'cd "$0" && exec "$@"', WORK, *command)
        with log.open("wb") as stream:
            entered = subprocess.Popen(
                words,
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(Process(entered, log))
        return self.processes[-1]

    def outer(self, pid: int) -> int | None:
        """Return the number outside of the host of a process that has the number ``pid`` there; None when there is none."""
        mine = os.readlink(f"/proc/{self.inner.pid}/ns/pid")
        for name in os.listdir("/proc"):
            if name.isdigit():
                with suppress(OSError):
                    lines = Path(f"/proc/{name}/status").read_text().splitlines()
                    numbers = next(line for line in lines if line.startswith("NSpid:")).split()
                    if numbers[-1] == str(pid) and os.readlink(f"/proc/{name}/ns/pid") == mine:
                        return int(name)
        return None

    def cut(self) -> None:
        """Pull the cable: nothing comes through, and no connection is told."""
        self.net.switch.ip("link", "set", self.port, "down")

    def join(self) -> None:
        """Put the cable back."""
        self.net.switch.ip("link", "set", self.port, "up")

    def close(self) -> None:
        """Turn the host off."""
        self.inner.close()
        for process in self.processes:
            process.kill()


class Network:
    """A switch, the machine itself as one that offers services, and hosts by their names."""

    def __init__(self, folder: Path, names: Sequence[str], environment: Mapping[str, str]) -> None:
        """Make the hosts ``names``, whose processes get ``environment`` and folders of their own."""
        self.folder = folder
        self.uplink = f"hf{secrets.token_hex(5)}"  # no other's: one that was left goes away only after a while
        self.hosts: dict[str, Host] = {}
        self._relays = Relays()
        ready = "import os, sys; sys.stdout.write('ready\\n'); sys.stdout.flush(); os.read(0, 1)"
        self.switch = Namespaces(sys.executable, "-S", "-E", "-c", ready, kinds=["net"])
        try:
            self.switch.ip("link", "add", "bridge", "type", "bridge")
            self.switch.ip("link", "set", "bridge", "up")
            self.address = self._plug_in()
            first = ipaddress.ip_address(self.address) + 1
            addresses = {name: str(first + place) for place, name in enumerate(names)}
            lines = [f"{address} {name}" for name, address in [("services", self.address), *addresses.items()]]
            hosts = "\n".join(["127.0.0.1 localhost", *lines, ""])
            for name, address in addresses.items():
                self.hosts[name] = self._host(name, address, hosts, environment)
        except BaseException:
            self.close()
            raise

    def _plug_in(self) -> str:
        """Connect the machine's own network to the switch by an address of a free range, and return it."""
        with open(Path(tempfile.gettempdir()) / "holdfast-hosts.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            taken = [route["dst"] for route in json.loads(_run("ip", "-json", "route"))]
            networks = [ipaddress.ip_network(dst, strict=False) for dst in taken if dst != "default"]
            ranges = (ipaddress.ip_network(f"10.{212 + place // 256}.{place % 256}.0/24") for place in range(1024))
            free = next(chosen for chosen in ranges if not any(chosen.overlaps(other) for other in networks))
            address = str(free[1])
            _run("ip", "link", "add", self.uplink, "type", "veth", "peer", "name", "uplink", "netns", self.switch.pid)
            _run("ip", "address", "add", f"{address}/24", "dev", self.uplink)
            _run("ip", "link", "set", self.uplink, "up")
        self.switch.ip("link", "set", "uplink", "master", "bridge", "up")
        return address

    def _host(self, name: str, address: str, hosts: str, environment: Mapping[str, str]) -> Host:
        kept = sorted({sys.prefix, sys.base_prefix, str(REPOSITORY)})
        command = (sys.executable, "-S", "-E", HERE / "host_init.py", name, hosts, *kept)
        inner = Namespaces(*command, kinds=["net", "uts", "ipc", "pid", "mount"])
        port = f"to-{name}"
        self.switch.ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", inner.pid)
        self.switch.ip("link", "set", port, "master", "bridge", "up")
        inner.ip("link", "set", "lo", "up")
        inner.ip("address", "add", f"{address}/24", "dev", "eth0")
        inner.ip("link", "set", "eth0", "up")
        own = {"HOME": HOME, "PREFECT_HOME": f"{HOME}/.prefect", "XDG_CACHE_HOME": f"{HOME}/.cache", "TMPDIR": "/tmp"}
        kept_words = {word: text for word, text in environment.items() if not word.startswith("XDG_")}
        return Host(name, address, self, inner, port, {**kept_words, **own})

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def offer(self, port: int) -> int:
        """Offer the hosts what listens at a port of the loopback interface here, at the same port of our address."""
        return self._relays.add(self.address, port)

    def close(self) -> None:
        """Turn everything off."""
        for host in self.hosts.values():
            host.close()
        self.switch.close()
        self._relays.close()


class Relays:
    """Carries connections from one address to another, in a thread: the tests' servers listen on the loopback interface."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def add(self, address: str, port: int) -> int:
        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await reader.read(1 << 16):
                    writer.write(data)
                    await writer.drain()
            with suppress(OSError, RuntimeError):
                writer.close()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                writer.close()
                return
            with suppress(asyncio.CancelledError):
                await asyncio.gather(carry(reader, other_writer), carry(other_reader, writer))

        async def serve() -> None:
            await asyncio.start_server(accept, address, port)

        asyncio.run_coroutine_threadsafe(serve(), self._loop).result(PATIENCE)
        return port

    def close(self) -> None:
        async def end() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@contextmanager
def network(folder: Path, names: Sequence[str], environment: Mapping[str, str]) -> Iterator[Network]:
    """Have a network of hosts; the test is skipped where none can be made."""
    wanted()
    made = Network(folder, names, environment)
    try:
        yield made
    finally:
        made.close()
