"""What comes before a flow: checks, creation or reconciliation, the lease. Nothing here imports Prefect."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from holdfast import references, specfile
from holdfast.callables import dump, keep
from holdfast.core import faults
from holdfast.core.budget import Budget
from holdfast.core.errors import Corrupt, DatabaseError, ExperimentNotFound, SpecError, TrainableError
from holdfast.core.loop import CONTINUED, Ledger, is_continued
from holdfast.core.resume import Action, Planned
from holdfast.core.search_section import is_own
from holdfast.core.spec import CHANGEABLE, LOCATION_FIELDS, ExperimentSpec
from holdfast.core.trial import Trial, TrialStatus
from holdfast.core.values import Json, strict
from holdfast.engines import factory
from holdfast.engines.choosing import chosen
from holdfast.flows import reconcile
from holdfast.flows.changing import RestoreRequest, changed_spec
from holdfast.flows.hosts import check_hosts
from holdfast.flows.session import Session, begin, make_pool, runnable
from holdfast.flows.shipping import packed_of
from holdfast.flows.signals import undisturbed, why
from holdfast.flows.waiting import await_workers
from holdfast.holding import WentOn, end_children, liveness
from holdfast.locate import (
    Opened,
    check_free,
    check_merge,
    check_storage,
    code_digest,
    create,
    dated,
    experiment_path,
    folder_at,
    free_name,
    git_commit,
    open_path,
    placed,
)
from holdfast.report.observer import Observer
from holdfast.storage.database import experiments, recovering, requests
from holdfast.storage.database.following import Followed
from holdfast.storage.database.leases import Leases, held
from holdfast.storage.database.reads import Reader
from holdfast.tasks.workers.pool import WorkerPool


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a spec came from: kept with the experiment."""

    source: str | None = None
    commit: str | None = None
    workdir: str = field(default_factory=os.getcwd)
    pickled: bytes | None = None
    """the trainable, when the spec was made with a callable"""


def check_spec(spec: ExperimentSpec, *, workdir: str, root: Path | None = None) -> WorkerPool | None:
    """Check what a spec names beyond itself: storage, database URL, engine, trainable. Return the workers, one of them warm.

    Raises SpecError or TrainableError; creates nothing.
    """
    check_hosts(spec)
    check_storage(spec)
    factory.check(spec, workdir=workdir)
    pool = make_pool(spec)
    probe(spec if root is None else runnable(spec, root), pool, workdir)
    return kept_pool(spec, pool)


def kept_pool(spec: ExperimentSpec, pool: WorkerPool | None) -> WorkerPool | None:
    """Return the pool that a drive uses after the look at the trainable: none where trials run elsewhere."""
    if pool is None or not spec.execution.is_remote:
        return pool
    pool.close()
    return None


def probe(spec: ExperimentSpec, pool: WorkerPool | None, workdir: str) -> None:
    """Load the trainable where it will run; TrainableError says why it cannot be."""
    try:
        if pool is None:
            from holdfast.tasks.workers.trainables import load

            load(spec.trainable, workdir)
        else:
            pool.probe(spec.trainable, workdir)
    except BaseException:
        if pool is not None:
            pool.close()
        raise


def checked_spec(
    spec: ExperimentSpec | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()
) -> tuple[specfile.ExperimentSpec, Origin]:
    """Return a spec from whatever names one, and where it came from; ``overrides`` change one from a file."""
    if references.is_reference(spec):
        saved = references.saved_spec(str(spec))
        data = specfile.apply_overrides(saved.data, overrides, str(spec))
        checked = placed(specfile.ExperimentSpec.parse(data, source=str(spec)))
        return checked, Origin(workdir=saved.workdir or os.getcwd())
    if isinstance(spec, (str, Path)):
        folder = Path(spec).absolute().parent
        checked = specfile.ExperimentSpec.from_file(spec, overrides)
        source = specfile.without_options(specfile.without_password(Path(spec).read_text()), checked)
        return placed(checked), Origin(source=source, commit=git_commit(folder), workdir=str(folder))
    if overrides:
        raise SpecError("overrides change a spec that is read from a file; change the spec itself")
    if isinstance(spec, ExperimentSpec) and not isinstance(spec, specfile.ExperimentSpec):
        spec = {**spec.stored(), **{name: getattr(spec, name) for name in LOCATION_FIELDS}}
    checked = spec if isinstance(spec, specfile.ExperimentSpec) else specfile.ExperimentSpec.parse(spec)
    pickled = None if checked.function is None else dump(checked.function, whole=checked.execution.is_remote)
    return placed(checked), Origin(commit=git_commit(Path.cwd()), pickled=pickled)


