"""Telemetry and engines' states know their place in the experiment's order, as every other row does."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COMMENT = "the experiment's seq; 0: written under schema 0001"


def upgrade() -> None:
    for table in ("telemetry", "proposer_state"):
        op.add_column(table, sa.Column("seq", sa.BigInteger(), server_default="0", nullable=False, comment=COMMENT))
