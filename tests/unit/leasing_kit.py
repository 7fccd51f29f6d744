"""What the tests of the lease share: a pause that passes at once, and who takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from store_kit import content

from holdfast.holding import holder, liveness
from holdfast.locate import Opened
from holdfast.storage import leasing
from holdfast.storage.leasing import Claimant, Keeper
from holdfast.testing.lab import dump


def never(_: float) -> None:
    raise AssertionError("nobody is to be waited for")


@dataclass
class Waiter:
    """A pause that passes at once, by its own clock, and lets something happen meanwhile."""

    meanwhile: Callable[[float], object] = lambda _: None
    now: float = 0.0
    said: list[str] = field(default_factory=list)

    def pause(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 120:
            raise AssertionError("waited for two minutes")
        self.meanwhile(self.now)

    def claimant(self, **changes: Any) -> Claimant:
        defaults = {"holder": holder(), "liveness": liveness, "say": self.said.append, "pause": self.pause}
        return Claimant(**{**defaults, "clock": lambda: self.now, **changes})


def take(opened: Opened, **changes: Any) -> Keeper:
    claimant = Waiter().claimant(**{"pause": never, **changes})
    return leasing.take(opened.database, opened.record.id, opened.folder, claimant, action="taken", detail={})


def state(opened: Opened) -> tuple[Any, ...]:
    return dump(opened.database), {name: body for name, body in content(opened.folder.path).items() if name != ".lock"}
