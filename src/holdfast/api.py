"""The public functions. Each checks everything that can be checked before it imports Prefect."""

from __future__ import annotations

import contextvars
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import references
from holdfast.core.errors import EngineError, HoldfastError
from holdfast.core.resume import Planned, ResumePolicy
from holdfast.core.space import Space
from holdfast.core.values import Json
from holdfast.experiment import Experiment
from holdfast.flows.changing import RestoreRequest
from holdfast.flows.prepare import Restored, checked_spec, plan_restore, prepare_creation, prepare_restore, prepare_search
from holdfast.flows.requesting import request_of
from holdfast.flows.server import EmbeddedServer
from holdfast.flows.serving import left_running
from holdfast.flows.session import Session, prepared
from holdfast.flows.signals import Terminated, raised, signal_of, undisturbed, why
from holdfast.holding import is_driven_by_path
from holdfast.locate import Opened, find
from holdfast.report.observer import Observer, restore_command, watching
from holdfast.result import SearchResult, result_of
from holdfast.settings import names_api, names_password
from holdfast.specfile import ExperimentSpec
from holdfast.standing import original_of
from holdfast.storage.filesystems import place_on
from holdfast.transfer import take_in

if TYPE_CHECKING:
    from prefect import Flow


log = logging.getLogger(__name__)


class _Recorder(Observer):
    """Passes everything on, and keeps the result: a flow's return value is a state."""

    def __init__(self, inner: Observer, server: EmbeddedServer) -> None:
        self.inner = inner
        self.server = server
        self.result: SearchResult | None = None
        self.command: str | None = None
        """what goes on with the experiment, once there is one"""
        self.left_running: str | None = None
        """the API of the server that `holdfast up` runs, if it is to be used"""
        self.say = inner.say  # type: ignore[method-assign]  # plain delegation
        self.planned = inner.planned  # type: ignore[method-assign]
        self.running = inner.running  # type: ignore[method-assign]
        self.trial = inner.trial  # type: ignore[method-assign]

    def opened(self, opened: Opened, *, restored: bool) -> None:
        self.command = restore_command(opened)
        self.inner.opened(opened, restored=restored)

    def preparing(self) -> None:
        if not names_api():  # a guess, made without importing Prefect: the server starts beside everything else
            found = left_running()
            if found is None:
                self.server.begin()
            elif found.is_protected and not names_password():
                self.say(
                    f"the server of `holdfast up` ({found.url}) asks for a password: set PREFECT_API_AUTH_STRING to use it"
                )
                self.server.begin()
            else:
                self.left_running = found.url
        self.inner.preparing()

    def ended(self, result: SearchResult) -> None:
        self.result = result
        self.inner.ended(result)


def search(
    spec: ExperimentSpec | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    filesystem: Any = None,
    observer: Observer | None = None,
) -> SearchResult:
    """Run a search to the end of its budget, as the Prefect flow ``search``, and return every trial.

    ``spec`` is a spec, its data, or the path of its file; ``overrides`` change one from a file. A spec that is made in Python
    may name its trainable by the callable itself, which then travels by cloudpickle and is kept with the experiment.
    ``filesystem`` is one of fsspec's or pyarrow's on which ``storage`` lies, in place of ``storage_options``.

    Raises SpecError and ExperimentExists (nothing was created), LeaseHeld or Fenced when somebody else drives the experiment,
    EngineError when Prefect cannot be reached, and what interrupted the search.
    """
    checked, origin = checked_spec(spec, overrides)
    if filesystem is not None:
        storage, options = place_on(checked.storage, checked.storage_options, filesystem)
        checked = checked.model_copy(update={"storage": str(storage), "storage_options": dict(options or {})})
    server = EmbeddedServer()
    watcher = _Recorder(observer or Observer(), server)
    with _signals(watcher):
        try:
            return _finish(prepare_search(checked, watcher, origin), watcher, server, restoring=False)
        finally:
            server.stop()


def create(spec: ExperimentSpec | Mapping[str, Any] | str | Path, *, overrides: Sequence[str] = ()) -> Experiment:
    """Create an experiment without running it, checked as :func:`search` would; ``restore`` runs it.

    With ``if_exists: restore`` the one that is there is opened as it is. Raises SpecError, TrainableError and
    ExperimentExists; nothing is created then.
    """
    checked, origin = checked_spec(spec, overrides)
    return Experiment(prepare_creation(checked, origin))


