"""Callables as trainables: what they are made of travels with them to machines that have none of it."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from pathlib import Path

import numpy
import pytest
from support_scripts import run_script

from holdfast import callables
from holdfast.core.errors import TrainableError

FILES = {
    "mine/lib/__init__.py": "",
    "mine/lib/train.py": (
        "import math\n"
        "import xxhash\n"
        "import helpers\n"
        "from . import scale\n"
        "from .scale import Scaled\n"
        "from helpers import halved\n"
        "FACTOR = 3\n"
        "def inner(x):\n"
        "    return FACTOR * halved(x)\n"
        "def train(trial):\n"
        "    return {'loss': inner(4.0) + helpers.one() + scale.SHIFT + math.sqrt(4) + len(xxhash.xxh32().hexdigest())}\n"
        "class Train:\n"
        "    def __init__(self, offset):\n"
        "        self.offset = offset\n"
        "    def __call__(self, trial):\n"
        "        return {'loss': Scaled(self.offset).value()}\n"
    ),
    "mine/lib/scale.py": (
        "SHIFT = 100\nclass Scaled:\n    def __init__(self, x): self.x = x\n    def value(self): return 2 * self.x\n"
    ),
    "here/helpers.py": "def halved(x):\n    return x / 2\ndef one():\n    return 1\n",
    "here/broken.py": "import threading\nLOCK = threading.Lock()\ndef train(trial):\n    return {'loss': LOCK.locked()}\n",
}
PICKLING = """
import json, os, sys, functools
from pathlib import Path
place = Path(sys.argv[1])
os.chdir(place / "here")
sys.path[:0] = [str(place / "mine"), str(place / "here")]
import cloudpickle
from lib import train
import broken
from holdfast import callables
from holdfast.core.errors import TrainableError
made = {
    "function": train.train,
    "object": train.Train(5.0),
    "partial": functools.partial(train.train),
}
for name, function in made.items():
    (place / "there" / f"{name}.pkl").write_bytes(callables.dump(function, whole=True))
try:
    callables.dump(broken.train, whole=True)
except TrainableError as error:
    print(error)
assert not cloudpickle.list_registry_pickle_by_value()
assert len(callables.dump(train.train)) < 100
print("done")
"""
LOADING = """
import json, os, sys
from pathlib import Path
place = Path(sys.argv[1])
os.chdir(place / "there")
from holdfast.tasks.workers.trainables import load
print(json.dumps([load(f"pickle:{name}.pkl:train", str(place / "there")).target(None) for name in sys.argv[2:]]))
"""


def test_a_worker_needs_no_file_of_it(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "there").mkdir()
    done = run_script(PICKLING, tmp_path)
    assert done.stdout.endswith("done\n"), done.stdout
    assert "cannot be pickled" in done.stdout  # a lock, and the message names it
    for name in ("mine", "here"):
        shutil.rmtree(tmp_path / name)
    found = run_script(LOADING, tmp_path, "function", "object", "partial")
    assert json.loads(found.stdout) == [{"loss": 117.0}, {"loss": 10.0}, {"loss": 117.0}]


def test_what_is_installed_is_named_and_not_carried() -> None:
    for function in (numpy.linalg.norm, functools.partial(json.dumps), callables.dump):
        assert callables.dump(function, whole=True) == callables.dump(function)


def test_what_cannot_travel_is_said() -> None:
    lock = threading.Lock()
    with pytest.raises(TrainableError, match="cannot be pickled"):
        callables.dump(lambda trial: lock.locked(), whole=True)
