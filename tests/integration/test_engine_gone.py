"""An engine that does not answer, or goes away while trials run: the search ends in order, and is restored without it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from support import PATIENCE, Lab
from support_runners import keep_log_here

pytestmark = pytest.mark.timeout(1800)

BIN = Path(sys.executable).parent
BYTES = 80 << 20
QUICK = {"HOLDFAST_GRACE_SECONDS": "5", "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "3"}


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody uses, each another one."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextmanager
def started(log: Path, *words: object, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of an engine; end it with all that it started."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=log.parent,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, and all that it started, at once."""
    if process.poll() is not None:
        return
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everybody:
        with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
            one.suspend()  # or one of them would end the others in its own way
    for one in everybody:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everybody[1:])


def said(log: Path, text: str) -> Callable[[], bool]:
    return lambda: text in log.read_text(errors="replace")


@contextmanager
def dask(lab: Lab) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Have a scheduler with two places for trials; give its address, and its process."""
    [port] = free_ports(1)
    address, log, other = f"tcp://127.0.0.1:{port}", lab.folder / "scheduler.txt", lab.folder / "worker.txt"
    words = ("--nworkers", 1, "--nthreads", 2, "--no-dashboard", "--memory-limit", 0)
    with started(log, BIN / "dask", "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard") as scheduler:
        lab.until(said(log, "Scheduler at:"))
        with started(other, BIN / "dask", "worker", address, *words):
            lab.until(said(other, "Registered to:"))
            yield address, scheduler


@contextmanager
def ray(lab: Lab) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Have a head with two places for trials; give the address for clients, and the process that started all of it."""
    port, clients = free_ports(2)
    log = lab.folder / "head.txt"
    words = ("--head", f"--port={port}", f"--ray-client-server-port={clients}", "--node-ip-address=127.0.0.1", "--num-cpus=2")
    more = ("--include-dashboard=false", f"--object-store-memory={BYTES}", "--disable-usage-stats", "--block")
    # A folder of its own: Ray notes there which cluster is the machine's. The paths of its sockets have to be short.
    with (
        tempfile.TemporaryDirectory(prefix="hf-ray-", ignore_cleanup_errors=True) as folder,
        started(log, BIN / "ray", "start", *words, *more, RAY_TMPDIR=folder) as head,
    ):
        lab.until(said(log, "Ray runtime started"))
        yield f"ray://127.0.0.1:{clients}", head


ENGINES = [
    pytest.param(
        "dask",
        dask,
        marks=[pytest.mark.xdist_group("dask"), pytest.mark.skipif(find_spec("distributed") is None, reason="no distributed")],
    ),
    pytest.param(
        "ray", ray, marks=[pytest.mark.xdist_group("ray"), pytest.mark.skipif(find_spec("ray") is None, reason="no ray")]
    ),
]


@pytest.mark.parametrize(("runner", "cluster"), ENGINES)
def test_an_engine_that_goes_away_interrupts_the_search_and_is_not_needed_for_its_restore(
    lab: Lab, runner: str, cluster: Callable[[Lab], Iterator[tuple[str, subprocess.Popen[bytes]]]]
) -> None:
    keep_log_here(lab)
    search = {"num_trials": 4, "max_concurrent": 3, "seed": 7}  # the engine has two places: the third trial waits there
    held = [lab.order("hold", number, 1) for number in (0, 1)]
    with cluster(lab) as (address, engine):  # type: ignore[attr-defined]  # it is a context manager
        spec = lab.spec(search=search, execution={"runner": runner, "address": address})
        run = lab.start("run", spec, **QUICK)
        lab.until_logged("hold", 0, 1, run)
        lab.until_logged("hold", 1, 1, run)
        lab.until(lambda: len(lab.statuses()) == 3, run)
        kill(engine)
        ended = run.wait(2 * PATIENCE)
    assert ended.code == 4, ended.output
    assert f"at {address} is gone" in ended.output, ended.output
    assert "Traceback" not in ended.output, ended.output
    shown = lab.json("show", lab.path())
    assert "is gone" in shown["ended"], shown
    for order in held:
        order.unlink()
    told = ("--set", "execution.runner=threads", "--set", "execution.address=null")
    restored = lab.run("restore", lab.path(), *told)
    assert lab.statuses() == ["COMPLETED"] * 4, restored.output
    done = [entry.trial for entry in lab.log() if entry.event == "done"]
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("runner", [pytest.param("dask", marks=ENGINES[0].marks), pytest.param("ray", marks=ENGINES[1].marks)])
def test_sigterm_while_an_engine_is_being_reached_ends_the_search_at_once(lab: Lab, runner: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        scheme = {"dask": "tcp", "ray": "ray"}[runner]
        spec = lab.spec(execution={"runner": runner, "address": f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"})
        run = lab.start("run", spec)
        connection, _ = silent.accept()  # it is asked, and does not answer
        with connection:
            begun = time.monotonic()
            run.signal(signal.SIGTERM)
            ended = run.wait()
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert time.monotonic() - begun < PATIENCE
    shown = lab.json("show", lab.path())
    assert shown["ended"] == "interrupted: SIGTERM", shown