def restore(
    path: str | Path,
    trainable: str | None = None,
    *,
    resume_unfinished: bool = True,
    resume_errored: bool = False,
    restart_errored: bool = False,
    policy: ResumePolicy | Mapping[str, str] | str | None = None,
    space: Mapping[str, Any] | Space | None = None,
    references: Mapping[str, Any] | None = None,
    changes: Mapping[str, Json] | None = None,
    new_trials: bool = True,
    force: bool = False,
    database: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: Any = None,
    observer: Observer | None = None,
) -> SearchResult:
    """Restore an experiment from its path and run it to the end of its budget; return every trial of every status.

    Finished trials never run again. Unfinished ones go on from their newest valid checkpoint (``resume_unfinished``), or are
    left out; errored ones are kept, resumed or restarted. ``policy`` says the same in full and excludes the flags: a
    :class:`ResumePolicy`, or what one is made of, such as ``"errored=resume,finished=restart"``. ``space`` is compared,
    ``references`` replace the stored ones this time, ``changes`` are new values such as ``{"search.num_trials": 40}``.
    ``storage_options`` are an object store's, as in the spec; they are stored nowhere. ``filesystem`` is one of fsspec's or
    pyarrow's on which the path lies, in their place.

    Raises SpecError before anything is changed, LeaseHeld when a live process drives the experiment.
    """
    path, storage_options = place_on(path, storage_options, filesystem)
    request = request_of(
        path,
        trainable,
        resume_unfinished=resume_unfinished,
        resume_errored=resume_errored,
        restart_errored=restart_errored,
        policy=policy,
        space=space,
        references=references,
        changes=changes,
        new_trials=new_trials,
        force=force,
        database=database,
        storage_options=storage_options,
    )
    server = EmbeddedServer()
    watcher = _Recorder(observer or Observer(), server)
    with _signals(watcher):
        try:
            return _finish(prepare_restore(request, watcher), watcher, server, restoring=True)
        finally:
            server.stop()


def plan(request: RestoreRequest) -> list[Planned]:
    """Return what a restore would do with each stored trial; changes nothing."""
    opened, planned = plan_restore(request)
    opened.close()
    return planned


def can_restore(
    path: str | Path,
    *,
    database: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: Any = None,
) -> bool:
    """Tell whether :func:`restore` would work: the path is an intact experiment that no live process drives."""
    try:
        path, storage_options = references.place(*place_on(path, storage_options, filesystem))
        plan(RestoreRequest(path=path, database=database, storage_options=storage_options))
        opened = find(path, database=database, readonly=True, options=storage_options)
        with Experiment(opened) as experiment:
            folder = opened.folder
            lease = folder.lease()  # a damaged one has to be seen to first
            if original_of(folder, folder.identity(), storage_options) is not None:
                return True  # a copy is to become an experiment of its own: the lease is its original's
            return not is_driven_by_path(lease, opened.record.uuid) and not experiment.is_driven
    except (HoldfastError, OSError):
        return False


def open(
    target: str | Path,
    *,
    database: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: Any = None,
) -> Experiment:  # holdfast.open
    """Return a handle on a stored experiment, by its path or URL or, with ``database``, by its name or UUID.

    ``filesystem`` is one of fsspec's or pyarrow's on which the path lies, in place of an object store's ``storage_options``.
    A database that does not have the experiment, or an older state of it, is brought up to date from the path, and a copy
    whose original still exists becomes an experiment of its own: the log says so. Raises ExperimentNotFound, Corrupt or
    DatabaseError; nothing is changed then.
    """
    target, storage_options = place_on(target, storage_options, filesystem)
    opened = find(target, database=database, options=storage_options)
    for note in opened.notes:
        log.warning("%s", note)
    return Experiment(opened)


def fork(
    path: str | Path,
    name: str,
    *,
    at_trial: int | None = None,
    storage: str | Path | None = None,
    database: str | None = None,
    changes: Mapping[str, Json] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: Any = None,
) -> Experiment:
    """Make a new experiment that starts from the state of the one at ``path``, and return it; ``restore`` runs it.

    Every trial comes along, or with ``at_trial`` those with lower numbers: trial ``at_trial`` is the first that the fork
    proposes itself. Finished trials stay finished, errored ones keep their errors, what was running or waiting waits. The
    original is only read, and may be driven meanwhile. ``storage`` is where the fork goes, else beside the original;
    ``database`` is that of both. ``changes`` are new values such as ``{"search.seed": 2}``; ``storage_options`` and
    ``filesystem`` are an object store's, as for :func:`restore`.

    Raises InvalidInput, SpecError, ExperimentNotFound and ExperimentExists before anything is made; StorageError leaves
    nothing of the fork.
    """
    from holdfast.forking import fork as make_fork

    path, storage_options = place_on(path, storage_options, filesystem)
    where = None if storage is None else str(storage)
    opened = make_fork(
        path, name, at_trial=at_trial, storage=where, database=database, changes=changes, options=storage_options
    )
    for note in opened.notes:
        log.warning("%s", note)
    return Experiment(opened)


def import_experiment(file: str | Path, *, database: str | None = None) -> str:
    """Write the rows in a file that ``Experiment.export`` wrote into a database; return the experiment's path.

    ``database`` is a URL; else it is that of the storage which the experiment was exported from. Raises InvalidInput, Corrupt,
    Conflict (the database has it already) or ExperimentExists (its name is taken); nothing is changed then.
    """
    record, _, _ = take_in(Path(file), database)
    return record.location


