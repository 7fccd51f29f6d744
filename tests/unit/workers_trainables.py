"""What users write, well and badly. Imports nothing of holdfast."""

import contextlib
import ctypes
import functools
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time

KEPT = []


def noop(trial):
    return {"loss": 1.0}


def nothing(trial):
    pass


def who(trial):
    return {
        "number": trial.number,
        "attempt": trial.attempt,
        "seed": trial.seed,
        "experiment": trial.experiment,
        "config": trial.config,
        "references": trial.references,
        "fresh": trial.checkpoint is None,
        "cwd": os.getcwd(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "heavy": sorted({"numpy", "pydantic", "prefect", "sqlalchemy", "pandas", "cloudpickle"} & set(sys.modules)),
    }


def raises(trial):
    secret = {}
    return secret["grün"]


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raises_unspeakable(trial):
    raise Unspeakable


def raises_surrogate(trial):
    raise ValueError("bad \udcff name")


def exits(trial):
    sys.exit("enough")


def hard_exit(trial):
    print("about to leave", flush=True)
    os._exit(3)


def segfault(trial):
    ctypes.string_at(0)


def endless(trial):
    while True:
        pass


def blocked(trial):
    ctypes.CDLL(None).sleep(1000)  # no Python code runs


def swallows(trial):
    step = 0
    while step < 5:
        with contextlib.suppress(BaseException):
            trial.report({"loss": 1.0}, step=step)
        step += 1
    return {"loss": 0.0}


def fails_when_stopped(trial):
    try:
        trial.report({"loss": 1.0})
    finally:
        raise RuntimeError("while tidying up")


def dies_when_stopped(trial):
    try:
        trial.report({"loss": 1.0})
    finally:
        os._exit(9)


def reports_forever(trial):
    step = 0
    while True:
        trial.report({"loss": 1.0}, step=step, state={"step": step})
        step += 1


def reports_three(trial):
    start = 0
    if trial.checkpoint:
        start = trial.checkpoint.step + 1
    for step in range(start, 3):
        trial.report({"loss": 1.0 / (step + 1)}, step=step, state=lambda step=step: {"w": [step] * 4, "blob": b"x" * 10})
    return {"start": start}


def thunks(trial):
    calls = []
    for step in range(5):
        trial.report({"due": trial.should_checkpoint(step)}, step=step, state=lambda step=step: calls.append(step) or step)
    return {"calls": calls}


class Model:
    """Callable, as models are."""

    weight = 3

    def __call__(self, x):
        return x


def callable_state(trial):
    trial.report({"loss": 1.0}, state=Model())


def partial_state(trial):
    trial.report({"loss": 1.0}, state=functools.partial(dict, a=1))


def reload_state(trial):
    checkpoint = trial.checkpoint
    first = checkpoint.load()
    second = checkpoint.load()
    return {
        "step": checkpoint.step,
        "same": first == second,
        "w": first["w"],
        "absolute": checkpoint.path.is_absolute() and checkpoint.path.is_dir(),
        "metrics": checkpoint.metrics,
    }


def directories(trial):
    with open("model.txt", "w") as file:
        file.write("weights")
    os.makedirs("out/sub")
    os.rename("model.txt", "out/sub/model.txt")
    trial.report({"loss": 1.0}, directory="out")
    folder = trial.stage(1)
    (folder / "big.bin").write_bytes(b"big" * 1000)
    trial.report({"loss": 0.5}, step=1)
    trial.stage(2)  # never reported


def read_directory(trial):
    return {"content": (trial.checkpoint.load() / "big.bin").stat().st_size}


def two_contents(trial):
    trial.report({"loss": 1.0}, state={}, directory=".")


def nan(trial):
    trial.report({"loss": float("nan"), "list": [float("inf"), None]})
    return {"loss": float("-inf")}


def unstorable_metric(trial):
    trial.report({"loss": {1, 2}})


def unstorable_state(trial):
    trial.report({"loss": 1.0}, state={"model": Model()})


def unstorable_return(trial):
    return 3.5


def same_step(trial):
    trial.report({"loss": 1.0}, step=4)
    trial.report({"loss": 1.0}, step=4)


def default_steps(trial):
    trial.report({"loss": 1.0})
    trial.report({"loss": 1.0}, step=5)
    trial.report({"loss": 1.0})


def numpy_values(trial):
    import numpy as np

    trial.report({"loss": np.float32(0.5), "n": np.int64(3), "ok": np.bool_(True)}, step=np.int64(2))
    return {"draw": float(np.random.rand()), "python": random.random()}


def draws(trial):
    return {"python": random.random()}


def big(trial):
    trial.report({"text": "ü" * 500_000, "deep": [[1.5] * 1000] * 50})
    return {"echo": len(trial.config["text"])}


def unicode_text(trial):
    trial.report({"смысл": "жизни 🎉 \u2028"})
    print("naïve ☃ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢")
    return {"é": trial.config["ключ"]}


def telemetry(trial):
    trial.telemetry("load", 0.5, timestamp=12.5)
    for number in range(500):
        trial.telemetry("many", number)
    trial.report({"loss": 1.0})
    trial.telemetry("last", {"nested": [1, None]})


def naive_timestamp(trial):
    import datetime

    trial.telemetry("load", 1, timestamp=datetime.datetime(2026, 1, 1))


def noise(trial):
    for number in range(100_000):
        print("line", number)
    os.write(1, bytes(range(256)) * 100)
    sys.stderr.write("to stderr\n")
    logging.getLogger("mine").info("a record")
    trial.report({"loss": 1.0})
    return {"loss": 1.0}


def closes_streams(trial):
    sys.stdout.close()
    os.close(1)
    os.close(2)
    trial.report({"loss": 1.0})
    return {"loss": 1.0}


def prints_to_closed(trial):
    sys.stdout.close()
    print("never seen")


def prints(trial):
    print("hello from", trial.number)
    print("no newline", end="")


def closes_everything(trial):
    os.closerange(3, 200)
    trial.report({"loss": 1.0})


def scribbles(trial):
    for descriptor in range(3, 256):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\0\0\0\5hello")
    time.sleep(1000)


def changes_handlers(trial):
    signal.signal(signal.SIGUSR1, lambda *_: None)


def changes_directory(trial):
    os.chdir("/")


def leaves_thread(trial):
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def leaves_process(trial):
    process = subprocess.Popen(["sleep", "1000"])
    return {"left": process.pid}


def forks(trial):
    """The copy comes back out of the user's code, and reports too."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            trial.report({"loss": 666.0})
        except Exception as error:  # noqa: BLE001
            os.write(writer, type(error).__name__.encode())
        os.close(writer)
        return {"loss": 666.0}
    os.close(writer)
    refused = os.read(reader, 100).decode()
    os.waitpid(pid, 0)
    trial.report({"loss": 1.0})
    return {"refused": refused}


def orphans_holding_pipe(trial):
    """A process that holds every descriptor outlives the trial's own."""
    libc = ctypes.CDLL(None)
    pid = libc.fork()  # past Python's hooks
    if pid == 0:
        time.sleep(1000)
    trial.report({"pid": pid})
    os._exit(5)


def waits_with_child(trial):
    process = subprocess.Popen(["sleep", "1000"])
    trial.report({"child": process.pid})
    time.sleep(1000)


def survives_sigterm(trial):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    process = subprocess.Popen(["sleep", "1000"])
    process.terminate()
    return {"code": process.wait()}


def uses_pool(trial):
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        forked = pool.map(abs, [-1, -2])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return {"forked": forked, "spawned": pool.map(helper, [1, 2])}


def ends_its_forks(trial):
    codes = set()
    for _ in range(300):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)  # it may not have come to its first instruction yet
        codes.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return {"codes": sorted(codes)}


