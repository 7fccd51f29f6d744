"""The ports: what the layers below the flows promise. A port's docstring is its protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from holdfast.core.trial import Trial
from holdfast.core.values import Config, Scalar


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What becomes the next trial, in one transaction."""

    config: Config
    source: str = "proposed"
    """proposed, or preset: one of the spec's ``points``"""
    group: int | None = None
    """number of the first of the trials that repeat this config; the trial's own number when it is the first"""
    repeat: int = 0
    state: bytes | None = None
    """what the engine wants to find again, as ``Trial.state`` of this trial; opaque to everybody else"""


class Proposer(Protocol):
    """Gives the configs of new trials. An own engine is a class with these two methods; ``size`` may be absent.

    A proposer is rebuilt from the stored trials after every restart, so ``propose(n)`` must depend on nothing but the
    spec (its seed included), ``n``, and the trials observed (the state in them included): never on the order in which
    running trials end when they ended before the call, on earlier calls of ``propose``, on a clock or on global random state.
    """

    @property
    def size(self) -> int | None:
        """Number of trials after which there is nothing new to propose (a grid), or None."""
        ...

    def observe(self, trial: Trial) -> None:
        """Take in a trial as it stands.

        Called for every stored trial in number order on a rebuild, and again whenever one of them changes. Numbers below 0
        are trials merged from other experiments; what has another ``source`` than proposed was not asked for by
        :meth:`propose`, and stands between proposals whose numbers are then not dense. PENDING and
        RUNNING ones count as running with their parameters; COMPLETED and PRUNED ones with finite values of every
        objective count as results; all others are known to have been tried, without a result.
        """
        ...

    def propose(self, number: int) -> Proposal | Mapping[str, Scalar]:
        """Return a config for trial ``number``, which is one more than the last observed; a proposal to say more.

        Repeats itself exactly when called again in the same state. The config is not observed until it comes back
        through :meth:`observe`. Raises :class:`~holdfast.core.errors.Exhausted` when there is nothing more to propose.
        """
        ...


class RetryingProposer(Proposer, Protocol):
    """An engine that can be asked for another config in the place of one that is not to be tried."""

    def propose(self, number: int, *, retry: int = 0) -> Proposal | Mapping[str, Scalar]:
        """As :meth:`Proposer.propose`; each ``retry`` from 1 gives another config, the same one whenever it is asked for."""
        ...


def as_proposal(offered: Proposal | Mapping[str, Scalar]) -> Proposal:
    """Return what a proposer offers as a proposal."""
    return offered if isinstance(offered, Proposal) else Proposal(config=dict(offered))
