"""The ports: what the layers below the flows promise. A port's docstring is its protocol."""

from __future__ import annotations

from typing import Protocol

from holdfast.core.trial import Trial
from holdfast.core.values import Config


class Proposer(Protocol):
    """Gives the configs of new trials.

    A proposer is rebuilt from the stored trials after every restart, so ``propose(n)`` must depend on nothing but the
    spec (its seed included), ``n``, and the trials observed: never on the order in which running trials end when they
    ended before the call, on earlier calls of ``propose``, on a clock or on global random state.
    """

    size: int | None
    """Number of trials after which there is nothing new to propose (a grid), or None."""

    def observe(self, trial: Trial) -> None:
        """Take in a trial as it stands.

        Called for every stored trial in number order on a rebuild, and again whenever one of them changes. Numbers below 0
        are trials merged from other experiments; what has another ``source`` than proposed was not asked for by
        :meth:`propose`, and stands between proposals whose numbers are then not dense. PENDING and
        RUNNING ones count as running with their parameters; COMPLETED and PRUNED ones with finite values of every
        objective count as results; all others are known to have been tried, without a result.
        """
        ...

    def propose(self, number: int) -> Config:
        """Return a validated config for trial ``number``, which is one more than the last observed.

        Repeats itself exactly when called again in the same state. The config is not observed until it comes back
        through :meth:`observe`.
        """
        ...
