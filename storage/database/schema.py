"""The schema: every table of the experiment store, with a comment on each column.

Times are whole microseconds since 1970 in UTC: they order, compare and index alike on every database, and no time zone can
get lost. Lease times alone come from the database's clock. Digests, UUIDs and enum values are text.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

VERSION = "0003"
"""The revision that this program writes and reads."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> Column[int]:
    return Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, comment="given by the database")


def _ref(name: str, target: str, comment: str, *, nullable: bool = False, ondelete: str = "CASCADE") -> Column[int]:
    kind = BigInteger().with_variant(Integer, "sqlite")
    return Column(name, kind, ForeignKey(target, ondelete=ondelete), nullable=nullable, comment=comment)


def _text(name: str, comment: str, *, nullable: bool = False, **options: Any) -> Column[str]:
    return Column(name, Text, nullable=nullable, comment=comment, **options)


def _int(name: str, comment: str, *, nullable: bool = False, **options: Any) -> Column[int]:
    return Column(name, BigInteger, nullable=nullable, comment=comment, **options)


def _partial(name: str, condition: str, *columns: str) -> Index:
    """Return an index of the few rows that ``condition`` holds for: the others do not pay for it."""
    return Index(name, *columns, sqlite_where=text(condition), postgresql_where=text(condition))


def _value(*, nullable: bool = True) -> list[Column[Any]]:
    """Three columns that hold one typed value (see ``core.values.to_row``)."""
    return [
        _text("kind", "float, int, bool, str, null or json"),
        Column("number", Float(53), nullable=nullable, comment="the value of a finite float, an int up to 2^53, a bool"),
        _text("text", "the value otherwise: strings, JSON, nan, inf, large ints", nullable=nullable),
    ]


experiment = Table(
    "experiment",
    metadata,
    _id(),
    _text("uuid", "identity; never changes", unique=True),
    _text("name", "unique within the database", unique=True),
    _text("location", "absolute path of the experiment's folder when it was last driven"),
    _text("spec", "the frozen spec, canonical JSON, without locations and credentials"),
    _text("spec_source", "the text of the spec's file as it was given", nullable=True),
    _text("git_commit", "commit of the work tree that the spec's file lay in", nullable=True),
    _text("workdir", "folder that modules are imported from"),
    _text("code_digest", "digest of the trainable's file", nullable=True),
    _text("copied_from", "UUID of the experiment that this one was copied from", nullable=True),
    _int("seed", "the seed that every other one derives from"),
    _int("created", "microseconds since 1970 UTC"),
    _int("seq", "counts every write; orders everything", default=0),
    _int("epoch", "rises each time the lease changes hands", default=0),
    _text("holder", "who drives it: JSON of host, pid, start of the process, flow run; null when nobody", nullable=True),
    Column("lease_expires", Float(53), nullable=True, comment="seconds since 1970 by the database's clock"),
    Column("lease_renewed", Float(53), nullable=True, comment="seconds since 1970 by the database's clock"),
    Column("active_seconds", Float(53), nullable=False, default=0.0, comment="time that somebody drove it, summed"),
    _int("stop_requested", "1 after `holdfast stop`, until it is driven again", default=0),
    _text("ended", "why the last drive ended on its own accord; null while driven or after a crash", nullable=True),
    _text("told", "the driver's order to all workers: continue, preempt or kill", server_default="continue"),
    _int("journaled", "the seq that the journal reaches, as far as workers know; -1: nothing yet", server_default="-1"),
    comment="one search",
)

objective = Table(
    "objective",
    metadata,
    _id(),
    _ref("experiment_id", "experiment.id", "whose"),
    _int("position", "order in the spec, from 0"),
    _text("name", "the metric"),
    _text("direction", "min or max"),
    UniqueConstraint("experiment_id", "position"),
    UniqueConstraint("experiment_id", "name"),
    comment="a metric that counts",
)