def make_experiment(spec: ExperimentSpec, origin: Origin) -> Opened:
    """Create the experiment of a checked spec; a seed is drawn where it names none."""
    seed = spec.search.seed if spec.search.seed is not None else secrets.randbits(31)
    return create(
        spec.model_copy(update={"search": spec.search.model_copy(update={"seed": seed})}),
        seed=seed,
        workdir=origin.workdir,
        source=origin.source,
        commit=origin.commit,
        pickled=origin.pickled,
    )


def prepare_search(
    spec: ExperimentSpec, observer: Observer, origin: Origin | None = None, *, moment: datetime | None = None
) -> Restored:
    """Create the experiment of ``spec`` and take its lease; with ``if_exists: restore`` go on with the one that is there.

    Going on is a restore: what of the spec a restore may change takes effect, what it may not is refused. ``moment`` is what
    a date in the name is taken from (None: now).
    """
    origin = origin or Origin()
    spec = spec.model_copy(update={"name": dated(spec.name, (moment or datetime.now()).astimezone())})
    check_storage(spec)
    if spec.if_exists == "restore" and folder_at(experiment_path(spec), spec.storage_options).exists():
        return prepare_restore(_going_on(spec), observer)
    if spec.if_exists == "new":
        spec = spec.model_copy(update={"name": free_name(spec)})
    spec = chosen(spec)
    _refuse_live(spec)
    check_free(spec)
    check_merge(spec)
    observer.preparing()
    pool = _checked_pool(spec, origin)
    try:
        packed = packed_of(spec, origin.workdir)
        opened = make_experiment(spec, origin)
        observer.opened(opened, restored=False)
        session = begin(opened, pool, observer, action="started", detail={})
    except BaseException:
        if pool is not None:
            pool.close()
        raise
    session.packed = packed
    return Restored(opened=session.opened, plan=(), session=session)


def prepare_creation(spec: ExperimentSpec, origin: Origin) -> Opened:
    """Create the experiment of ``spec``, checked as for a search, and drive nothing.

    With ``if_exists: restore`` open the one that is there: SpecError when the spec says anything else of it.
    """
    spec = spec.model_copy(update={"name": dated(spec.name, datetime.now().astimezone())})
    check_storage(spec)
    if spec.if_exists == "restore" and folder_at(experiment_path(spec), spec.storage_options).exists():
        return _as_it_is(_going_on(spec))
    if spec.if_exists == "new":
        spec = spec.model_copy(update={"name": free_name(spec)})
    check_free(spec)
    check_merge(spec)
    spec = chosen(spec)
    pool = _checked_pool(spec, origin)
    if pool is not None:
        pool.close()
    packed_of(spec, origin.workdir)
    return make_experiment(spec, origin)


def _as_it_is(request: RestoreRequest) -> Opened:
    opened = open_path(request.path, database=request.database, options=request.storage_options)
    try:
        _, changes = changed_spec(opened, request)
        if changes:
            words = ", ".join(f"{key} (stored {before!r}, given {after!r})" for key, (before, after) in changes.items())
            raise SpecError(f"{request.path} exists with another {words}; only a restore changes that: holdfast.restore(...)")
    except BaseException:
        opened.close()
        raise
    return opened


