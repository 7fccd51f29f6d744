"""What checkpoints cost, with the raw limit beside them, in one run.

* *save*: 256 MiB of float32 in 16 arrays, durable and digested (stage, write, publish), against the same bytes in one file by
  ``os.write`` and one fsync: limit 1.3 times;
* *restore*: the same, verified, against reading the raw file into as many fresh arrays, warm and cold (both files dropped
  from the page cache, which is checked): limit 1.3 times;
* *small*: states of 10 kB, durable, against write, fsync, rename and fsync of the directory of as many bytes: at least 0.35 of
  the rate. Beside it the bare system calls of a checkpoint (two files and a directory: four fsyncs), which no program of this
  layout is faster than;
* *asynchronous*: how long ``prepare(copy=True)`` holds up the training for 256 MiB, against one copy into fresh memory by
  numpy: limit that copy and 10 ms;
* *S3*: publishing 256 MiB to moto's server, in a process of its own on the same cores, against a parallel multipart put of the
  same bytes by s3fs: recorded only;
* *peers*: Orbax, ``torch.save`` and ``numpy.savez``, each with fsyncs where it makes none itself, when they are installed.

The order of the arms alternates; figures are medians over the rounds, and so are the ratios, round by round. Before each arm
as much memory is touched as it will need: a virtual machine's first touch of a page costs more than writing it. Prints a
table; ``--json FILE`` keeps every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.storage.checkpoints.files import fsync_folder
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.storage.checkpoints.serializers import prepare
from holdfast.testing.saving import manifest_of

ARRAYS, ELEMENTS = 16, 4 << 20  # of float32: 256 MiB
SMALL = 10_000
SAVES = 40  # small ones of one arm in one round
CHUNK = 16 << 20

State = dict[str, Any]
Arm = Callable[[], float]


def large() -> State:
    """Return 256 MiB that compress and repeat nowhere."""
    rng = np.random.default_rng(7)
    return {f"w{number}": rng.standard_normal(ELEMENTS, dtype=np.float32) for number in range(ARRAYS)}


def touch(size: int = 768 << 20) -> None:
    """Have free memory that the machine really has."""
    np.ones(size, np.uint8)


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of a call; what it returns is dropped behind the clock."""
    began = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - began
    del kept
    return seconds


