"""Trials in threads of the search's own process, each of which supervises a child process."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from prefect.client.schemas import State
from prefect.exceptions import Pause
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task

from holdfast.flows.runners.port import End, How
from holdfast.tasks.place import Place


class ThreadRunner:
    """Prefect's own runner: a task begins as soon as it is handed over."""

    def __init__(self, max_workers: int) -> None:
        self._pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=max_workers)

    def __enter__(self) -> Self:
        self._pool.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None:
        self._pool.__exit__(kind, error, trace)

    def check(self, place: Place) -> None:
        """Do nothing: this process has been checked before there was an experiment."""

    def submit(self, task: Task[..., Any], parameters: dict[str, Any]) -> PrefectConcurrentFuture[Any]:
        return self._pool.submit(task, parameters)

    def withdraw(self, future: PrefectFuture[Any]) -> None:
        """Do nothing: there are as many threads as trials at once."""

    def ended(self, future: PrefectFuture[Any]) -> End:
        assert isinstance(future, PrefectConcurrentFuture)
        suspended = False
        try:
            future.wait()
        except Pause:  # raised here, and where a task begins, once somebody has suspended the flow run
            suspended = True
            if isinstance(future.wrapped_future.exception(), Pause):
                return End(how=How.UNCLEAR, why="the flow run is suspended", is_suspended=True)
        state: State[Any] = future.state
        return End(how=How.STATE, state=state, is_suspended=suspended)

    def look(self) -> None:
        """Do nothing: the engine is this process."""