config = Table(
    "config",
    metadata,
    _id(),
    _text("digest", "identity of the canonical JSON", unique=True),
    _text("body", "canonical JSON: sorted keys, declared types"),
    comment="parameter values, stored once per distinct value and shared by trials and experiments",
)

worker = Table(
    "worker",
    metadata,
    _id(),
    _ref("experiment_id", "experiment.id", "whose trials it runs"),
    _int("epoch", "of the driver that it works for"),
    _text("name", "as the engine calls it"),
    _text("engine", "dask, ray, workpool or threads"),
    _text("hostname", "of its machine"),
    _text("host", "host, boot and pid namespace that its process runs in"),
    _int("pid", "of its process"),
    _text("pid_started", "start of that process, so that a recycled pid is told apart"),
    _text("about", "JSON: versions of packages, devices, what it is not fit for"),
    _int("joined", "microseconds since 1970 UTC"),
    Column("seen", Float(53), nullable=False, comment="its last beat, in seconds since 1970 by the database's clock"),
    _text("left", "why it left or was given up; null while it works", nullable=True),
    Index("ix_worker_experiment", "experiment_id"),
    _partial("ix_worker_working", '"left" IS NULL', "experiment_id"),
    comment="a process that runs trials of one drive; rows of the present only: in no journal, export or copy",
)

trial = Table(
    "trial",
    metadata,
    _id(),
    _ref("experiment_id", "experiment.id", "whose"),
    _int("number", "dense from 0 within the experiment; below 0: merged from another one"),
    _ref("config_id", "config.id", "what is evaluated"),
    _text("status", "PENDING, RUNNING, COMPLETED, PRUNED, FAILED, TIMED_OUT, CANCELLED or SKIPPED"),
    _int("seq", "the experiment's seq at the last change"),
    _int("ended_seq", "the experiment's seq when it last ended: the completion cursor", nullable=True),
    _int("current_attempt", "number of the attempt that counts", default=1),
    _int("seed", "given to every attempt"),
    _int("group_number", "trials that repeat one config share it: the first one's number", nullable=True),
    _int("repeat", "place within the group, from 0", default=0),
    _int("created", "microseconds since 1970 UTC"),
    _int("ts_start", "not to be started before; microseconds since 1970 UTC", nullable=True),
    _text("source", "proposed, queued, preset or merged"),
    _text("origin", "NAME#NUMBER@UUID of the trial that it was merged from", nullable=True),
    _text("metadata", "JSON values by name", default="{}"),
    _int("cancel_requested", "1 after `holdfast cancel`", default=0),
    UniqueConstraint("experiment_id", "number"),
    Index("ix_trial_changes", "experiment_id", "seq"),
    _partial("ix_trial_cancel", "cancel_requested = 1", "experiment_id", "number"),
    _partial("ix_trial_running", "status = 'RUNNING'", "experiment_id", "number"),
    comment="one config under evaluation",
)

attempt = Table(
    "attempt",
    metadata,
    _id(),
    _ref("trial_id", "trial.id", "whose"),
    _int("number", "from 1 within the trial"),
    _ref("config_id", "config.id", "what this attempt runs; differs from the trial's first under population based training"),
    _ref(
        "parent_id",
        "attempt.id",
        "the attempt, maybe another trial's, whose checkpoint it continues; null: from step 0",
        nullable=True,
    ),
    _int("parent_step", "step of that checkpoint", nullable=True),
    _text("reason", "first, retry, resume, restart or exploit"),
    _text("note", "what a reader should know: rejected checkpoints, adoption", default=""),
    _int("created", "microseconds since 1970 UTC"),
    _int("epoch", "of the driver that it ran under; null until claimed", nullable=True),
    _text("claimed_by", "the fencing token; null until claimed", nullable=True),
    _int("started", "when it was claimed; microseconds since 1970 UTC", nullable=True),
    _int("ended", "microseconds since 1970 UTC", nullable=True),
    _text(
        "outcome", "completed, pruned, failed, timed_out, crashed, lost, preempted or cancelled; null while open", nullable=True
    ),
    _text("error_kind", "class of the original exception", nullable=True),
    _text("error", "its message", nullable=True),
    _text("traceback", "its traceback", nullable=True),
    _text("result", "path of the persisted result, relative to the experiment's", nullable=True),
    _text("flow_run_id", "Prefect's", nullable=True),
    _text("task_run_id", "Prefect's", nullable=True),
    _text("host", "host, boot and pid namespace that the child process ran in", nullable=True),
    _int("pid", "of the child process", nullable=True),
    _text("pid_started", "start of that process, so that a recycled pid is told apart", nullable=True),
    _ref("worker_id", "worker.id", "whose process supervises it; null: the driver's own", nullable=True, ondelete="SET NULL"),
    UniqueConstraint("trial_id", "number"),
    _partial("ix_attempt_worker", "worker_id IS NOT NULL", "worker_id", "outcome"),
    _partial("ix_attempt_parent", "parent_id IS NOT NULL", "parent_id"),
    comment="one execution of a trial",
)

