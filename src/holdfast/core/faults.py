"""Named crash points: every moment at which a crash leaves something half-done has a name here.

``point(name)`` does nothing unless a hook is installed (``holdfast.testing.faults``); it costs one attribute look-up.
"""

from __future__ import annotations

from collections.abc import Callable

POINTS: dict[str, str] = {
    "experiment.path-made": "the experiment's folder exists, its database rows do not",
    "experiment.database-drafted": "a new SQLite database is complete beside its place, which is empty",
    "experiment.rows-made": "the database rows exist, experiment.json does not",
    "lease.database-taken": "the lease is taken in the database, not in the path",
    "proposal.committed": "a proposal, its trial and first attempt are committed, not submitted",
    "population.gathered": "every member waits at the end of a generation, nothing is decided",
    "population.evolved": "what becomes of the members of a generation is committed, nobody goes on yet",
    "attempt.claimed": "an attempt is claimed and running, user code has not started",
    "attempt.failed": "a failure is committed, the task has not raised",
    "checkpoint.staged": "files are staged and fsynced, no manifest exists",
    "checkpoint.manifest-written": "the manifest is written, the directory is not renamed (or: the manifest is not uploaded)",
    "checkpoint.renamed": "the checkpoint is in place, no row names it",
    "checkpoint.committed": "checkpoint and report rows are committed, the trial has not been told",
    "checkpoint.pruned-row": "a pruned checkpoint's row is marked, its files are there",
    "checkpoint.pruned-renamed": "a pruned checkpoint is in the trash, its files are there",
    "report.committed": "a report without checkpoint is committed, the trial has not been told",
    "result.returned": "user code returned, the result is not persisted",
    "result.persisted": "the result is persisted, the row says RUNNING",
    "trial.completed": "the row says COMPLETED, the loop does not know yet",
    "restore.lease-taken": "a restore holds the lease and has changed nothing else",
    "restore.reconciled": "dead attempts are closed, the plan is not applied",
    "restore.planned": "the plan is applied, nothing is submitted",
    "journal.behind": "rows are committed that the journal does not hold",
    "journal.written": "the journal holds every row, nobody has been told",
    "journal.compacted": "the journal was written anew as one segment, the old ones are there",
    "search.finished": "every trial ended, the lease is not released",
    "search.continued": "a flow run has ended so that its search goes on in another one, which has not begun",
    "fork.linked": "a fork's files and journal are there, experiment.json is not",
    "fork.identified": "a fork is an experiment, no database knows it",
    "code.kept": "shipped code is in the path, no row names it",
    "code.unpacked": "shipped code is unpacked on a host, beside its place",
    "watch.claimed": "a watcher has claimed a restore, nothing is started",
    "upgrade.backed-up": "a database's backup is in place, its schema is the old one",
    "upgrade.migrated": "the new schema is written, not committed",
    "upgrade.committed": "the new schema is committed, nobody has been told",
}

_hook: Callable[[str], None] | None = None


def point(name: str) -> None:
    """Pass the crash point ``name``."""
    if _hook is not None:
        _hook(name)


def install(hook: Callable[[str], None] | None) -> None:
    """Install the hook that is called at each crash point, or remove it with None."""
    global _hook  # noqa: PLW0603  # one process, one laboratory
    _hook = hook
