"""A pool of warm child processes, each bound to a slot with devices of its own."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from holdfast.core.errors import Conflict, Infrastructure, SpecError, TrainableError, TrialCrashed
from holdfast.core.trial import Outcome
from holdfast.tasks.workers.messages import Ended, Job, Supervision
from holdfast.tasks.workers.processes import MARKER
from holdfast.tasks.workers.reaper import Reaper
from holdfast.tasks.workers.supervise import Attempt
from holdfast.tasks.workers.worker import Worker, WorkerDied

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
DEVICES = "CUDA_VISIBLE_DEVICES"


class WorkerPool:
    """Runs up to ``size`` attempts at once, each in a child process that is reused after a clean end.

    ``gpus`` are the devices to share out, ``gpus_per_trial`` to each slot; without ``gpus`` those of the environment's
    CUDA_VISIBLE_DEVICES. Thread-safe. SpecError when there are too few devices.
    """

    def __init__(
        self, size: int, *, cpu_per_trial: int = 1, gpus: Sequence[str] | None = None, gpus_per_trial: int = 0
    ) -> None:
        if gpus is None and gpus_per_trial:
            gpus = [device for device in os.environ.get(DEVICES, "").split(",") if device]
        if gpus_per_trial and len(gpus or ()) < size * gpus_per_trial:
            raise SpecError(
                f"{size} concurrent trials with {gpus_per_trial} GPUs each need {size * gpus_per_trial} devices, "
                f"{len(gpus or ())} are given; lower search.max_concurrent or name them in {DEVICES}"
            )
        self._environments = [_environment(slot, cpu_per_trial, gpus, gpus_per_trial) for slot in range(size)]
        self._slots: queue.LifoQueue[int] = queue.LifoQueue()  # the one used last is the warm one
        for slot in reversed(range(size)):
            self._slots.put(slot)
        self._idle: dict[int, Future[Worker]] = {}
        self._busy: set[Worker] = set()
        self._warm_up: tuple[str, str] | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._reaper = Reaper()
        # children get a signal when the thread that started them ends: one that lasts as long as the pool starts them all
        self._spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="holdfast-spawner")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def run(self, job: Job, supervision: Supervision) -> Ended:
        """Run ``job`` in a child and return how it ended; waits for a slot when all are taken.

        Raises TrialFailed with the original error of the user's code, a trainable that cannot be loaded among them;
        TrialTimedOut; TrialCrashed, which says how the process died; StorageError when the child cannot write or read
        checkpoints; Infrastructure when no child can be started; whatever a method of ``supervision`` raises. Nothing of
        the attempt runs any more when this raises. An attempt that :meth:`close` interrupts counts as preempted.
        """
        slot = self._slots.get()
        worker: Worker | None = None
        reusable = False
        try:
            worker = self._take(slot)
            self._warm_up = (job.trainable, job.workdir)
            verdict = Attempt(worker, job, supervision).run()
            reusable = verdict.reusable
            return verdict.ended
        except TrialCrashed:
            if self._closed.is_set():
                return Ended(outcome=Outcome.PREEMPTED)
            if worker is not None and not worker.ready:
                raise Infrastructure(_no_start(worker)) from None
            raise
        finally:
            self._give_back(slot, worker, reusable=reusable)

    def probe(self, trainable: str, workdir: str, timeout: float = 60.0) -> str:
        """Load ``trainable`` in a child, which stays warm for the first trial; return its kind: function, class or callable.

        TrainableError with the reason when it cannot be loaded within ``timeout`` seconds, or is none of the kinds.
        """
        slot = self._slots.get()
        worker: Worker | None = None
        reusable = False
        try:
            worker = self._take(slot)
            worker.send({"t": "probe", "trainable": trainable, "workdir": workdir})
            frame = worker.receive(timeout)
            if frame is None:
                raise TrainableError(f"{trainable}: importing it took longer than {timeout:g} s")
            if frame["t"] == "refused":
                raise TrainableError(str(frame["reason"]))
            reusable = True
            self._warm_up = (trainable, workdir)
            return str(frame["kind"])
        except WorkerDied:
            assert worker is not None
            fate, lines = worker.fate(), worker.printed()
            if not worker.ready:
                raise Infrastructure(_no_start(worker)) from None
            last = "\n" + "\n".join(lines) if lines else ""
            raise TrainableError(f"{trainable}: importing it ended the process: {fate}{last}") from None
        finally:
            self._give_back(slot, worker, reusable=reusable)

    def close(self) -> None:
        """End all children and what they started; attempts that still run count as preempted. Idempotent."""
        with self._lock:
            self._closed.set()
            idle, self._idle = list(self._idle.values()), {}
            busy = list(self._busy)
        for worker in busy:
            worker.kill()  # its own thread disposes of it
        for future in idle:
            if not future.cancel():
                with contextlib.suppress(OSError):
                    future.result().dispose()
        self._spawner.shutdown(wait=True)
        self._reaper.close()

    def _take(self, slot: int, *, again: bool = True) -> Worker:
        with self._lock:
            if self._closed.is_set():
                raise Conflict("the worker pool is closed")
            future = self._idle.pop(slot, None) or self._spawn(slot)
        try:
            worker = future.result()
        except OSError as error:
            raise Infrastructure(f"a worker process could not be started: {error}") from error
        if again and not worker.alive:  # it died while it was idle: memory ran out, say
            worker.dispose()
            self._warm_up = None
            return self._take(slot, again=False)
        with self._lock:
            self._busy.add(worker)
            closed = self._closed.is_set()
        if closed:
            worker.kill()
        return worker

    def _give_back(self, slot: int, worker: Worker | None, *, reusable: bool) -> None:
        with self._lock:
            keep = reusable and not self._closed.is_set()
            if worker is not None:
                self._busy.discard(worker)
                if keep:
                    self._idle[slot] = _done(worker)
        try:
            if worker is not None and not keep:
                worker.dispose()
                with self._lock:
                    if not self._closed.is_set():
                        self._idle[slot] = self._spawn(slot)  # so that the next trial need not wait for it
        finally:
            self._slots.put(slot)

    def _spawn(self, slot: int) -> Future[Worker]:
        return self._spawner.submit(_spawn, self._environments[slot], self._reaper, self._warm_up)


def _spawn(environment: dict[str, str], reaper: Reaper, warm_up: tuple[str, str] | None) -> Worker:
    worker = Worker({**environment, MARKER: f"{os.getpid()}-{secrets.token_hex(4)}"}, reaper)
    if warm_up is not None:
        with contextlib.suppress(WorkerDied):  # whoever gets it will notice
            worker.send({"t": "load", "trainable": warm_up[0], "workdir": warm_up[1]})
    return worker


def _done(worker: Worker) -> Future[Worker]:
    future: Future[Worker] = Future()
    future.set_result(worker)
    return future


def _no_start(worker: Worker) -> str:
    return "a worker process could not be started:\n" + "\n".join(worker.printed())


def _environment(slot: int, cpus: int, gpus: Sequence[str] | None, gpus_per_trial: int) -> dict[str, str]:
    environment = {name: str(cpus) for name in THREADS} | dict(os.environ)
    if gpus is not None and gpus_per_trial:
        environment[DEVICES] = ",".join(gpus[slot * gpus_per_trial : (slot + 1) * gpus_per_trial])
    return environment
