"""What the driver wants of an engine that runs trials."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol, Self

from prefect.client.schemas import State
from prefect.futures import PrefectFuture
from prefect.tasks import Task

from holdfast.tasks.place import Place


class How(StrEnum):
    """How an execution of a task came to its end, as its engine tells it."""

    STATE = "state"
    """in a state of Prefect's"""
    LOST = "lost"
    """the process that ran it, or was about to, is gone"""
    UNCLEAR = "unclear"
    """in another way: it was taken back, or could not be begun, or the engine lost sight of it; it may still run"""


@dataclass(frozen=True, kw_only=True)
class End:
    """What an engine says of a future that called back."""

    how: How
    state: State[Any] | None = None
    """with STATE"""
    why: str = ""
    is_suspended: bool = False
    """whether somebody has suspended the flow run in Prefect"""
    is_unwanted: bool = False
    """whether somebody has cancelled this very trial in Prefect, where its own run shows that"""


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

    def ended(self, future: PrefectFuture[Any]) -> End:
        """Say how a future that called back came to its end; what it costs is a few seconds at most."""
        ...

    def look(self) -> None:
        """Raise Infrastructure when the engine itself is gone: nothing that it runs will ever call back."""
        ...
