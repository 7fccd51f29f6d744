"""Trials on a Ray cluster: one that runs, or one of this machine for the run."""

from __future__ import annotations

import logging
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import ray
from prefect.client.schemas import State
from prefect.exceptions import Pause
from prefect.futures import PrefectFuture
from prefect.tasks import Task
from prefect_ray.task_runners import PrefectRayFuture  # type: ignore[import-untyped]  # it ships no types
from ray import exceptions as errors
from ray._private import auto_init_hook
from ray._private.authentication import authentication_token_setup
from ray.util.client import common as client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from holdfast.core.errors import HoldfastError, Infrastructure
from holdfast.core.execution_section import Resources
from holdfast.flows.runners.asking import ANSWER_SECONDS, first_workers, lacking, refuse_unfit
from holdfast.flows.runners.port import End, How
from holdfast.settings import hush_ray, visible_gpus
from holdfast.tasks.executing import ask, execute_alone, pack_task
from holdfast.tasks.place import Place

_CONNECT_SECONDS = 30.0
"""How long a cluster that refuses is asked again: its head may have just begun, or have no time to start a process for us."""
_REFUSALS = 4
"""How often a head that answers is asked, however long that takes."""
_PAUSE_SECONDS = 1.0
_SILENT_MS = 30_000
_RESULT_SECONDS = 5.0
"""How long the state of a task that has ended is waited for; else rows tell what became of it."""
_STORE_BYTES = 100 << 20
"""The object store of a local cluster: only states go through it."""

_GONE = (
    errors.WorkerCrashedError,
    errors.NodeDiedError,
    errors.LocalRayletDiedError,
    errors.OutOfMemoryError,
    errors.ObjectLostError,
    errors.RayActorError,
)


