"""Processes that run trials have rows, and attempts name them; trials that run are found without a look at all others."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_WORKER = "whose process supervises it; null: the driver's own"


def upgrade() -> None:
    identity = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "worker",
        sa.Column("id", identity, nullable=False, comment="given by the database"),
        sa.Column("experiment_id", identity, nullable=False, comment="whose trials it runs"),
        sa.Column("epoch", sa.BigInteger(), nullable=False, comment="of the driver that it works for"),
        sa.Column("name", sa.Text(), nullable=False, comment="as the engine calls it"),
        sa.Column("engine", sa.Text(), nullable=False, comment="dask, ray, workpool or threads"),
        sa.Column("hostname", sa.Text(), nullable=False, comment="of its machine"),
        sa.Column("host", sa.Text(), nullable=False, comment="host, boot and pid namespace that its process runs in"),
        sa.Column("pid", sa.BigInteger(), nullable=False, comment="of its process"),
        sa.Column(
            "pid_started", sa.Text(), nullable=False, comment="start of that process, so that a recycled pid is told apart"
        ),
        sa.Column("about", sa.Text(), nullable=False, comment="JSON: versions of packages, devices, what it is not fit for"),
        sa.Column("joined", sa.BigInteger(), nullable=False, comment="microseconds since 1970 UTC"),
        sa.Column("seen", sa.Float(53), nullable=False, comment="its last beat, in seconds since 1970 by the database's clock"),
        sa.Column("left", sa.Text(), nullable=True, comment="why it left or was given up; null while it works"),
        sa.ForeignKeyConstraint(["experiment_id"], ["experiment.id"], name=op.f("fk_worker_experiment_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_worker")),
        comment="a process that runs trials of one drive; rows of the present only: in no journal, export or copy",
    )
    op.create_index("ix_worker_experiment", "worker", ["experiment_id"])
    _partial("ix_worker_working", "worker", ["experiment_id"], '"left" IS NULL')
    op.add_column(
        "experiment",
        sa.Column(
            "told",
            sa.Text(),
            server_default="continue",
            nullable=False,
            comment="the driver's order to all workers: continue, preempt or kill",
        ),
    )
    op.add_column(
        "experiment",
        sa.Column(
            "journaled",
            sa.BigInteger(),
            server_default="-1",
            nullable=False,
            comment="the seq that the journal reaches, as far as workers know; -1: nothing yet",
        ),
    )
    _refer_to_workers()
    _partial("ix_attempt_worker", "attempt", ["worker_id", "outcome"], "worker_id IS NOT NULL")
    _partial("ix_trial_running", "trial", ["experiment_id", "number"], "status = 'RUNNING'")


def _refer_to_workers() -> None:
    """Add a column that refers to a new table: SQLite takes the reference in the same statement only."""
    postgres = op.get_bind().dialect.name == "postgresql"
    op.execute(
        f"ALTER TABLE attempt ADD COLUMN worker_id {'BIGINT' if postgres else 'INTEGER'}"
        " CONSTRAINT fk_attempt_worker_id REFERENCES worker (id) ON DELETE SET NULL"
    )
    if postgres:  # SQLite keeps no comments
        op.alter_column("attempt", "worker_id", comment=_WORKER)


def _partial(name: str, table: str, columns: list[str], condition: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(condition), postgresql_where=sa.text(condition))
