"""Which checkpoints of a trial go when its attempt has saved another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from holdfast.core import retention
from holdfast.core.checkpoint import Checkpoint
from holdfast.storage.database.attempts import AttemptWriter


class Pruner:
    """Knows a trial's checkpoints while its attempt runs: a long trial has thousands, and to read them each time is slow.

    ``verified`` is the row id of the one that the attempt continued from: it was read back and found good. What may change
    of those that are known is read each time: whether one is valid, and whether it is pinned.
    """

    def __init__(self, policies: Sequence[retention.Policy], verified: int | None) -> None:
        self._policies = policies
        self._verified = verified
        self._everything = any(isinstance(policy, retention.KeepAll) for policy in policies)
        self._chain: dict[int, Checkpoint] | None = None
        """those on the attempt's chain by row id, oldest first"""

    def surplus(self, writer: AttemptWriter) -> list[Checkpoint]:
        """Return what is to be deleted: what no policy keeps, and what is off the attempt's chain; pinned ones stay."""
        superseded: list[Checkpoint] = []
        if self._chain is None:
            kept, superseded = writer.kept()
            self._chain = {one.id: replace(one, verified=one.id == self._verified) for one in kept}
        elif self._everything:
            return []
        else:
            self._chain = self._refreshed(writer, self._chain)
        surplus = [] if self._everything else retention.surplus(list(self._chain.values()), self._policies)
        return [*superseded, *surplus]

    @staticmethod
    def _refreshed(writer: AttemptWriter, chain: dict[int, Checkpoint]) -> dict[int, Checkpoint]:
        pins = writer.pins()
        known = {
            identity: one if one.pinned == pins[identity] else replace(one, pinned=pins[identity])
            for identity, one in chain.items()
            if identity in pins
        }
        added, _ = writer.kept(after=max(chain, default=0))
        return known | {one.id: one for one in added}
