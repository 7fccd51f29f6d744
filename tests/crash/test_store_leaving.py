"""What becomes of saves that are under way when a process ends, is told to end, forks, or drops its store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import PATIENCE

from holdfast import CheckpointStore
from tests.s3_server import S3

LEAVING = """
import os, signal, sys, time
import numpy as np
from holdfast import CheckpointStore

store = CheckpointStore(sys.argv[1], {"asynchronous": True})
store.save(0, np.zeros(3_000_000))
os.write(1, b"saved\\n")
match sys.argv[2]:
    case "SIGTERM":
        while True:  # a pause that begins right after the signal came would never end: Python runs handlers between calls
            time.sleep(0.05)
    case "SystemExit":
        sys.exit(5)
    case "error":
        raise ZeroDivisionError
    case "handler":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(6))
        os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(("how", "code"), [("SIGTERM", -15), ("SystemExit", 5), ("error", 1), ("handler", 6), ("end", 0)])
def test_what_is_under_way_is_finished_before_the_process_ends(how: str, code: int, tmp_path: Path) -> None:
    saver = subprocess.Popen(
        [sys.executable, "-c", LEAVING, str(tmp_path), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert saver.stdout is not None
    assert saver.stdout.readline() == "saved\n"
    if how == "SIGTERM":
        saver.send_signal(signal.SIGTERM)
    try:
        saver.communicate(timeout=PATIENCE)
    finally:
        saver.kill()
    assert saver.returncode == code
    assert CheckpointStore(tmp_path).load(0).shape == (3_000_000,)


REMOTE = """
import json, sys
import numpy as np
from holdfast import CheckpointStore

store = CheckpointStore(sys.argv[1], {"asynchronous": True}, storage_options=json.loads(sys.argv[2]))
store.save(0, {"small": 1})
store.save(1, np.zeros(3_000_000))
"""


def test_the_end_waits_for_an_upload_too(s3: S3, tmp_path: Path) -> None:
    place = f"{s3.bucket()}/mine"
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, place, json.dumps(s3.options)],
        capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert CheckpointStore(place, storage_options=s3.options).steps() == [0, 1]
    assert list(tmp_path.iterdir()) == []


BUSY = """
import os, sys
import numpy as np
from holdfast import CheckpointStore

store = CheckpointStore(sys.argv[1], {"asynchronous": True, "keep_last": 2})
step = 0
while True:
    store.save(step, np.full(200_000, step))
    if step == 20:
        os.write(1, b"running\\n")
    step += 1
"""


def test_sigterm_ends_a_loop_that_does_nothing_but_save(tmp_path: Path) -> None:
    saver = subprocess.Popen([sys.executable, "-c", BUSY, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert saver.stdout is not None
    assert saver.stdout.readline() == "running\n"
    saver.send_signal(signal.SIGTERM)
    saver.communicate()  # by pytest's time limit, should it go on
    assert saver.returncode == -signal.SIGTERM
    newest = CheckpointStore(tmp_path).load()
    assert (newest == newest[0]).all()


DROPPED = """
import gc, os, sys
from holdfast import CheckpointStore

def train():
    store = CheckpointStore(sys.argv[1], {"asynchronous": True})
    store.save(0, 0)
    with store.stage(1) as folder:
        os.mkfifo(folder / "pipe")

train()
gc.collect()
"""


def test_the_error_of_a_store_that_was_dropped_is_logged(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DROPPED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert "the last save failed" in done.stderr
    assert "pipe" in done.stderr
    assert CheckpointStore(tmp_path).steps() == [0]


FORK = """
import os, sys
from holdfast import CheckpointStore

store = CheckpointStore(sys.argv[1])
with store:
    folder = store.stage(0)
    (folder / "mine").write_text("mine")
    child = os.fork()
    if child == 0:
        sys.exit(0)
    os.waitpid(child, 0)
    store.finalize(folder)
print((store.load() / "mine").read_text())
"""


def test_a_fork_that_ends_takes_nothing_of_its_parents_along(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr


def test_a_store_without_threads_saves_in_place(tmp_path: Path) -> None:
    code = (
        "import sys, threading\n"
        "from holdfast import CheckpointStore\n"
        "store = CheckpointStore(sys.argv[1], {'asynchronous': True})\n"
        "threading.stack_size(1 << 62)  # more than there is, so that none can be started\n"
        "for step in range(3):\n"
        "    store.save(step, step)\n"
        "print(store.steps())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[0, 1, 2]\n"), done.stderr
