"""What the driver wants of an engine that runs trials."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

from prefect.futures import PrefectFuture
from prefect.tasks import Task

from holdfast.tasks.place import Place


class Runner(Protocol):
    """Runs the tasks of trials. Entered within a flow run; what it started for the run ends with it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...

    def check(self, place: Place) -> None:
        """Let each worker that is there look whether it can run trials of ``place``; Infrastructure names those that cannot."""
        ...

    def submit(self, task: Task[..., Any], parameters: dict[str, Any]) -> PrefectFuture[Any]:
        """Hand a trial's task over and return its future, which calls back once it ended or its worker was lost."""
        ...

    def withdraw(self, future: PrefectFuture[Any]) -> None:
        """Take a task back that no worker has begun; one that runs is left alone."""
        ...