report = Table(
    "report",
    metadata,
    _id(),
    _ref("attempt_id", "attempt.id", "who reported"),
    _int("step", "from 0; -1 is the final record"),
    _int("seq", "the experiment's seq"),
    _int("reported", "microseconds since 1970 UTC"),
    _text("decision", "what the stopping rule answered: continue, prune, cancel or preempt"),
    UniqueConstraint("attempt_id", "step"),
    comment="metric values at a step; of several attempts at one step, the newest on the chain is canonical",
)

metric = Table(
    "metric",
    metadata,
    _ref("report_id", "report.id", "which report"),
    _text("name", "the metric"),
    *_value(),
    UniqueConstraint("report_id", "name"),
    comment="one value of a report",
)

telemetry = Table(
    "telemetry",
    metadata,
    _id(),
    _ref("attempt_id", "attempt.id", "who measured"),
    _int("ts", "microseconds since 1970 UTC"),
    _text("name", "what was measured"),
    *_value(),
    _int("seq", "the experiment's seq; 0: written under schema 0001", server_default="0"),
    UniqueConstraint("attempt_id", "ts", "name"),
    comment="measurements beside the reports; sent again, they are stored once",
)

checkpoint = Table(
    "checkpoint",
    metadata,
    _id(),
    _ref("attempt_id", "attempt.id", "who saved"),
    _int("step", "from 0"),
    _int("seq", "the experiment's seq"),
    _text("path", "relative to the experiment's"),
    _text("digest", "of the manifest"),
    _int("bytes", "all files, without the manifest"),
    _int("created", "microseconds since 1970 UTC"),
    _text("status", "valid, corrupt or deleted"),
    _text("reason", "why it is corrupt", default=""),
    _int("pinned", "not pruned: 1 by a person, 2 while it is lent to a member of a population, 3 both", default=0),
    UniqueConstraint("attempt_id", "step"),
    comment="a published directory; the row decides which one counts",
)

proposer_state = Table(
    "proposer_state",
    metadata,
    _ref("experiment_id", "experiment.id", "whose"),
    _int("number", "the trial that was proposed with it"),
    Column("body", LargeBinary, nullable=False, comment="opaque to the store"),
    _int("seq", "the experiment's seq; 0: written under schema 0001", server_default="0"),
    UniqueConstraint("experiment_id", "number"),
    comment="what an engine keeps beside the trials",
)

audit = Table(
    "audit",
    metadata,
    _id(),
    _ref("experiment_id", "experiment.id", "whose"),
    _int("seq", "the experiment's seq"),
    _int("epoch", "the driver's"),
    _int("happened", "microseconds since 1970 UTC"),
    _text("action", "created, restored, taken over, changed, stopped ..."),
    _text("detail", "JSON", default="{}"),
    Index("ix_audit_experiment", "experiment_id", "seq"),
    comment="who did what to the experiment",
)
