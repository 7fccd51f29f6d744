"""The process that runs user code: ``python -m holdfast.tasks.workers.child RECEIVE_FD SEND_FD PARENT_PID``.

It serves one job after the other until its parent is gone. Nothing heavy is imported here: a child starts for every
trial that fails, and its start-up is what such a trial costs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from holdfast.core.errors import HoldfastError, NotStorable, StorageError
from holdfast.storage.checkpoints.local import LocalCheckpoints
from holdfast.tasks.workers.attempt import Resume, choose, describe, perform
from holdfast.tasks.workers.messages import Decision, Frame, Job, Report, TelemetryRow, job_from, report_frame
from holdfast.tasks.workers.output import Output
from holdfast.tasks.workers.trainables import Trainable, load
from holdfast.tasks.workers.wire import Channel, SupervisorGone

OURS = (signal.SIGTERM, signal.SIGINT)
"""Signals that the parent answers."""
TELEMETRY_ROWS = 200
TELEMETRY_SECONDS = 1.0

_held = threading.local()
"""The signals that a forking thread had blocked itself"""


def main() -> None:
    """Serve jobs until the parent is gone."""
    receive_fd, send_fd, parent = (int(argument) for argument in sys.argv[1:4])
    for descriptor in (receive_fd, send_fd):
        os.set_inheritable(descriptor, False)
    _end_with(parent, receive_fd)
    for number in OURS:
        signal.signal(number, _leave_it_to_the_parent)
    faulthandler.enable(2)
    channel = Channel(receive_fd, send_fd)
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=lambda: _after_fork(channel))
    try:
        channel.send({"t": "ready"})
        Server(channel, Output()).serve()
    except SupervisorGone:
        pass
    os._exit(0)  # neither threads nor atexit functions of user code may keep a child alive


def _end_with(parent: int, receive_fd: int) -> None:
    """End this process group when ``parent`` is gone, whatever the user's code is busy with.

    The kernel's signal comes even while C code holds the interpreter; the thread takes along what user code started.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_watch, args=(receive_fd,), name="holdfast-guard", daemon=True).start()


def _watch(receive_fd: int) -> None:
    watcher = select.poll()
    watcher.register(receive_fd, 0)  # POLLHUP alone: the parent's end is closed
    watcher.poll()
    os.killpg(os.getpid(), signal.SIGKILL)


def _leave_it_to_the_parent(number: int, frame: FrameType | None) -> None:
    """Do nothing: a signal that a whole job gets is the parent's to answer; it has us save and stop.

    No SIG_IGN, which the user's own subprocesses would inherit.
    """


def _hold() -> None:
    """Keep signals waiting while this thread forks: one that comes before the new process answers for itself would be lost."""
    _held.before = signal.pthread_sigmask(signal.SIG_BLOCK, OURS)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.before)


def _after_fork(channel: Channel) -> None:
    channel.close()
    for number in OURS:
        if signal.getsignal(number) is _leave_it_to_the_parent:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    _let_go()


class _PipeLink:
    """Tell the supervisor; telemetry goes along with the next report, or once a second."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._rows: list[TelemetryRow] = []
        self._since = 0.0
        self._early: dict[str, Frame] = {}
        """answers that came before somebody waited for them, by kind"""

    def check(self) -> None:
        self._channel.check_owned()

    def report(self, report: Report) -> Decision:
        self._channel.send({**report_frame(report), **self.rows()})
        return Decision(self._answer("decision")["d"])

    def hand_over(self, report: Report) -> None:
        self._channel.send(report_frame(report, "saved"))

    def settle(self) -> None:
        answer = self._answer("stored")
        if answer["error"] is not None:
            raise (StorageError if answer["storable"] else NotStorable)(answer["error"])

    def _answer(self, kind: str) -> Frame:
        while kind not in self._early:
            frame = self._channel.receive()
            self._early[frame["t"]] = frame
        return self._early.pop(kind)

    def telemetry(self, row: TelemetryRow) -> None:
        now = time.monotonic()
        if not self._rows:
            self._since = now
        self._rows.append(row)
        if len(self._rows) >= TELEMETRY_ROWS or now - self._since >= TELEMETRY_SECONDS:
            self._channel.send({"t": "telemetry", **self.rows()})

    def rows(self) -> Frame:
        """Return the telemetry that waits, as a part of a frame."""
        rows, self._rows = self._rows, []
        return {"rows": rows} if rows else {}


class _Surroundings:
    """What user code may leave behind that would be felt by the next attempt."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._handlers = _handlers()
        self._children = _has_children()

    def clean(self) -> bool:
        """Tell whether there are no new threads, signal handlers or processes."""
        threads = any(thread.is_alive() for thread in threading.enumerate() if thread not in self._threads)
        return not threads and _handlers() == self._handlers and _has_children() <= self._children