def helper(value):
    return value * 10


def reports_from_thread(trial):
    errors = []

    def report(step):
        try:
            trial.report({"loss": 1.0}, step=step)
        except Exception as error:  # noqa: BLE001
            errors.append(repr(error))

    for step in range(3):
        thread = threading.Thread(target=report, args=(step,))
        thread.start()
        thread.join()
    return {"errors": errors}


def keeps_trial(trial):
    KEPT.append(trial)
    KEPT[0].report({"loss": 1.0})


class WithTrial:
    def __init__(self, trial):
        self.trial = trial
        self.count = 0

    def step(self):
        self.count += 1
        return {"count": self.count, "done": self.count == 4}

    def save(self):
        return {"count": self.count}

    def load(self, state):
        self.count = state["count"]


class WithConfig:
    def __init__(self, config):
        self.lr = config["lr"]

    def step(self):
        self.lr /= 2
        return {"lr": self.lr} if self.lr > 0.1 else None


class WithNothing:
    def step(self):
        return {"loss": 1.0}


class KeywordOnly:
    def __init__(self, *, config, extra=1):
        self.config = config

    def step(self):
        return {"lr": self.config["lr"], "done": True}


class TooMany:
    def __init__(self, a, b):
        pass

    def step(self):
        return None


class NoStep:
    pass


class SaveOnly:
    def step(self):
        return None

    def save(self):
        return {}


class AsyncStep:
    async def step(self):
        return {}


class Called:
    def __call__(self, trial):
        return {"loss": 2.0}


class AsyncCalled:
    async def __call__(self, trial):
        return {}


instance = Called()
async_instance = AsyncCalled()
bound = instance.__call__
number = 3


async def coroutine(trial):
    return {}


def generator(trial):
    yield {}


def no_arguments():
    return {}


def strange_telemetry(trial):
    import math

    for value in (math.nan, math.inf, [-math.inf, {"a": math.nan}], (1.0, math.nan)):
        trial.telemetry("strange", value, timestamp=1.0)
    trial.telemetry("ends", 0, timestamp=-62135596800)
    trial.telemetry("ends", 1, timestamp=253402300798.5)


def telemetry_when(trial):
    trial.telemetry("load", 1, timestamp=trial.config["when"])


def long_error(trial):
    raise ValueError("head" + "é" * 300_000 + "tail")
