"""Telemetry and engines' states know their place in the experiment's order, as every other row does; fewer indexes.

Each index is a page more that a commit writes. Those that go served no query that another one cannot serve as well.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COMMENT = "the experiment's seq; 0: written under schema 0001"
COMMENTS = {
    ("trial", "number"): "dense from 0 within the experiment; below 0: merged from another one",
    ("trial", "origin"): "NAME#NUMBER@UUID of the trial that it was merged from",
    ("trial", "metadata"): "JSON values by name",
    ("attempt", "parent_id"): "the attempt, maybe another trial's, whose checkpoint it continues; null: from step 0",
    ("attempt", "reason"): "first, retry, resume, restart or exploit",
    ("checkpoint", "pinned"): "not pruned: 1 by a person, 2 while it is lent to a member of a population, 3 both",
}


def upgrade() -> None:
    for table in ("telemetry", "proposer_state"):
        op.add_column(table, sa.Column("seq", sa.BigInteger(), server_default="0", nullable=False, comment=COMMENT))
    for table, index in (
        ("trial", "ix_trial_status"),
        ("trial", "ix_trial_ended"),
        ("trial", "ix_trial_config"),
        ("attempt", "ix_attempt_parent"),
    ):
        op.drop_index(index, table)
    for (table, column), comment in COMMENTS.items():
        if op.get_bind().dialect.name == "postgresql":  # SQLite keeps no comments
            op.alter_column(table, column, comment=comment)
    _partial("ix_trial_cancel", "trial", ["experiment_id", "number"], "cancel_requested = 1")
    _partial("ix_attempt_parent", "attempt", ["parent_id"], "parent_id IS NOT NULL")


def _partial(name: str, table: str, columns: list[str], condition: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(condition), postgresql_where=sa.text(condition))
