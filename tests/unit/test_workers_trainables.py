"""Finding trainables, and refusing with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
from workers_kit import TRAINABLES, Recorder, make_job

from holdfast.core.errors import TrainableError
from holdfast.tasks.workers.pool import WorkerPool


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(1) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "kind"), [("noop", "function"), ("WithTrial", "class"), ("instance", "callable"), ("bound", "function")]
)
def test_kinds(pool: WorkerPool, tmp_path: Path, name: str, kind: str) -> None:
    assert pool.probe(f"{TRAINABLES}:{name}", str(tmp_path)) == kind


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nop", "has no 'nop'; did you mean noop"),
        ("coroutine", "an async function"),
        ("generator", "a generator"),
        ("async_instance", "an async function"),
        ("no_arguments", r"takes \(\); it is called with one argument"),
        ("number", "is a int; it must be a function"),
        ("NoStep", "a class without step"),
        ("TooMany", "constructed from a, b"),
        ("SaveOnly", "no load"),
        ("AsyncStep", r"step\(\) is an async function"),
    ],
)
def test_refusals(pool: WorkerPool, tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(TrainableError, match=reason):
        pool.probe(f"{TRAINABLES}:{name}", str(tmp_path))


def test_the_probed_child_stays_warm(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os\nPID = os.getpid()\ndef train(trial): return {'pid': PID}\n")
    with WorkerPool(1) as pool:
        assert pool.probe("train.py:train", str(tmp_path)) == "function"
        job = make_job(tmp_path, "", trainable="train.py:train")
        recorder = Recorder(job)
        ended = pool.run(job, recorder)
    assert ended.metrics == {"pid": recorder.pid}


def test_missing_files_and_modules(pool: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    with pytest.raises(TrainableError, match=r"there is no file .*trian.py; did you mean train.py"):
        pool.probe("trian.py:train", str(tmp_path))
    with pytest.raises(TrainableError, match="there is no module 'nowhere'"):
        pool.probe("nowhere.at.all:train", str(tmp_path))
    with pytest.raises(TrainableError, match="there is no file"):
        pool.probe(f"pickle:{tmp_path}/gone.pkl:train", str(tmp_path))
    with pytest.raises(TrainableError, match="working directory"):
        pool.probe("train.py:train", str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("def train(:", "SyntaxError"),
        ("x = 1\ny = x / 0", r"(?s)ZeroDivisionError.*broken.py., line 2"),
        ("raise SystemExit('not today')", "SystemExit: not today"),
        ("import os; print('last words', flush=True); os._exit(4)", r"(?s)exited with code 4.*last words"),
    ],
)
def test_failing_imports(pool: WorkerPool, tmp_path: Path, code: str, reason: str) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(TrainableError, match=reason):
        pool.probe("broken.py:train", str(tmp_path))


def test_an_endless_import(pool: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("while True: pass")
    with pytest.raises(TrainableError, match=r"longer than 0\.5 s"):
        pool.probe("endless.py:train", str(tmp_path), timeout=0.5)


def test_neighbours_can_be_imported_and_shadow_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    folder = tmp_path / "über projekt"
    (folder / "package").mkdir(parents=True)
    (folder / "helper.py").write_text("VALUE = 5\n")
    (folder / "tasks.py").write_text("VALUE = 6\n")
    (folder / "random.py").write_text("raise RuntimeError('shadowed')\n")
    (folder / "json.py").write_text("import helper, tasks\ndef train(trial): return {'v': helper.VALUE + tasks.VALUE}\n")
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "module.py").write_text("import helper\ndef train(trial): return {'v': helper.VALUE}\n")
    for trainable, value in ((f"{folder}/json.py:train", 11), ("package.module:train", 5)):
        job = make_job(folder, "", trainable=trainable)
        assert pool.run(job, Recorder(job)).metrics == {"v": value}


def test_pickled_callables(pool: WorkerPool, tmp_path: Path) -> None:
    factor = 3
    path = tmp_path / "train.pkl"
    path.write_bytes(cloudpickle.dumps(lambda trial: {"v": factor * trial.config["lr"]}))
    job = make_job(tmp_path, "", trainable=f"pickle:{path}:train")
    assert pool.probe(job.trainable, job.workdir) == "function"
    assert pool.run(job, Recorder(job)).metrics == {"v": 1.5}
    path.write_bytes(b"torn")
    with pytest.raises(TrainableError, match="cannot be imported"):
        pool.probe(f"pickle:{path}:other", str(tmp_path))