_SIGNALS = sorted(signal.valid_signals())


def _handlers() -> list[object]:
    return [signal.getsignal(number) for number in _SIGNALS]


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


class Server:
    """Answer the frames that come."""

    def __init__(self, channel: Channel, output: Output) -> None:
        self._channel = channel
        self._output = output
        self._home = os.getcwd()
        self._trainables: dict[tuple[str, str], Trainable] = {}
        self._checkpoints: dict[str, LocalCheckpoints] = {}

    def serve(self) -> None:
        while True:
            frame = self._channel.receive()
            match frame["t"]:
                case "setup":
                    sys.path.extend(entry for entry in frame["path"] if entry not in sys.path)
                case "load":
                    self._load_early(frame["trainable"], frame["workdir"])
                case "probe":
                    self._probe(frame["trainable"], frame["workdir"])
                case "job":
                    self._job(job_from(frame))

    def _load(self, trainable: str, workdir: str) -> Trainable:
        key = (trainable, workdir)
        if key not in self._trainables:
            os.chdir(workdir)
            self._trainables[key] = load(trainable, workdir)
        return self._trainables[key]

    def _load_early(self, trainable: str, workdir: str) -> None:
        with contextlib.suppress(BaseException):  # the job that needs it will say so
            self._load(trainable, workdir)
        os.chdir(self._home)

    def _probe(self, trainable: str, workdir: str) -> None:
        try:
            self._channel.send({"t": "kind", "kind": self._load(trainable, workdir).kind})
        except HoldfastError as error:
            self._channel.send({"t": "refused", "reason": str(error)})
        except OSError as error:
            self._channel.send({"t": "refused", "reason": f"the working directory {workdir}: {error.strerror}"})
        os.chdir(self._home)

    def _job(self, job: Job) -> None:
        link = _PipeLink(self._channel)
        try:
            end = self._attempt(job, link)
        except SupervisorGone:
            raise
        except BaseException as error:  # noqa: BLE001  # user code may raise anything
            end = {"t": "failed", **vars(describe(error))}
        if not self._channel.owned:
            os._exit(0)  # user code forked, and the copy came back out of it
        self._output.flush()
        self._channel.send({**end, **link.rows()})

    def _attempt(self, job: Job, link: _PipeLink) -> Frame:
        self._output.into(job.log)
        trainable = self._load(job.trainable, job.workdir)
        os.chdir(job.workdir)
        checkpoints = self._checkpoints.setdefault(job.root, LocalCheckpoints(Path(job.root)))
        checkpoint = None
        if job.candidates:
            resume = choose(job, checkpoints)
            checkpoint = resume.checkpoint
            self._announce(job, resume)
        surroundings = _Surroundings()
        try:
            decision, metrics = perform(job, trainable, link, checkpoints, checkpoint)
        finally:
            if self._channel.owned:
                os.chdir(self._home)
        stopped = None if decision is None else decision.value
        return {"t": "ended", "metrics": metrics, "stopped": stopped, "clean": surroundings.clean()}

    def _announce(self, job: Job, resume: Resume) -> None:
        rejected = [[job.candidates.index(one.candidate), one.reason] for one in resume.rejected]
        self._channel.send({"t": "started", "resumed": resume.place, "rejected": rejected})
        self._channel.receive()  # "go"; instead of anything else this process is killed


if __name__ == "__main__":
    main()
