"""Who went on from whom in a population: rows from the audit, a data frame, lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.core.population import described
from holdfast.core.values import Scalar
from holdfast.storage.database.populations import EVOLVED
from holdfast.storage.database.reads import AuditRow

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class LineageRow:
    """One member that went on from another one's checkpoint with a changed config."""

    generation: int
    """from 0: the one at whose end that was decided"""
    trial: int
    attempt: int
    """the first attempt that runs so"""
    from_trial: int
    from_attempt: int
    """the attempt that had saved the checkpoint"""
    from_step: int
    changes: dict[str, tuple[Scalar, Scalar]]
    """parameters that differ from the other one's: (there, here); None for one that is inactive"""

    def __str__(self) -> str:
        words = (
            f"generation {self.generation}: trial {self.trial} goes on from trial {self.from_trial} at step {self.from_step}"
        )
        return f"{words}: {described(self.changes)}" if self.changes else words


def lineage_of(audit: Iterable[AuditRow]) -> list[LineageRow]:
    """Return the changes that the audit tells of, as they were decided."""
    return [
        LineageRow(
            generation=row.detail["generation"],
            **{**member, "changes": {name: (before, after) for name, (before, after) in member["changes"].items()}},
        )
        for row in audit
        if row.action == EVOLVED
        for member in row.detail["members"]
    ]


def lineage_df(rows: Sequence[LineageRow]) -> pd.DataFrame:
    """Return lineage as a frame; see :meth:`holdfast.Experiment.lineage_df`."""
    import pandas as pd

    columns = ["generation", "trial", "attempt", "from_trial", "from_step", "changes"]
    values = [[*(getattr(row, name) for name in columns[:-1]), described(row.changes)] for row in rows]
    return pd.DataFrame(values, columns=columns)


def lineage_lines(rows: Sequence[LineageRow], *, last: int = 20) -> Iterator[str]:
    """Yield the last changes, oldest first, and how many came before."""
    if len(rows) > last:
        yield f"{len(rows) - last} earlier changes are not shown"
    yield from map(str, rows[max(len(rows) - last, 0) :])


def origin_words(audit: Sequence[AuditRow]) -> str | None:
    """Return which experiment, and which trial, an experiment was forked at, or None when it was not."""
    found = next((row.detail for row in reversed(audit) if row.action == "forked"), None)
    return None if found is None else f"{found['name']} ({found['from']}) at trial {found['trial']}"
