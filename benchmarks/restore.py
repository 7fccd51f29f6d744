"""What a restore costs as a whole process, from start to exit, however many trials have finished; beside Ray Tune.

Each arm is ``python -m holdfast.cli restore PATH`` as a child, of an experiment of N finished trials (4 parameters, a report
and a final record of 2 metrics each) and one to resume: it was killed by SIGKILL right after its first checkpoint, and has one
step left. Database, journal and persisted results are there; a restore reads the results of unfinished trials only. The N
trials are written through the store's own API; the one to resume is a real one of a real search.

* *server*: with a Prefect server that runs already; *embedded*: without, so that the restore brings its own;
* *random* (compared with Ray: its default searcher is random), *tpe*: the engine, which has to know every finished trial;
* *nothing to do*: the same restore once more;
* *database lost*: the database is rebuilt from the path first.

With ``--ray PYTHON``, the Python of an environment with Ray Tune (``python -m venv DIR; DIR/bin/pip install 'ray[tune]'
pandas``), the same through ``Tuner.restore(path, trainable, resume_errored=True).fit()``: see ``restore_ray.py``. Up to 1,000
trials are really run by Ray; more are made from those in the snapshot of the experiment, since Ray takes minutes for them.

The order of the arms alternates. Printed are medians over the rounds, and the spread: seconds, seconds of CPU (of the process
and of what it waited for), peak memory of the process, and of all its processes together (sampled; shared pages count in
each). Ratios are of medians, Ray's to ours. ``--json FILE`` keeps every figure.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RAY = Path(__file__).with_name("restore_ray.py")
NAME = "search"
METRICS = {"loss": 0.25, "accuracy": 0.75}
RAY_RUNS = 1_000
"""Trials that Ray really runs; more are made from those."""
TARGETS = {"server": {1_000: 4.0, 10_000: 10.0}, "embedded": {1_000: 2.0, 10_000: 5.0}}
"""How many times faster than Ray a restore is to be."""
GROWTH = 100e-6
"""Seconds that each finished trial may cost."""
MEMORY = 300e6
"""Bytes that the process may take at most."""


def trainable(trial: Any) -> None:
    """Take two steps, each with a checkpoint."""
    start = 0 if trial.checkpoint is None else trial.checkpoint.step + 1
    for step in range(start, 2):
        trial.report({"loss": trial.config["x"], "accuracy": 0.5}, step=step, state={"step": step})


@dataclass
class Cost:
    """What one process cost."""

    wall: float
    cpu: float
    peak: float
    """bytes, of the process alone"""
    together: float
    """bytes, of all its processes"""


class Children:
    """Runs processes and sees to it that nothing of them is left."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what they leave behind becomes ours

    def run(self, command: list[str], environment: dict[str, str], *, code: int = 0) -> tuple[Cost, str]:
        """Run a command to its end; return what it cost, and its output."""
        others = _descendants(os.getpid())
        stop, together = threading.Event(), [0]
        with tempfile.TemporaryFile("w+") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            watch = threading.Thread(target=self._watch, args=(others, stop, together))
            watch.start()
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            stop.set()
            watch.join()
            cpu = usage.ru_utime + usage.ru_stime + self._collect(others)
            output.seek(0)
            words = output.read()
        if process.returncode != code:
            raise SystemExit(f"{' '.join(command)} exited with {process.returncode}:\n{words}")
        return Cost(wall, cpu, usage.ru_maxrss * 1024.0, float(together[0])), words

    @staticmethod
    def _watch(others: set[int], stop: threading.Event, together: list[int]) -> None:
        while not stop.wait(0.1):
            together[0] = max(together[0], sum(map(_resident, _descendants(os.getpid()) - others)))

    @staticmethod
    def _collect(others: set[int]) -> float:
        """Wait for what the process left behind, and end it when it does not end; return its CPU seconds."""
        seconds, deadline = 0.0, time.monotonic() + 20
        while left := _descendants(os.getpid()) - others:
            for pid in left:
                if time.monotonic() > deadline:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    found, _, usage = os.wait4(pid, os.WNOHANG)
                    seconds += usage.ru_utime + usage.ru_stime if found else 0.0
            time.sleep(0.02)
        return seconds