def _going_on(spec: ExperimentSpec) -> RestoreRequest:
    """Return the restore that a spec with ``if_exists: restore`` asks for."""
    stored = spec.stored()
    return RestoreRequest(
        path=experiment_path(spec),
        storage_options=spec.storage_options,
        trainable=None if spec.trainable.startswith("pickle:") else spec.trainable,
        changes={key: stored[key.partition(".")[0]][key.partition(".")[2]] for key in CHANGEABLE},
        space=spec.space,
        objectives=spec.objectives,
        engine=spec.search.engine if is_own(spec.search.engine) else None,
        database=spec.database,
    )


def _checked_pool(spec: ExperimentSpec, origin: Origin) -> WorkerPool | None:
    """Check the spec with its trainable where it is before there is an experiment."""
    if origin.pickled is None:
        return check_spec(spec, workdir=origin.workdir)
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        keep(origin.pickled, Path(folder))
        return check_spec(spec, workdir=origin.workdir, root=Path(folder))


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What became of a request: a session to be driven, or nothing left to do."""

    opened: Opened
    plan: Sequence[Planned]
    session: Session | None
    trials: Sequence[Trial] = ()
    """where nothing is left to do: the experiment's own, as they stand"""


def plan_restore(request: RestoreRequest) -> tuple[Opened, list[Planned]]:
    """Return what a restore would do; changes nothing, whoever drives the experiment."""
    opened = open_path(request.path, database=request.database, options=request.storage_options, readonly=True)
    spec, _ = changed_spec(opened, request)
    reader = Reader(opened.database, opened.record.id)
    survey = reconcile.Survey(reader, opened.folder, request.policy, spec)
    return replace(opened, spec=spec), survey.plan()


def prepare_restore(request: RestoreRequest, observer: Observer) -> Restored:
    """Check the request, take the lease, mend what a crash left, apply the plan.

    Raises SpecError before anything is changed, LeaseHeld when a live process drives the experiment.
    """
    for _ in range(3):
        with suppress(WentOn):
            return _prepare_restore(request, observer)
    return _prepare_restore(request, observer)


def _prepare_restore(request: RestoreRequest, observer: Observer) -> Restored:
    opened = open_path(request.path, database=request.database, options=request.storage_options)
    spec, changes = changed_spec(opened, request)
    opened = replace(opened, spec=spec)
    for note in opened.notes:
        observer.say(note)
    reader = Reader(opened.database, opened.record.id)
    followed = Followed(reader)
    survey = reconcile.Survey(reader, opened.folder, request.policy, opened.spec, followed.own())
    plan = _plan(survey, request)
    if _is_superseded(opened, request):
        observer.say("somebody else went on with it, or it was told to stop, before this flow run began: nothing is done")
        return Restored(opened=opened, plan=plan, session=None, trials=survey.trials)
    if not changes and not request.force and not work_left(spec, survey.trials, plan, opened, request.new_trials):
        _refuse_held(opened)
        requests.note(opened.database, opened.record.id, "restored", {"trials": 0})
        observer.opened(opened, restored=True)
        observer.planned(plan)
        return Restored(opened=opened, plan=plan, session=None, trials=survey.trials)
    placed_spec = spec.model_copy(update={"database": request.database or spec.database})
    check_hosts(placed_spec, opened.record.spec.get("references", {}))
    check_storage(placed_spec)
    _refuse_held(opened, force=request.force)
    factory.check(spec, workdir=opened.record.workdir)
    observer.preparing()
    pool = make_pool(spec)
    try:
        probe(runnable(spec, opened.folder), pool, opened.record.workdir)
    except TrainableError as error:
        if request.trainable is not None or spec.trainable.startswith("pickle:"):
            raise
        raise TrainableError(f"{error}; if it is elsewhere now, say where: --trainable FILE.py:FUNCTION") from error
    pool = kept_pool(spec, pool)
    try:
        packed = packed_of(placed_spec, opened.record.workdir)
        session = _take_over(opened, pool, request, changes, observer, followed)
    except BaseException:
        if pool is not None:
            pool.close()
        raise
    session.packed = packed
    return Restored(opened=session.opened, plan=session.plan or (), session=session)