class RayRunner:
    """Hands tasks to Ray. Each runs in a process of its own and is run once: a death is told, not repaired."""

    def __init__(self, address: str | None, resources: Resources, max_concurrent: int) -> None:
        self._address = address
        self._resources = resources
        self._max_concurrent = max_concurrent
        self._own = self._connects = False
        self._packet: tuple[int, Any] | None = None
        self._remote: Any = None
        self._lost: str | None = None
        """why nothing can be asked of the cluster any more: where a new head took its place, Ray's client does not know"""
        self._cause: Exception | None = None

    @property
    def _needed(self) -> dict[str, float]:
        gpu = {"GPU": float(self._resources.gpu)} if self._resources.gpu else {}
        return {"CPU": float(self._resources.cpu), **gpu, **self._resources.custom}

    def __enter__(self) -> Self:
        hush_ray()
        if not ray.is_initialized():
            with _same_signals():
                try:
                    self._start()
                except BaseException:
                    ray.shutdown()  # a half-made connection would be the next search's
                    raise
            self._own = True
        # Whoever asks for anything once the cluster is gone would wait for another one, named by a file of this machine.
        self._connects, auto_init_hook.enable_auto_connect = auto_init_hook.enable_auto_connect, False
        # One function for all trials: Ray would export it anew for each task otherwise.
        self._remote = ray.remote(
            max_retries=0,
            num_cpus=self._resources.cpu,
            num_gpus=self._resources.gpu,
            resources=dict(self._resources.custom),
        )(execute_alone)
        return self

    def _start(self) -> None:
        deadline = time.monotonic() + (_CONNECT_SECONDS if self._address else 0.0)
        refused = 0
        while True:
            try:
                self._init()
            except (ConnectionError, OSError, RuntimeError, ValueError, errors.RayError) as error:
                # A head answers, and its process for us came to nothing: under load that alone may take all the time.
                refused += isinstance(error, ConnectionAbortedError)
                is_patient = time.monotonic() < deadline or 0 < refused < _REFUSALS
                if not isinstance(error, ValueError) and is_patient:
                    time.sleep(_PAUSE_SECONDS)
                    continue
                where = self._address or "this machine"
                raise Infrastructure(
                    f"no Ray cluster answers at {where} ({type(error).__name__}: {error}); start one (`ray start --head`), "
                    "mend execution.address, or let RAY_AUTH_TOKEN have the token of one that wants it"
                ) from error
            return

    def _init(self) -> None:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "holdfast"}
        if self._address is not None:
            _notice_silence()
            _show_token()
            ray.init(address=self._address, **quiet)
            return
        most = self._max_concurrent
        ray.init(
            address="local",
            num_cpus=most * self._resources.cpu,
            num_gpus=len(visible_gpus(needed=most * self._resources.gpu)) if self._resources.gpu else 0,
            resources={name: amount * most for name, amount in self._resources.custom.items()} or None,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            **quiet,
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None:
        auto_init_hook.enable_auto_connect = self._connects
        if self._own:
            with _same_signals():
                ray.shutdown()

    def _nodes(self) -> list[dict[str, Any]]:
        nodes: Any = ray.nodes  # Ray has no types there
        return [node for node in nodes() if node.get("Alive") or node.get("alive")]

    def check(self, place: Place) -> None:
        with self._reached():
            self._ask(place)

    def _ask(self, place: Place) -> None:
        nodes = first_workers(self._fitting, self._nobody)
        asked = ray.remote(max_retries=0, num_cpus=0)(ask)
        packet = ray.put(place)
        references = {
            asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(packet): node
            for node in nodes
        }
        ready, late = ray.wait(list(references), num_returns=len(references), timeout=ANSWER_SECONDS)
        said = [(str(references[one]["NodeManagerHostname"]), [f"no answer in {ANSWER_SECONDS:g} s"]) for one in late]
        for one in ready:
            name = str(references[one]["NodeManagerHostname"])
            try:
                said.append((name, ray.get(one)[1]))
            except errors.RayError as error:
                said.append((name, [f"it did not answer: {_last_line(error)}"]))
        refuse_unfit(said)

    def _fitting(self) -> list[dict[str, Any]] | None:
        """Return the nodes that may be given a trial, None while there is none; others need not be able to run one."""
        return [node for node in self._nodes() if not lacking(self._needed, [node["Resources"]])] or None

    def _nobody(self) -> str:
        words = ", ".join(f"{amount:g} {name}" for name, amount in self._needed.items())
        return (
            f"none of the {len(self._nodes())} nodes of the Ray cluster at {self._address or 'this machine'} has {words} for a "
            "trial; start one that has (`ray start --address ...`), or change execution.resources"
        )

    def submit(self, task: Task[..., Any], parameters: dict[str, Any]) -> PrefectRayFuture[Any]:
        if self._packet is None or self._packet[0] != id(task):
            self._packet = id(task), pack_task(task)
        run = uuid.uuid4()
        name = f"trial-{parameters['trial']}#{parameters['attempt']}"
        with self._reached():
            reference = self._remote.options(name=name).remote(self._packet[1], run, parameters)
            reference.hex()  # a client waits here for the head's answer, not where it is asked for a callback
        return PrefectRayFuture(task_run_id=run, wrapped_future=reference)

    def withdraw(self, future: PrefectFuture[Any]) -> None:
        assert isinstance(future, PrefectRayFuture)
        with self._reached():
            ray.cancel(future.wrapped_future, force=False, recursive=False)

    def ended(self, future: PrefectFuture[Any]) -> End:
        assert isinstance(future, PrefectRayFuture)
        try:
            found = ray.get(future.wrapped_future, timeout=_RESULT_SECONDS)
        except _GONE as error:
            return End(how=How.LOST, why=f"Ray: {_last_line(error)}")
        except Pause:
            return End(how=How.UNCLEAR, why="the flow run is suspended", is_suspended=True)
        except Exception as error:  # noqa: BLE001  # whatever a worker raised that could not even begin the task
            self.look()
            return End(how=How.UNCLEAR, why=f"Ray: {type(error).__name__}: {_last_line(error)}")
        if isinstance(found, State):
            return End(how=How.STATE, state=found)
        return End(how=How.UNCLEAR, why=f"Ray returned {type(found).__name__}")

    def look(self) -> None:
        if self._lost is None and not ray.is_initialized():
            self._lost = "Ray's client has given it up"
        if self._lost is not None:
            raise Infrastructure(
                f"the Ray cluster at {self._address or 'this machine'} is gone ({self._lost}); see to it, then restore the "
                "search"
            ) from self._cause

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Raise Infrastructure for whatever Ray's client raises in the body: it has many words for a head that is gone."""
        self.look()
        try:
            yield
        except HoldfastError:
            raise
        except Exception as error:  # noqa: BLE001  # and many kinds of exceptions
            self._lost, self._cause = f"{type(error).__name__}: {_last_line(error)}", error
            self.look()


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if isinstance(error, _GONE) else lines[-1]


def _notice_silence() -> None:
    """Let Ray's client give up a head that does not answer after half a minute: by itself it waits for ten.

    So long a submission could take, and meanwhile the search would not look after anything else.
    """
    options: list[tuple[str, Any]] = client.GRPC_OPTIONS  # shared by reference: it is changed in its place
    options[:] = [(name, _SILENT_MS if name == "grpc.keepalive_timeout_ms" else value) for name, value in options]


def _show_token() -> None:
    """Let Ray's client show the token that this user has: other drivers do so by themselves, and heads want it then."""
    log = logging.getLogger(authentication_token_setup.__name__)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    finally:
        log.setLevel(before)


@contextmanager
def _same_signals() -> Iterator[None]:
    """Let nothing in the body change what signals do: Ray would make SIGTERM end this process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    utils: Any = ray._private.utils
    theirs, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