def _descendants(pid: int) -> set[int]:
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError):
                text = Path("/proc", entry, "stat").read_text()
                parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry))
    found: set[int] = set()
    todo = [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found.update(below)
        todo.extend(below)
    return found


def _resident(pid: int) -> int:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def make(storage: Path, trials: int, engine: str) -> None:
    """Write an experiment of finished trials, with room for one more; run in a process of its own."""
    from holdfast import locate
    from holdfast.core.ports import as_proposal
    from holdfast.core.space import config_digest
    from holdfast.core.trial import Outcome
    from holdfast.core.values import dumps
    from holdfast.engines.factory import make_proposer
    from holdfast.flows.session import begin
    from holdfast.report.observer import Observer
    from holdfast.specfile import ExperimentSpec
    from holdfast.storage.database.driver import Ending

    spec = ExperimentSpec.parse(
        {
            "name": NAME,
            "trainable": f"{__file__}:trainable",
            "storage": str(storage),
            "objectives": {"loss": "min"},
            "space": {
                "act": {"type": "categorical", "choices": ["relu", "tanh"]},
                "layers": {"type": "int", "low": 1, "high": 9},
                "x": {"type": "float", "low": 0.0, "high": 1.0},
                "p": {"type": "float", "low": 0.0, "high": 1.0},
            },
            "search": {"engine": engine, "num_trials": trials + 1, "seed": 1, "max_concurrent": 1},
        }
    )
    draws = make_proposer(spec.model_copy(update={"search": spec.search.model_copy(update={"engine": "random"})}), 1)
    opened = locate.create(spec, seed=1, workdir=str(storage))
    session = begin(opened, None, Observer(), action="started", detail={})
    folder, driver = opened.folder, session.driver
    for number in range(trials):
        config = dict(as_proposal(draws.propose(number)).config)
        writer = driver.start(config, token="token")
        metrics = {**METRICS, "loss": config["x"]}
        writer.report(0, metrics)
        body = {"outcome": "completed", "trial": number, "attempt": 1, "metrics": metrics, "config": config_digest(config)}
        name = folder.result_name(number, 1)
        folder.root.write(name, json.dumps({"metadata": {}, "result": dumps(body)}).encode(), durable=False)
        driver.end(writer.attempt, Ending(outcome=Outcome.COMPLETED, metrics=metrics, result=name))
        if number % 100 == 0:
            session.journal.flush()
    session.journal.flush()
    session.keeper.release("interrupted: made so")
    session.close()


class Experiments:
    """Experiments as they were when the crash had just happened, put back before each run."""

    def __init__(self, folder: Path, children: Children, url: str, ray: str | None) -> None:
        self._folder, self._children, self._url, self.ray = folder, children, url, ray

    @property
    def _at(self) -> Path:
        return self._folder / "here"

    def _restore(self, environment: dict[str, str], code: int = 0) -> tuple[Cost, str]:
        command = [sys.executable, "-m", "holdfast.cli", "restore", str(self._at / NAME)]
        return self._children.run(command, {**os.environ, **environment}, code=code)

    def prepare(self, trials: int, engine: str) -> None:
        """Make one, unless it was made before, and let its last trial be killed."""
        if (self._folder / f"{engine}-{trials}").exists():
            return
        shutil.rmtree(self._at, ignore_errors=True)
        self._at.mkdir()
        command = [sys.executable, __file__, "--make", str(self._at), str(trials), engine]
        self._children.run(command, dict(os.environ))
        killed = {"HOLDFAST_FAULT": "checkpoint.committed", "PREFECT_API_URL": self._url}
        self._restore(killed, code=-signal.SIGKILL)
        shutil.move(self._at, self._folder / f"{engine}-{trials}")

    def restored(self, trials: int, engine: str, *, embedded: bool, lost: bool = False) -> Iterator[tuple[str, Cost]]:
        """Restore it, and again when nothing is left to do."""
        with self._put_back(f"{engine}-{trials}"):
            for file in self._at.glob("holdfast.db*") if lost else ():
                file.unlink()
            environment = {"PREFECT_API_URL": "" if embedded else self._url}
            cost, words = self._restore(environment)
            assert f"{trials + 1} COMPLETED" in words, words
            yield ", database lost" if lost else "", cost
            if not lost and not embedded:
                cost, words = self._restore(environment)
                assert "nothing is left to do" in words, words
                yield ", nothing to do", cost

    def prepare_ray(self, trials: int) -> None:
        """Let Ray make one, unless it did so before."""
        if (self._folder / f"ray-{trials}").exists():
            return
        shutil.rmtree(self._at, ignore_errors=True)
        self._at.mkdir()
        self._ray("make", min(trials, RAY_RUNS))
        if trials > RAY_RUNS:
            self._ray("grow", trials)
        shutil.move(self._at, self._folder / f"ray-{trials}")

    def restored_ray(self, trials: int) -> Iterator[tuple[str, Cost]]:
        """Let Ray restore it."""
        with self._put_back(f"ray-{trials}"):
            cost, words = self._ray("restore")
            assert json.loads(words.strip().splitlines()[-1])["trials"] == trials + 1, words
            yield "", cost

    def _ray(self, what: str, *more: int) -> tuple[Cost, str]:
        assert self.ray is not None
        return self._children.run([self.ray, str(RAY), what, str(self._at), *map(str, more)], dict(os.environ))

    @contextmanager
    def _put_back(self, name: str) -> Iterator[None]:
        shutil.rmtree(self._at, ignore_errors=True)
        shutil.copytree(self._folder / name, self._at)
        os.sync()  # what was copied is no work of the restore
        yield


Arms = dict[str, tuple[int, Callable[[], Iterator[tuple[str, Cost]]]]]


def arms_of(experiments: Experiments, sizes: list[int], engines: list[str]) -> Arms:
    """Make every experiment; return what is to be measured."""
    arms: Arms = {}
    for trials in sizes:
        for engine in engines:
            experiments.prepare(trials, engine)
            for embedded in (False, True):
                where = "embedded" if embedded else "server"
                arms[f"{trials:,} {engine}, {where}"] = (
                    trials,
                    lambda n=trials, e=engine, b=embedded: experiments.restored(n, e, embedded=b),
                )
            if engine == "random":
                arms[f"{trials:,} random, server, lost"] = (
                    trials,
                    lambda n=trials: experiments.restored(n, "random", embedded=False, lost=True),
                )
        if experiments.ray is not None:
            experiments.prepare_ray(trials)
            arms[f"{trials:,} Ray"] = trials, lambda n=trials: experiments.restored_ray(n)
    return arms


def measure(arms: Arms, rounds: int) -> dict[str, list[Cost]]:
    """Run every arm ``rounds`` times, in alternating order; return its figures by what it did."""
    found: dict[str, list[Cost]] = {}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            for suffix, cost in arms[name][1]():
                found.setdefault(name.removesuffix(", lost") + suffix, []).append(cost)
                print(f"{name}{suffix}: {cost.wall:.2f} s, {cost.cpu:.2f} s of CPU", file=sys.stderr, flush=True)
    return found


def median(costs: list[Cost], what: str) -> float:
    return statistics.median(getattr(cost, what) for cost in costs)


def table(found: dict[str, list[Cost]], sizes: list[int]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| finished trials, what | seconds | spread | CPU s | peak MB | with children MB | Ray's to it | target | |"
    yield "|---|--:|---|--:|--:|--:|--:|--:|---|"
    for trials in sizes:
        rays = found.get(f"{trials:,} Ray")
        for name, costs in found.items():
            if not name.startswith(f"{trials:,} "):
                continue
            walls = sorted(cost.wall for cost in costs)
            ratio = median(rays, "wall") / statistics.median(walls) if rays else None
            target = next(
                (known.get(trials) for place, known in TARGETS.items() if name == f"{trials:,} random, {place}"), None
            )
            verdict = "" if target is None or ratio is None else "kept" if ratio >= target else "MISSED"
            yield (
                f"| {name} | {statistics.median(walls):.2f} | {walls[0]:.2f} to {walls[-1]:.2f} | {median(costs, 'cpu'):.2f} "
                f"| {median(costs, 'peak') / 1e6:.0f} | {median(costs, 'together') / 1e6:.0f} "
                f"| {'' if ratio is None else f'{ratio:.1f}'} | {'' if target is None else f'{target:g}'} | {verdict} |"
            )


def growth(found: dict[str, list[Cost]], sizes: list[int]) -> Iterator[str]:
    """Yield what each finished trial costs, from the second largest number of them to the largest."""
    few, many = sizes[-2:]
    for name in sorted({key.partition(" ")[2] for key in found}):
        pair = found.get(f"{few:,} {name}"), found.get(f"{many:,} {name}")
        if pair[0] is None or pair[1] is None:
            continue
        wall, cpu = ((median(pair[1], what) - median(pair[0], what)) / (many - few) for what in ("wall", "cpu"))
        peak = max(cost.peak for cost in pair[1])
        verdict = "" if name == "Ray" else "kept" if wall <= GROWTH and peak <= MEMORY else "MISSED"
        yield f"| {name} | {wall * 1e6:.0f} | {cpu * 1e6:.0f} | {peak / 1e6:.0f} | {verdict} |"


def main() -> None:
    """Measure and print, or make one experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="100,1000,10000", metavar="N,...", help="finished trials (100,1000,10000)")
    parser.add_argument("--engines", default="random,tpe", metavar="NAME,...", help="(random,tpe)")
    parser.add_argument("--ray", metavar="PYTHON", help="Python of an environment with ray[tune]")
    parser.add_argument("--folder", type=Path, help="where experiments are kept for the next time (a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(Path(options.make[0]), int(options.make[1]), options.make[2])
        return
    from holdfast.flows.server import EmbeddedServer

    sizes = sorted(map(int, options.sizes.split(",")))
    server = EmbeddedServer()
    server.begin()
    try:
        with ExitStack() as stack:
            folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-bench-"))
            Path(folder).mkdir(parents=True, exist_ok=True)
            experiments = Experiments(Path(folder).resolve(), Children(), server.url(), options.ray)
            found = measure(arms_of(experiments, sizes, options.engines.split(",")), options.rounds)
    finally:
        server.stop()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{datetime.now(UTC).date().isoformat()}, {machine}; medians of {options.rounds} rounds\n")
    print("\n".join(table(found, sizes)))
    if len(sizes) > 1:
        print(f"\n| from {sizes[-2]:,} to {sizes[-1]:,} | us a trial (at most 100) | us of CPU | peak MB (at most 300) | |")
        print("|---|--:|--:|--:|---|")
        print("\n".join(growth(found, sizes)))
    if options.json:
        rows = {name: [asdict(cost) for cost in costs] for name, costs in found.items()}
        options.json.write_text(json.dumps({"machine": machine, "rounds": options.rounds, "arms": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
