"""What users save in the background. Imports nothing of holdfast, but where a thread of its has to be held up."""

import contextlib
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

LARGE = b"x" * 200_000


@contextlib.contextmanager
def held_up():
    """Let files of checkpoints be opened only while the event is set, as it is at first."""
    from holdfast.storage.checkpoints.files import Sink

    gate, enter = threading.Event(), Sink.__enter__

    def wait(sink):
        gate.wait()
        return enter(sink)

    gate.set()
    Sink.__enter__ = wait
    try:
        yield gate
    finally:
        gate.set()
        Sink.__enter__ = enter


@contextlib.contextmanager
def no_large_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def ring(bell):
    """Tell the test something, by a named pipe that it made."""
    with open(bell, "wb", buffering=0) as stream:
        stream.write(b"!")


def wait_for(bell):
    """Wait until the test tells something; when it does not, it ends this process."""
    with open(bell, "rb", buffering=0) as stream:
        stream.read(1)


def wait_until_written():
    """Wait until nothing is being written in the background."""
    for thread in threading.enumerate():
        if thread.name == "holdfast-saver":
            thread.join(60)
            assert not thread.is_alive()


def changed_at_once(trial):
    """Everything that was given is changed before a byte of it is written."""
    import numpy as np

    w, small, letters, deep = np.zeros(50_000), np.zeros(3), bytearray(b"aaa"), [[0]]
    with held_up() as gate:

        def state():
            gate.clear()  # the save before this one is finished by now
            return {"w": w, "small": small, "l": bytes(letters), "deep": deep}

        for step in range(3):
            w[:], small[:], letters[:], deep[0][0] = step, step, b"abc"[step : step + 1] * 3, step
            trial.report({"loss": step}, step=step, state=state)
            w[:], small[:], letters[:], deep[0][0] = -1, -1, b"zzz", -1
            deep.append("more")
            gate.set()
            deep.pop()


def changed_folder(trial):
    folder = Path("out")
    folder.mkdir(exist_ok=True)
    (folder / "w.txt").write_text("good")
    trial.report({"loss": 1.0}, step=0, directory=folder)
    (folder / "w.txt").write_text("bad")
    own = trial.stage(1)
    (own / "big.bin").write_bytes(LARGE)
    trial.report({"loss": 1.0}, step=1)


def staged_link(trial):
    own = trial.stage(0)
    os.symlink("/etc/passwd", own / "link")
    trial.report({"loss": 1.0}, step=0)


def bad_folder(trial):
    """Hands over a folder that is none any more, or never was; the next report is fine."""
    kind = trial.config["kind"]
    if kind == "loop":
        Path("loop").mkdir(exist_ok=True)
        os.symlink("a", "loop/a")
        trial.report({"loss": 1.0}, step=0, directory="loop")
    else:
        own = trial.stage(0)
        if kind == "link":
            own.rename("elsewhere")
            own.symlink_to(Path("elsewhere").absolute())
        else:
            own.rmdir()
        if kind == "file":
            own.write_text("mine")
        trial.report({"loss": 1.0}, step=0)
    trial.report({"loss": 1.0}, step=1, state=1)


def removes_what_it_reported(trial):
    """Tidies up a staged folder that is written and handed over, and not published yet."""
    own = trial.stage(0)
    (own / "w.bin").write_bytes(LARGE)
    trial.report({"loss": 1.0}, step=0)
    wait_until_written()
    shutil.rmtree(own)
    ring("removed")
    trial.report({"loss": 1.0}, step=1, state=1)


def steps(trial):
    for step in range(trial.config["steps"]):
        trial.report({"loss": float(step)}, step=step, state={"step": step})
    return {"loss": 0.0}


def reports_when_told(trial):
    """Begins its second report when a bell rings, and rings another one."""
    for step in range(trial.config["steps"]):
        if step == 1:
            wait_for("saving")
            ring("reporting")
        trial.report({"loss": float(step)}, step=step, state={"step": step})