def _take_over(
    opened: Opened,
    pool: WorkerPool | None,
    request: RestoreRequest,
    changes: dict[str, Json],
    observer: Observer,
    followed: Followed,
) -> Session:
    detail = {"policy": {name: str(value) for name, value in vars(request.policy).items()}, "force": request.force}
    action = "restored" if request.continues is None else CONTINUED
    session = begin(opened, pool, observer, action=action, detail=detail, force=request.force, followed=followed)
    try:
        faults.point("restore.lease-taken")
        if not request.force:
            await_workers(session, observer.say)
        observer.opened(opened, restored=True)
        reader = session.reader
        dead = reconcile.open_attempts(followed.own())
        end_children(dead)
        survey = reconcile.Survey(reader, opened.folder, request.policy, opened.spec, followed.own())
        plan = _plan(survey, request)
        session.driver.set_code(
            trainable_digest=code_digest(opened.spec), workdir=opened.record.workdir, location=opened.folder.location
        )
        if opened.record.location != opened.folder.location:
            opened.folder.relocate(opened.folder.location)
        if changes:
            session.driver.change_spec(opened.spec.stored(), strict(changes))
        session.dead = reconcile.close_attempts(session, survey, {planned.trial: planned for planned in plan})
        faults.point("restore.reconciled")
        reconcile.apply(session, plan)
        faults.point("restore.planned")
    except BaseException as error:
        with undisturbed():
            session.keeper.release_quietly(why(error))
        raise
    session.new_trials, session.is_continuation = request.new_trials, request.continues is not None
    if request.continues is None:
        session.plan = plan
        observer.planned(plan)
    return session


def _plan(survey: reconcile.Survey, request: RestoreRequest) -> list[Planned]:
    """Return what the request does with each trial; what the drive left out that it goes on with stays left out."""
    plan = survey.plan()
    if request.continues is None:
        return plan
    return [replace(planned, action=Action.SKIP) if planned.status is TrialStatus.SKIPPED else planned for planned in plan]


def _is_superseded(opened: Opened, request: RestoreRequest) -> bool:
    """Tell whether the drive that a request goes on with is not the last one any more, or is not to go on."""
    if request.continues is None:
        return False
    known = recovering.look(opened.database, opened.record.id)
    last = max((note.epoch for note in known.notes if note.is_take), default=0)  # garbage may have been looked for since
    goes_on = is_continued(known.ended) and not known.stop_requested
    return request.continues != (opened.record.uuid, last) or not goes_on


def work_left(spec: ExperimentSpec, trials: Sequence[Trial], plan: Sequence[Planned], opened: Opened, new_trials: bool) -> bool:
    """Tell whether a restore would run, propose or change anything."""
    if any(planned.action not in (Action.KEEP, Action.SKIP) for planned in plan):
        return True
    if any(planned.action is Action.SKIP and planned.status != "SKIPPED" for planned in plan):
        return True
    if not new_trials:
        return False
    budget = Budget.of(spec)
    record = experiments.by_uuid(opened.database, opened.record.uuid)
    ledger = Ledger(budget=budget, max_concurrent=1, active_seconds=record.active_seconds if record is not None else 0.0)
    for trial in trials:
        ledger.update(trial, fresh=False)
    if ledger.closed() is not None:
        return False
    size = factory.size_of(spec, opened.record.seed, workdir=opened.record.workdir)  # an own engine is not asked in vain
    return size is None or ledger.proposed < size


def _refuse_live(spec: ExperimentSpec) -> None:
    """Raise LeaseHeld when the spec's name is taken by an experiment that is driven right now: no name helps then."""
    try:
        opened = open_path(experiment_path(spec), database=spec.database, options=spec.storage_options, readonly=True)
    except (ExperimentNotFound, Corrupt, DatabaseError):
        return  # whether the name is free is for check_free to say
    try:
        _refuse_held(opened)
    finally:
        opened.close()


def _refuse_held(opened: Opened, *, force: bool = False) -> None:
    """Raise LeaseHeld when a process that is seen alive on this host drives the experiment."""
    if force:
        return
    lease = Leases(opened.database, opened.record.id).look()
    if lease.is_held and lease.holder is not None and liveness(lease.holder):
        raise held(lease.holder, lease.remaining)