@contextmanager
def _signals(watcher: _Recorder) -> Iterator[None]:
    """Turn the signals that end a process into an exception, until what was begun is ended in order; say how to go on."""
    with raised(signal.SIGTERM, signal.SIGHUP, pass_on=True):
        try:
            yield
        except BaseException as error:
            # The end of a flow says so by itself.
            if signal_of(error) is not None and watcher.result is None and watcher.command is not None:
                with suppress(OSError):  # the terminal may be gone
                    watcher.say(f"{why(error)}; go on with: {watcher.command}")
            raise


def _finish(restored: Restored, watcher: _Recorder, server: EmbeddedServer, *, restoring: bool) -> SearchResult:
    """Drive what is left to do, if there is anything; return the result."""
    if restored.session is not None:
        return _drive(restored.session, watcher, server, restoring=restoring)
    result = result_of(restored.opened, "nothing is left to do", plan=restored.plan, trials=restored.trials)
    restored.opened.close()
    watcher.ended(result)
    return result


def _drive(session: Session, watcher: _Recorder, server: EmbeddedServer, *, restoring: bool) -> SearchResult:
    """Run the flow of a prepared session; return its result, or raise what interrupted it."""
    session.is_prepared = True
    session_token, watcher_token = prepared.set(session), watching.set(watcher)
    try:
        with _engine(server, watcher.left_running) as url:
            flow, arguments = _flow(session, restoring=restoring)
            session.is_seen = url is not None
            watcher.running(url)
            # In a context of its own: what a search changes in Prefect's settings, at its end, is its own affair.
            state = contextvars.copy_context().run(_called, flow, arguments, session, watcher)
            while session.next_run():  # a signal that comes here interrupts the search: the lease is still held
                flow, arguments = _flow(session, restoring=True)
                state = contextvars.copy_context().run(_called, flow, arguments, session, watcher)
            if session.error is not None:
                raise session.error
            if watcher.result is None:
                raise EngineError(f"the flow ended without a result: {state}")
            return watcher.result
    except BaseException as error:
        with undisturbed():
            session.keeper.release_quietly(why(error))
            session.close()
        raise
    finally:
        prepared.reset(session_token)
        watching.reset(watcher_token)


def _called(flow: Flow[..., Any], arguments: dict[str, Any], session: Session, watcher: _Recorder) -> Any:
    """Call a flow and return its final state; EngineError for what Prefect itself raises before the search has ended."""
    from prefect import tags

    from holdfast.flows.prefect_runs import ended_at_once
    from holdfast.flows.telling import tags_of

    try:
        with tags(*(tags_of(session.opened.record.name) if session.is_seen else ())), ended_at_once():
            return flow(**arguments, return_state=True)
    except Exception as error:
        if isinstance(number := getattr(session.error, "signal", None), int):  # Prefect's, which it could not finish with
            raise Terminated(number) from None
        if session.error is not None:  # what interrupted the search counts, not that Prefect could not be told
            raise session.error from None
        if isinstance(error, HoldfastError):
            raise
        words = f"{type(error).__name__}: {error}"
        if session.continued is not None:
            watcher.say(f"the flow run is done, and the search goes on; Prefect could not record that ({words})")
            return None
        if watcher.result is not None:
            watcher.say(f"the search is done; Prefect could not record that ({words})")
            return None
        raise EngineError(
            f"Prefect failed ({words}); nothing is lost: see to its API, then `{restore_command(session.opened)}`"
        ) from error


def _flow(session: Session, *, restoring: bool) -> tuple[Flow[..., Any], dict[str, Any]]:
    if restoring:
        from holdfast.flows.restore import restore as restore_flow

        return restore_flow, {"path": references.name_of_location(session.opened.folder.location)}
    from holdfast.flows.search import search as search_flow

    # Prefect stores parameters: no locations, no references.
    storage = references.name_of_location(session.spec.storage)
    data = {**session.spec.stored(), "storage": storage, "references": {}}
    return search_flow, {"spec": ExperimentSpec.parse(data)}


@contextmanager
def _engine(server: EmbeddedServer, left_running: str | None) -> Iterator[str | None]:
    """Have a Prefect API for the body: that which Prefect's settings name, else `holdfast up`'s, else the embedded one."""
    import prefect.settings as prefect_settings

    # What Prefect's settings say counts, not the guess: a server that was started for nothing is ended.
    if prefect_settings.PREFECT_API_URL.value():
        server.stop()
        yield prefect_settings.PREFECT_API_URL.value()
        return
    if left_running is not None:
        with prefect_settings.temporary_settings({prefect_settings.PREFECT_API_URL: left_running}):
            yield left_running
        return
    server.begin()
    changes = {
        prefect_settings.PREFECT_API_URL: server.url(),
        prefect_settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # nobody watches, and it costs a second
    }
    with prefect_settings.temporary_settings(changes):
        try:
            yield None
        finally:
            _drain()


def _drain() -> None:
    """Send what is queued before the embedded server ends, so that nothing complains about its absence."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        with suppress(Exception):  # words about a run, for a server that is about to go
            worker.drain_all(timeout=5)