def dies_unanswered(trial):
    """Is killed while it waits for its second answer, once the checkpoint of its first report is handed over."""

    def end():
        wait_for("arrived")
        gate.set()
        wait_until_written()
        os.kill(os.getpid(), signal.SIGKILL)

    with held_up() as gate:
        gate.clear()
        trial.report({"loss": 1.0}, step=0, state={"w": LARGE})
        threading.Thread(target=end).start()
        trial.report({"loss": 1.0}, step=1)


def catches(trial):
    """Counts the errors of reports, and goes on after them with the same step."""
    errors, limit, step = [], contextlib.ExitStack(), 0
    if trial.config.get("limited"):
        limit.enter_context(no_large_files())
    with limit:
        while step < 4:
            try:
                trial.report({"loss": float(step)}, step=step, state={"step": step, "x": LARGE if step == 0 else b""})
            except OSError as error:
                errors.append([step, type(error).__name__, str(error)])
            else:
                step += 1
    return {"errors": errors}


def too_large(trial):
    with no_large_files():
        trial.report({"loss": 1.0}, step=0, state=LARGE)
        wait_until_written()
    return finish(trial)


def finish(trial):
    match trial.config.get("end"):
        case "raise":
            raise KeyError("the user's own")
        case "exit":
            raise SystemExit(3)
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "wait":
            time.sleep(1000)
        case "report":
            trial.report({"loss": 1.0}, step=1, state=0)
    return {"loss": 1.0}


def saves_and(trial):
    trial.report({"loss": 1.0}, step=0, state={"w": LARGE})
    return finish(trial)


def saves_and_waits_for_thread(trial):
    """Ends only once the checkpoint is written and handed over."""
    trial.report({"loss": 1.0}, step=0, state={"w": LARGE})
    wait_until_written()
    return finish(trial)


def unstorable(trial):
    trial.report({"loss": 1.0}, step=0, state={"step": 0})
    try:
        trial.report({"loss": 1.0}, step=1, state={"bad": object()})
    except TypeError as error:
        trial.report({"loss": 1.0}, step=1)
        return {"error": str(error)}


def forks_while_saving(trial):
    """The copy comes back out of the user's code, as if it had run it."""
    with held_up() as gate:
        gate.clear()
        trial.report({"loss": 1.0}, step=0, state={"step": 0})
        pid = os.fork()
        if pid == 0:
            return {"loss": 666.0}
        _, status = os.waitpid(pid, 0)
        gate.set()
    return {"status": status}


class Stepped:
    def __init__(self):
        self.w = [0]

    def step(self):
        self.w[0] += 1
        return {"w": self.w[0], "done": self.w[0] == 3}

    def save(self):
        return {"w": self.w}

    def load(self, state):
        self.w = state["w"]


def ticking(trial):
    """Notes what it was told of each step that it asks about. Its clock may leap by an hour behind the first report."""
    told = []
    for step in range(trial.config["steps"]):
        if step == 1 and trial.config.get("leaps"):
            trial._deadline._clock = lambda: time.monotonic() + 3600.0
        if trial.config.get("asks", True):
            told.append(trial.should_checkpoint(step))
        trial.report({"loss": float(step)}, step=step, state=None if step in trial.config.get("bare", []) else {"s": step})
    return {"told": told}


def ticking_on(trial):
    """Goes on when a step cannot be saved."""
    for step in range(trial.config["steps"]):
        with contextlib.suppress(OSError):
            trial.report({"loss": float(step)}, step=step, state={"s": step})


def ticking_in_vain(trial):
    """The files of one step cannot be written, in the background; the reports go on."""
    from holdfast.storage.checkpoints.files import Sink

    enter, failing = Sink.__enter__, f"step_{trial.config['fails']:08d}-"

    def refuse(sink):
        if failing in sink._path:
            raise OSError(28, "no space left")
        return enter(sink)

    Sink.__enter__ = refuse
    try:
        for step in range(trial.config["steps"]):
            with contextlib.suppress(OSError):
                trial.report({"loss": float(step)}, step=step, state={"s": step})
            wait_until_written()
    finally:
        Sink.__enter__ = enter
