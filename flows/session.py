"""A session: one experiment that this process drives, from taking its lease to giving it back. Imports no Prefect."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.core.resume import Planned
from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import Attempt
from holdfast.core.values import Json
from holdfast.flows.naming import TAG, experiment_tag, trial_tag
from holdfast.flows.signals import undisturbed, why
from holdfast.holding import check_path, holder, liveness
from holdfast.locate import Opened
from holdfast.report.observer import Observer
from holdfast.settings import visible_gpus
from holdfast.storage.checkpoints.ports import checkpoints_in
from holdfast.storage.code import Packed
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.following import Followed
from holdfast.storage.database.leases import Leases, describe
from holdfast.storage.database.outbox import Outbox
from holdfast.storage.database.reads import Reader
from holdfast.storage.folder import TRAINABLE, Folder
from holdfast.storage.journal import JournalWriter
from holdfast.storage.leasing import Claimant, Keeper, take
from holdfast.tasks.runtime import Runtime
from holdfast.tasks.workers import processes
from holdfast.tasks.workers.messages import Decision
from holdfast.tasks.workers.pool import WorkerPool


@dataclass
class Session:
    """Everything that drives one experiment."""

    opened: Opened
    keeper: Keeper
    driver: Driver
    reader: Reader
    followed: Followed
    runtime: Runtime
    journal: JournalWriter
    new_trials: bool = True
    packed: Packed | None = None
    """the code that travels to workers; None where trials run on this machine"""
    plan: Sequence[Planned] | None = None
    """what a restore does with each stored trial; None for a fresh search"""
    dead: Sequence[Attempt] = field(default=())
    """attempts that a crash left open, closed by this session: their Prefect runs are to be closed too"""
    error: BaseException | None = None
    """what interrupted it: a flow's final state keeps words only"""
    stuck: Sequence[str] = ()
    """task runs whose code goes on in threads of this process, though it was told to stop: only the process can end"""
    continued: str | None = None
    """why the flow run that drove it ended, where the next one of this process goes on with it"""
    runs: int = 0
    """flow runs of this process that have driven it before"""
    is_prepared: bool = False
    """whether the caller of the flow has prepared it, and goes on with it after the flow run"""
    is_continuation: bool = False
    """whether it goes on with the drive of another process, as that one wanted"""
    is_seen: bool = True
    """whether anybody can look at the Prefect API that it runs on: an embedded server goes with the process"""

    @property
    def spec(self) -> ExperimentSpec:
        return self.opened.spec

    def next_run(self) -> bool:
        """Begin the next flow run of this process, when there has to be one; return whether there has."""
        if self.continued is None:
            return False
        self.continued, self.dead, self.runs = None, (), self.runs + 1
        return True

    def close(self) -> None:
        """End the workers and close the database; the lease is another matter."""
        self.keeper.abandon()
        if self.runtime.pool is not None:
            self.runtime.pool.close()
        if not self.keeper.is_lost:
            self.opened.folder.tidy()
        self.opened.close()


prepared: ContextVar[Session | None] = ContextVar("holdfast_session", default=None)
"""The session that the caller of a flow in this process has prepared for it."""


def prepared_session() -> Session | None:
    """Return the session that the caller prepared; flows ask by this function, since Prefect cannot pickle the variable."""
    return prepared.get()


def make_pool(spec: ExperimentSpec) -> WorkerPool | None:
    """Return the worker processes of a spec, none started yet; None with ``isolation: inline``.

    Where trials run elsewhere it is one, for the look at the trainable before there is anything.
    """
    if spec.execution.isolation == "inline":
        return None
    if spec.execution.is_remote:
        return WorkerPool(1)
    resources = spec.execution.resources
    gpus = visible_gpus(needed=spec.search.max_concurrent * resources.gpu) if resources.gpu else None
    return WorkerPool(spec.search.max_concurrent, cpu_per_trial=resources.cpu, gpus=gpus, gpus_per_trial=resources.gpu)


def runnable(spec: ExperimentSpec, place: Folder | Path) -> ExperimentSpec:
    """Return the spec with the trainable as a worker finds it: a pickled one lies in the experiment's folder.

    From an object store it is fetched; Corrupt when it is not there.
    """
    kind, _, rest = spec.trainable.partition(":")
    if kind != "pickle":
        return spec
    if isinstance(place, Folder):
        place.bring(TRAINABLE)
    root = place.path if isinstance(place, Folder) else place
    return spec.model_copy(update={"trainable": f"pickle:{root / rest}"})


_PROBE_SECONDS = 2.0
"""How long a lock is waited for before its suspended holder is taken to keep it."""


def _end_suspended(opened: Opened, observer: Observer) -> None:
    """End a suspended driver of this host that keeps the database locked: its lease is being taken from it anyway."""
    other = Leases(opened.database, opened.record.id).look().holder or {}
    host, pid, started = str(other.get("host")), int(other.get("pid") or 0), str(other.get("started"))
    if processes.is_suspended(host, pid, started) and opened.database.is_locked(patience=_PROBE_SECONDS):
        observer.say(f"{describe(other)} is suspended and keeps the database locked; it is ended")
        processes.kill(pid, started)


def begin(
    opened: Opened,
    pool: WorkerPool | None,
    observer: Observer,
    *,
    action: str,
    detail: dict[str, Json],
    force: bool = False,
    followed: Followed | None = None,
) -> Session:
    """Take the lease of an opened experiment and start to renew it; ``followed`` are its trials as they were seen before."""
    if force:
        _end_suspended(opened, observer)
    claimant = Claimant(holder=holder(), liveness=liveness, say=observer.say, force=force)
    keeper = take(
        opened.database,
        opened.record.id,
        opened.folder,
        claimant,
        action=action,
        detail=detail,
        uuid=opened.record.uuid,
        check=lambda: check_path(opened),
    )
    outbox = Outbox(opened.database, opened.record.id, keeper.epoch)
    writer = JournalWriter(opened.folder.root, keeper.epoch, outbox, keeper.check)
    keeper.journaled = lambda: writer.end
    try:
        writer.start()
    except BaseException as error:
        with undisturbed():
            keeper.release_quietly(why(error))
        raise
    reader = Reader(opened.database, opened.record.id)
    runtime = Runtime(
        uuid=opened.record.uuid,
        experiment=opened.record.id,
        epoch=keeper.epoch,
        spec=runnable(opened.spec, opened.folder),
        workdir=opened.record.workdir,
        database=opened.database,
        reader=reader,
        folder=opened.folder,
        checkpoints=checkpoints_in(opened.folder),
        pool=pool,
        journal=writer,
        held=keeper.check,
        tags=lambda trial: (TAG, experiment_tag(opened.record.name), trial_tag(trial)),
    )
    keeper.start(lambda: runtime.order(Decision.KILL))
    driver = Driver(opened.database, opened.record.id, keeper.epoch, seed=opened.record.seed)
    return Session(
        opened=opened,
        keeper=keeper,
        driver=driver,
        reader=reader,
        followed=followed or Followed(reader),
        runtime=runtime,
        journal=writer,
    )