def rounds_of(arms: dict[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Run every arm once a round, in alternating order, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in sorted(arms, reverse=bool(number % 2)):
            touch()
            seconds = arms[name]()
            if number:
                found[name].append(seconds)
    return found


class Disk:
    """A store and a folder for raw files beside it."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state = folder, state
        self.store = LocalCheckpoints(folder / "store")
        self.raw = folder / "raw"
        self.step = 0

    def save(self, state: State | None = None) -> str:
        """Save a checkpoint as a trial does, and return its path."""
        self.step += 1
        staged = self.store.stage(7, 1, self.step)
        entries = prepare(self.state if state is None else state, serializer="safe").write(staged)
        manifest = replace(manifest_of(entries, step=self.step), metrics={"loss": 0.5})
        return self.store.publish(staged, manifest).path

    def save_large(self) -> float:
        """Time one save, and delete it."""
        paths: list[str] = []
        seconds = timed(lambda: paths.append(self.save()))
        self.store.delete(paths[0])
        return seconds

    def write_raw(self) -> None:
        """Write the same bytes into one new file in a folder of its own, and fsync it."""
        self.raw.mkdir()
        descriptor = os.open(self.raw / "raw", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for array in self.state.values():
            view = memoryview(array).cast("B")
            while view:
                view = view[os.write(descriptor, view[:CHUNK]) :]
        os.fsync(descriptor)
        os.close(descriptor)

    def save_raw(self) -> float:
        """Time the raw arm, and delete it."""
        seconds = timed(self.write_raw)
        shutil.rmtree(self.raw)
        return seconds

    def read_raw(self) -> list[Any]:
        """Read the raw file into as many fresh arrays."""
        arrays = []
        with open(self.raw / "raw", "rb", buffering=0) as file:
            for like in self.state.values():
                array = np.empty_like(like)
                view = memoryview(array).cast("B")
                while view:
                    view = view[file.readinto(view) :]
                arrays.append(array)
        return arrays

    def drop(self, path: str) -> None:
        """Take the raw file and a checkpoint out of the page cache."""
        for file in (self.raw / "raw", *(self.store.root / path).iterdir()):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def large_rows(disk: Disk, rounds: int) -> list[dict[str, Any]]:
    """Measure saving and restoring 256 MiB, and what an asynchronous save blocks."""
    rows = [limited("save 256 MiB, durable", rounds_of({"holdfast": disk.save_large, "raw": disk.save_raw}, rounds), 1.3)]
    path = disk.save()
    disk.write_raw()
    seen = disk.store.load(path).state
    assert all((seen[name] == array).all() for name, array in disk.state.items())  # type: ignore[index]
    del seen

    def cold(call: Callable[[], Any]) -> Arm:
        def arm() -> float:
            disk.drop(path)
            return timed(call)

        return arm

    arms = {"holdfast": lambda: disk.store.load(path), "raw": disk.read_raw}
    warm = rounds_of({name: lambda call=call: timed(call) for name, call in arms.items()}, rounds)  # type: ignore[misc]
    found = rounds_of({name: cold(call) for name, call in arms.items()}, rounds)
    rows += [limited("restore 256 MiB, verified, warm", warm, 1.3), limited("restore 256 MiB, verified, cold", found, 1.3)]
    if statistics.median(found["raw"]) < 1.5 * statistics.median(warm["raw"]):
        rows[-1]["note"] = "the page cache could not be dropped: this is warm"
    rows.append(block_row(disk.state, rounds))
    disk.store.delete(path)
    shutil.rmtree(disk.raw)
    return rows


def block_row(state: State, rounds: int) -> dict[str, Any]:
    """Measure how long an asynchronous save blocks."""

    def copied() -> list[Any]:
        fresh = []
        for array in state.values():
            fresh.append(np.empty_like(array))
            np.copyto(fresh[-1], array)
        return fresh

    arms: dict[str, Arm] = {
        "holdfast": lambda: timed(lambda: prepare(state, serializer="safe", copy=True)),
        "raw": lambda: timed(copied),
    }
    found = rounds_of(arms, 2 * rounds)
    row = limited("asynchronous save of 256 MiB: blocked", found, None)
    row["limit"] = "one copy + 10 ms"
    row["kept"] = row["seconds"] <= row["raw_seconds"] + 0.010
    return row


def small_rows(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure saving states of 10 kB."""
    data = os.urandom(SMALL)
    disk = Disk(folder / "small", {})
    state: State = {"w": np.frombuffer(data, np.uint8)}
    raw, bare = folder / "small" / "raw", folder / "small" / "bare"
    raw.mkdir(parents=True)
    bare.mkdir()
    disk.save(state)
    count = 0

    def put(file: Path | str) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)

    def once_raw() -> None:
        put(f"{raw}/new")
        os.rename(f"{raw}/new", f"{raw}/{count}")
        fsync_folder(raw)

    def once_bare() -> None:
        os.mkdir(f"{bare}/new")
        put(f"{bare}/new/state")
        put(f"{bare}/new/manifest")
        fsync_folder(f"{bare}/new")
        os.rename(f"{bare}/new", f"{bare}/{count}")
        fsync_folder(bare)

    def many(call: Callable[[], Any]) -> Arm:
        def arm() -> float:
            nonlocal count
            began = time.perf_counter()
            for _ in range(SAVES):
                count += 1
                call()
            return (time.perf_counter() - began) / SAVES

        return arm

    arms = {"holdfast": many(lambda: disk.save(state)), "raw": many(once_raw), "bare": many(once_bare)}
    found = rounds_of(arms, 3 * rounds)
    kept = limited("save 10 kB, durable", found, 1 / 0.35)
    kept["limit"] = f"0.35 of the rate (here {1 / kept['ratio']:.2f})"
    beside = limited("the system calls of that alone", {"holdfast": found["bare"], "raw": found["raw"]}, None)
    return [kept, beside]


def s3_rows(state: State, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure publishing to a server of S3 beside s3fs's own parallel multipart upload."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    try:
        import s3fs
        from s3_server import S3  # type: ignore[import-not-found]

        server = S3.start()
    except (ImportError, OSError) as error:
        return [row("S3, 256 MiB", note=f"not measured: {error}")]
    from holdfast.storage.checkpoints.remote import RemoteCheckpoints
    from holdfast.storage.objects import ObjectRoot

    try:
        url = server.bucket("bench")
        store = RemoteCheckpoints(ObjectRoot(f"{url}/holdfast", server.options), folder / "work")
        system = s3fs.S3FileSystem(**server.options, skip_instance_cache=True)
        step = 0
        local = folder / "file"
        with open(local, "wb") as file:
            for array in state.values():
                file.write(array)

        def publish() -> float:
            nonlocal step
            step += 1
            staged = store.stage(7, 1, step)
            entries = prepare(state, serializer="safe").write(staged)
            paths: list[str] = []
            seconds = timed(lambda: paths.append(store.publish(staged, manifest_of(entries, step=step)).path))
            store.delete(paths[0])
            return seconds

        def put() -> float:
            seconds = timed(lambda: system.put_file(str(local), f"{url}/put", chunksize=16 << 20, max_concurrency=4))
            system.rm(f"{url}/put")
            return seconds

        return [limited("S3 (moto): publish 256 MiB", rounds_of({"holdfast": publish, "raw": put}, rounds), None)]
    finally:
        server.stop()


def peer_rows(state: State, folder: Path, rounds: int, raw: float) -> list[dict[str, Any]]:
    """Measure what others take for the same bytes; one that is not installed is left out."""
    arms: dict[str, Arm] = {}
    target = folder / "peer"

    def arm(write: Callable[[Path], Any], *, synced: bool) -> Arm:
        def run() -> float:
            def all_of_it() -> None:
                write(target)
                if not synced:
                    _sync(target if target.exists() else target.with_suffix(".npz"))
                fsync_folder(folder)

            seconds = timed(all_of_it)
            for left in folder.glob("peer*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            return seconds

        return run

    arms["numpy.savez + fsync"] = arm(lambda file: np.savez(file, **state), synced=False)
    try:
        import torch

        as_tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        arms[f"torch.save {torch.__version__} + fsync"] = arm(lambda file: torch.save(as_tensors, file), synced=False)
    except ImportError:
        pass
    try:
        import orbax.checkpoint as ocp  # type: ignore[import-not-found,import-untyped]

        checkpointer = ocp.StandardCheckpointer()

        def save(path: Path) -> None:
            checkpointer.save(path.absolute(), state)
            checkpointer.wait_until_finished()

        arms["Orbax StandardCheckpointer (its own durability)"] = arm(save, synced=True)
    except ImportError:
        pass
    rows = []
    for name, seconds in rounds_of(arms, rounds).items():
        rows.append(row(f"256 MiB by {name}", seconds=statistics.median(seconds), raw=raw))
    return rows


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def limited(what: str, found: dict[str, list[float]], limit: float | None) -> dict[str, Any]:
    """Return the row of a measurement: medians, the median of the ratios round by round, and their range."""
    ratios = [one / raw for one, raw in zip(found["holdfast"], found["raw"], strict=True)]
    made = row(what, seconds=statistics.median(found["holdfast"]), raw=statistics.median(found["raw"]))
    made |= {"ratio": statistics.median(ratios), "ratios": [round(ratio, 3) for ratio in ratios], "rounds": found}
    if limit is not None:
        made |= {"limit": f"{limit:.1f}", "kept": made["ratio"] <= limit}
    return made


def row(what: str, *, seconds: float | None = None, raw: float | None = None, note: str = "") -> dict[str, Any]:
    """Return one line of the table."""
    ratio = None if seconds is None or raw is None else seconds / raw
    return {"what": what, "seconds": seconds, "raw_seconds": raw, "ratio": ratio, "limit": "", "kept": None, "note": note}


def line(found: dict[str, Any]) -> str:
    """Return a row as a line of a Markdown table."""
    ratio = "" if found["ratio"] is None else f"{found['ratio']:.2f}"
    if ratios := found.get("ratios"):
        ratio += f" ({min(ratios):.2f} to {max(ratios):.2f})"
    verdict = "" if found["kept"] is None else ("kept" if found["kept"] else "MISSED")
    cells = [found["what"], words(found["seconds"]), words(found["raw_seconds"]), ratio, found["limit"], verdict, found["note"]]
    return "| " + " | ".join(cells) + " |"


def words(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms" if seconds < 0.02 else f"{seconds * 1e3:.0f} ms"


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure everything; return the rows of the table."""
    state = large()
    rows = large_rows(Disk(folder / "large", state), options.rounds)
    rows += small_rows(folder, options.rounds)
    if not options.local:
        rows += s3_rows(state, folder, max(1, options.rounds // 2))
        (folder / "peers").mkdir()
        rows += peer_rows(state, folder / "peers", max(1, options.rounds // 2), rows[0]["raw_seconds"])
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to put the files: the disk counts (a temporary folder)")
    parser.add_argument("--local", action="store_true", help="leave out S3 and the peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=options.folder) as name:
        rows = measure(Path(name), options)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()},"
        f" numpy {np.__version__}; load {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    )
    print(f"{datetime.now(UTC).date().isoformat()}, {machine}; medians of {options.rounds} rounds\n")
    print("| what | time | raw cost | ratio (rounds) | limit | | |\n|---|---|---|---|---|---|---|")
    for found in rows:
        print(line(found))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rounds": options.rounds, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
