"""Trials on a Dask cluster: one that runs, or one of this machine for the run."""

from __future__ import annotations

import multiprocessing.spawn
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import dask
import distributed
from distributed.scheduler import KilledWorker
from prefect.client.schemas import State
from prefect.exceptions import Pause
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.tasks import Task
from prefect_dask.task_runners import PrefectDaskFuture

from holdfast.core.errors import HoldfastError, Infrastructure
from holdfast.core.execution_section import Resources
from holdfast.flows.runners.asking import ANSWER_SECONDS, first_workers, lacking, refuse_unfit
from holdfast.flows.runners.port import End, How
from holdfast.report.observer import watching
from holdfast.settings import visible_gpus
from holdfast.tasks.executing import END_SECONDS, ask, end, execute, pack_task
from holdfast.tasks.place import Place

_RESULT_SECONDS = 5.0
"""How long the state of a task that has ended is waited for; else rows tell what became of it."""
_CONNECT_SECONDS = 30
_LOOK_SECONDS = 1.0
"""How long answers are waited for before another look at who is busy."""
_FIRST = 1000
"""The priority of a question: before trials that wait for a thread."""


class DaskRunner:
    """Hands tasks to a scheduler. A worker's death is told where the scheduler lets a task die with it.

    By default a scheduler runs such a task again elsewhere: the attempt's claim refuses that execution then.
    """

    def __init__(self, address: str | None, resources: Resources, max_concurrent: int) -> None:
        self._address = address
        self._max_concurrent = max_concurrent
        self._gpus = resources.gpu
        self._needed: dict[str, float] = {**({"GPU": float(resources.gpu)} if resources.gpu else {}), **resources.custom}
        self._stack = ExitStack()
        self._client: Any
        self._packet: tuple[int, bytes] | None = None
        self._where = address or "this machine"

    def __enter__(self) -> Self:
        with self._stack as stack:
            target: Any = self._address or stack.enter_context(self._cluster())
            try:
                self._client = stack.enter_context(_make_client(target))
            except (OSError, TimeoutError, ImportError, ValueError) as error:
                raise Infrastructure(
                    f"no Dask scheduler answers at {target} ({error}); start one (`dask scheduler`), or mend execution.address"
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None:
        if self._address is None and self._client.status == "running":
            # The cluster kills a worker that does not end within a few seconds, which is too short for its last words.
            with suppress(Exception):
                self._client.run(end, on_error="ignore", callback_timeout=END_SECONDS + _RESULT_SECONDS)
        self._stack.close()

    @contextmanager
    def _cluster(self) -> Iterator[Any]:
        workers = 1 if self._gpus else max(1, min(os.cpu_count() or 1, self._max_concurrent))
        threads = -(-self._max_concurrent // workers)
        offered = {name: amount * threads for name, amount in self._needed.items()}
        if self._gpus:  # one process deals the devices out, or two trials would get the same one
            offered["GPU"] = float(len(visible_gpus(needed=self._max_concurrent * self._gpus)))
        settings = {
            "distributed.scheduler.allowed-failures": 0,
            "distributed.admin.system-monitor.interval": "10s",
            "distributed.comm.timeouts.connect": f"{_CONNECT_SECONDS}s",
        }
        with (
            dask.config.set(settings),
            _without_main(),
            _make_cluster(
                n_workers=workers,
                threads_per_worker=threads,
                processes=True,
                host="127.0.0.1",
                dashboard_address=None,
                worker_dashboard_address=None,
                memory_limit=0,
                resources=offered,
                silence_logs=50,
            ) as cluster,
        ):
            yield cluster

    def check(self, place: Place) -> None:
        with self._reached():
            self._ask(place)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Raise Infrastructure for whatever a client raises in the body that has lost its scheduler, or loses it just then."""
        try:
            yield
        except HoldfastError:
            raise
        except Exception as error:
            raise Infrastructure(
                f"the Dask scheduler at {self._where} does not answer ({type(error).__name__}: {error}); see to it, then "
                "restore the search"
            ) from error

    def _ask(self, place: Place) -> None:
        fitting = first_workers(self._fitting, self._nobody)
        asked = {
            address: self._client.submit(
                ask, place, workers=[address], allow_other_workers=False, pure=False, retries=0, priority=_FIRST
            )
            for address in fitting
        }
        late = self._late(asked, {address: int(worker["nthreads"]) for address, worker in fitting.items()})
        said = [self._answer(address, question) for address, question in asked.items() if address not in late]
        self._client.cancel([asked[address] for address in late], reason="late", msg="nobody waits for it any more")
        passed = [address for address, is_excused in late.items() if is_excused and said]
        if passed:
            _say(f"Dask: not asked, since they are busy with other work, or have left: {', '.join(passed)}")
        words = f"no answer in {ANSWER_SECONDS:g} s; see whether it is busy, suspended or cut off, or end it"
        refuse_unfit([*said, *((address, [words]) for address in late if address not in passed)])

    def _late(self, asked: dict[str, Any], threads: dict[str, int]) -> dict[str, bool]:
        """Wait for answers; return whose are missing, and whether that is excused: others' tasks keep it busy, or it has left.

        It may be so for hours: once somebody has answered, such are not waited for.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            waiting = {address: question for address, question in asked.items() if not question.done()}
            late = {}
            if waiting:
                tasks = self._client.processing()
                for address, question in waiting.items():
                    late[address] = address not in tasks or len({*tasks[address]} - {question.key}) >= threads[address]
            if time.monotonic() > deadline or (all(late.values()) and len(late) < len(asked)):
                return late
            with suppress(TimeoutError, CancelledError), self._client.as_current():
                _wait(list(waiting.values()), timeout=_LOOK_SECONDS)

    def _answer(self, address: str, question: Any) -> tuple[str, list[str]]:
        try:
            name, reasons = question.result(timeout=_RESULT_SECONDS)
        except Exception as error:  # noqa: BLE001  # whatever kept a worker from even beginning to answer
            return address, [f"it did not answer: {type(error).__name__}: {error}"]
        return f"{name} ({address})", reasons

    def _workers(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.scheduler_info()["workers"]
        return found

    def _fitting(self) -> dict[str, Any] | None:
        """Return the workers that a trial may be sent to, None when there is none."""
        return {
            address: worker
            for address, worker in self._workers().items()
            if not lacking(self._needed, [worker.get("resources") or {}])
        } or None

    def _nobody(self) -> str:
        scheduler, workers = self._where, self._workers()
        if not workers:
            return f"the Dask scheduler at {scheduler} has no worker; start some with `dask worker {scheduler}`"
        words = " ".join(f"{name}={amount:g}" for name, amount in self._needed.items())
        return (
            f"none of the {len(workers)} workers of the Dask scheduler at {scheduler} has the resources {words}; start some "
            f'with `dask worker {scheduler} --resources "{words}"`, or change execution.resources'
        )

    def submit(self, task: Task[..., Any], parameters: dict[str, Any]) -> PrefectDaskFuture[Any]:
        if self._packet is None or self._packet[0] != id(task):
            self._packet = id(task), pack_task(task)
        run = uuid.uuid4()
        with self._reached():
            future = self._client.submit(
                execute,
                self._packet[1],
                run,
                parameters,
                key=f"trial-{parameters['trial']}-{parameters['attempt']}-{run}",
                pure=False,
                retries=0,
                resources=self._needed or None,
            )
        return PrefectDaskFuture(task_run_id=run, wrapped_future=future)

    def withdraw(self, future: PrefectFuture[Any]) -> None:
        assert isinstance(future, PrefectDaskFuture)
        if self._client.status == "running":
            with self._reached():
                self._client.cancel([future.wrapped_future], reason="withdrawn", msg="the search takes it back")

    def ended(self, future: PrefectFuture[Any]) -> End:
        assert isinstance(future, PrefectDaskFuture)
        try:
            found = future.wrapped_future.result(timeout=_RESULT_SECONDS)
        except KilledWorker as error:
            return End(how=How.LOST, why=f"Dask: worker {getattr(error.last_worker, 'address', error.last_worker)} is gone")
        except Pause:
            return End(how=How.UNCLEAR, why="the flow run is suspended", is_suspended=True)
        except CancelledError as error:
            return End(how=How.UNCLEAR, why=str(error))
        except Exception as error:  # noqa: BLE001  # whatever a worker raised that could not even begin the task
            return End(how=How.UNCLEAR, why=f"Dask: {type(error).__name__}: {error}")
        if isinstance(found, State):
            return End(how=How.STATE, state=found)
        return End(how=How.UNCLEAR, why=f"Dask returned {type(found).__name__}")

    def look(self) -> None:
        if self._client.status in ("closed", "closing"):
            raise Infrastructure(f"the Dask scheduler at {self._where} is gone; see to it, then restore the search")


def _say(text: str) -> None:
    caller = watching.get()
    get_run_logger().warning("%s", text)
    if caller is not None:
        with suppress(OSError):  # the terminal may be gone
            caller.say(text)


_make_cluster: Any = distributed.LocalCluster  # Dask has no types there
_wait: Any = distributed.wait


def _make_client(target: Any) -> Any:
    make: Any = distributed.Client
    return make(target, set_as_default=False, timeout=_CONNECT_SECONDS)


@contextmanager
def _without_main() -> Iterator[None]:
    """Let the workers of a local cluster not run the caller's script once more, as multiprocessing would have it."""
    original = multiprocessing.spawn.get_preparation_data

    def prepared(name: str) -> dict[str, Any]:
        data: dict[str, Any] = original(name)
        if name.startswith("Dask Worker process"):
            data = {key: value for key, value in data.items() if not key.startswith("init_main_from")}
        return data

    multiprocessing.spawn.get_preparation_data = prepared
    try:
        yield
    finally:
        multiprocessing.spawn.get_preparation_data = original
