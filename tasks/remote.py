"""What running trials of one experiment share in a worker process of Dask, Ray or a work pool: made at the first of them.

A worker knows by beats what the driver's own process knows at once. Once it may not go on, its children are ended, its row
says why, and the next trial that comes makes a new runtime, if there is still a drive to run it for.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from holdfast.core.errors import (
    Conflict,
    Contention,
    DatabaseError,
    ExperimentNotFound,
    Fenced,
    HoldfastError,
    SpecError,
    Unfit,
)
from holdfast.core.spec import ExperimentSpec
from holdfast.core.values import Metrics
from holdfast.settings import settings, variable
from holdfast.storage.checkpoints.ports import checkpoints_in
from holdfast.storage.database import experiments, workers
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.engine import Database
from holdfast.storage.database.experiments import open_database
from holdfast.storage.database.leases import TERMS
from holdfast.storage.database.reads import Reader
from holdfast.storage.folder import Folder
from holdfast.storage.leasing import elapsed
from holdfast.storage.root import parent_of
from holdfast.tasks.joining import began, join, make_pool, trainable_of, workdir_of
from holdfast.tasks.judging import StoredJudge
from holdfast.tasks.naming import TAG, experiment_tag, trial_tag
from holdfast.tasks.place import Place
from holdfast.tasks.probing import options_of, probe
from holdfast.tasks.runtime import Judge, Runtime
from holdfast.tasks.workers.messages import Decision
from holdfast.tasks.workers.pool import DEVICES
from holdfast.tasks.working import WorkFolder

terms = TERMS
"""of the driver's lease, which a worker's silence is measured by, too"""
IDLE_SECONDS = 60.0
"""How long a runtime stays after the last trial that used it."""
UNFIT_SECONDS = 5.0
"""How long a worker that was found unfit says so without another look."""
_BEATS = 0.4
"""of a renewal of the lease: the time between two beats"""
_LEAVE_SECONDS = 10.0
"""How long attempts may take to notice that their worker is ended, before its row says so."""


@dataclass(kw_only=True)
class RemoteRuntime(Runtime):
    """One experiment's running side in one process of an engine, for one epoch."""

    place: Place
    engine: str
    work: WorkFolder
    release: Callable[[], None] = lambda: None
    """gives the shipped code back"""
    over: HoldfastError | None = None
    """why nothing may run here any more"""
    _own: Decision = Decision.CONTINUE
    """what this process itself was told, such as by SIGTERM: beats tell of the search's alone"""
    _told: workers.Beat | None = None
    _heard: float = field(default_factory=elapsed)
    """when the last beat that was answered was sent, by a clock that goes on while the host sleeps"""
    _beats: int = 0
    """how many were sent"""
    _running: dict[int, int] = field(default_factory=dict)
    """attempts (row ids) claimed here, by the number of beats sent before"""
    _closed: set[int] = field(default_factory=set)
    """attempts that somebody else closed"""
    _users: int = 0
    _used: float = field(default_factory=time.monotonic)
    _doubtful: bool = False
    """whether an attempt here failed for what is no fault of its own, and nobody has looked again since"""
    _looking: threading.Lock = field(default_factory=threading.Lock)
    _devices: str | None = None
    """the environment's devices that the children were given"""
    _state: threading.Condition = field(default_factory=threading.Condition)
    _ended: threading.Event = field(default_factory=threading.Event)
    _stored: StoredJudge = field(init=False)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stored = StoredJudge(self.database, self.experiment, self._rules)
        self._devices = variable(DEVICES)
        self.held = self._hold

    @property
    def _patience(self) -> float:
        """Seconds without an answer after which the worker gives up: before the driver takes it for lost."""
        return terms.duration - 2 * terms.renewal

    @contextmanager
    def judged(self, trial: int, step: int, metrics: Metrics) -> Iterator[Judge]:
        """Give what decides about a report within the transaction that commits it: other processes report, too."""
        if not self._rules:
            with super().judged(trial, step, metrics) as judge:
                yield judge
            return
        with self._stored.judged(trial, step, metrics) as judge:
            yield judge

    @contextmanager
    def changing(self, trial: int) -> Iterator[None]:
        """Do nothing more: the next report looks for what changed."""
        yield

    def learn(self) -> None:
        """Do nothing: the first report reads what there is."""

    def fail(self, error: HoldfastError) -> None:
        """Look again before the next trial; those that run may do without what failed, and the driver gets the error."""
        self._doubtful = True

    def look_again(self) -> None:
        """Raise Unfit when an attempt failed here for what is no fault of its own, and this process still cannot run trials."""
        key = self.uuid, self.epoch
        with self._looking:
            if not self._doubtful:
                return
            _raise_known(key)
            self._doubtful = False  # what fails while this looks is doubted anew
            try:
                reasons = [*probe(self.place), *self.work.lacks()]
            except BaseException:
                self._doubtful = True
                raise
            if reasons:
                self._doubtful = True
                raise _remembered(key, Unfit(*reasons))

    def journaled(self) -> int:
        return -1 if self._told is None else self._told.journaled

    def _hold(self) -> None:
        """Raise what ended this worker; one that was suspended notices here, before anything is written."""
        if self.over is None and elapsed() - self._heard > self._patience:
            self._give_up(self._silence())
        if self.over is not None:
            raise self.over

    def decision(self, trial: int, attempt: int | None = None) -> Decision:
        """Return what a running attempt is to do now: KILL when it, or this worker, is none any more."""
        if self.over is not None or elapsed() - self._heard > self._patience or attempt in self._closed:
            return Decision.KILL
        return super().decision(trial)

    def order(self, decision: Decision) -> None:
        """Tell what runs here what to do, whatever the search says from now on."""
        with self._state:
            self._own = decision
        super().order(decision)

    def claimed(self, writer: AttemptWriter) -> None:
        with self._state:
            self._running[writer.attempt] = self._beats

    def let_go(self, writer: AttemptWriter) -> None:
        with self._state:
            self._running.pop(writer.attempt, None)
            self._closed.discard(writer.attempt)

    def start(self) -> None:
        """Begin to beat; the first answer is waited for, and raises what it says against this worker."""
        self._beat()
        if self.over is not None:
            raise self.over
        with _lock:
            _left.append(self)
        for name, target in (("beat", self._beating), ("watch", self._watching)):
            thread = threading.Thread(target=target, name=f"holdfast-worker-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _beating(self) -> None:
        while not self._ended.wait(_BEATS * terms.renewal):
            with suppress(DatabaseError):  # it is asked again, until the watch loses patience
                self._beat()
            self._look_idle()
        self._finish()

    def _watching(self) -> None:
        """Give up in time when a beat does not come back: a call to a server that hangs may take minutes."""
        while not self._ended.wait(terms.renewal / 10):
            if elapsed() - self._heard > self._patience:
                self._give_up(self._silence())

    def _silence(self) -> Fenced:
        return Fenced(
            f"worker {self.worker} has not heard of the database for {elapsed() - self._heard:.0f} s, or was suspended; "
            "what it ran counts as lost, and is run again"
        )

    def _beat(self) -> None:
        """Say that this worker lives, and take in what it is told."""
        assert self.worker is not None
        with self._state:
            self._beats += 1
            number, sent = self._beats, elapsed()
        if sent - self._heard > self._patience:  # suspended meanwhile: an answer now would hide it
            self._give_up(self._silence())
            return
        try:
            told = workers.beat(self.database, self.experiment, self.worker)
        except (Contention, ExperimentNotFound) as error:
            self._give_up(error)
            return
        with self._state:
            if self.over is not None:
                return
            self._heard = sent
            self._told = told
            self._order = Decision(told.told)
            if self._own is Decision.KILL or (self._own is Decision.PREEMPT and self._order is Decision.CONTINUE):
                self._order = self._own
            self.cancelled = set(told.cancelled)
            claimed = {attempt for attempt, before in self._running.items() if before < number}
            self._closed |= claimed - told.open
        if told.epoch != self.epoch:
            self._give_up(Fenced(f"epoch {self.epoch} is over: another process took the experiment over"))
        elif told.left is not None:
            self._give_up(Fenced(f"worker {self.worker} was given up: {told.left}"))
        elif told.remaining <= 0:
            self._give_up(Fenced(f"nobody drives the experiment any more: the lease of epoch {self.epoch} has ended"))

    def _look_idle(self) -> None:
        with self._state:
            idle = not self._users and time.monotonic() - self._used > IDLE_SECONDS
            if not idle or self.over is not None:
                return
            self.over = Conflict("no trial came for a while")  # under the lock: nobody begins to use it meanwhile
        self._give_up(self.over)

    def _give_up(self, why: HoldfastError) -> None:
        """Let nothing run or begin here from now on. Children are ended at once, the rest follows."""
        with self._state:
            self.over = self.lost = self.over or why
            first = not self._ended.is_set()
            self._ended.set()
        if not first:
            return
        _forget(self)
        if self.pool is not None:
            with suppress(HoldfastError):  # a process that does not end goes with this one
                self.pool.close()

    def _finish(self) -> None:
        """Say that this worker left, and give everything back, once its attempts have noticed."""
        with self._state:
            self._state.wait_for(lambda: not self._users, timeout=_LEAVE_SECONDS)
        if self.pool is not None:
            with suppress(HoldfastError):
                self.pool.close()  # waits for who closes it
        with suppress(HoldfastError):
            workers.leave(self.database, self.experiment, self.worker or 0, str(self.over))
        with self._state:
            self._state.wait_for(lambda: not self._users)
        self.close_files()
        with _lock:
            _left[:] = [other for other in _left if other is not self]

    def close_files(self) -> None:
        """Close the connections and remove the local folder."""
        self.release()
        self.database.close()
        self.work.close()

    def close(self, why: str, *, timeout: float = 30.0) -> None:
        """End what runs here, and wait until everything is given back."""
        self._give_up(Conflict(why))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)

    def enter(self) -> bool:
        """Count the caller among the users; False when this runtime is over."""
        with self._state:
            if self.over is not None:
                return False
            if self.engine == "ray" and not self._users:
                self._follow_devices()
            self._users += 1
            return True

    def _follow_devices(self) -> None:
        """Make new children when the engine gave this process other devices than those they have; SpecError: too few."""
        if self.spec.execution.resources.gpu and self._devices != variable(DEVICES):
            before, self.pool = self.pool, make_pool(self.spec, self.place)
            self._devices = variable(DEVICES)
            if before is not None:
                before.close()

    def leave(self) -> None:
        """Count the caller among the users no more."""
        with self._state:
            self._users -= 1
            self._used = time.monotonic()
            self._state.notify_all()


Key = tuple[str, int]
_lock = threading.Lock()
_reached: dict[Key, RemoteRuntime] = {}
_left: list[RemoteRuntime] = []
"""those that have something to give back, also when they are over"""
_opening: dict[Key, Future[RemoteRuntime]] = {}
_unfit: dict[Key, tuple[float, Unfit]] = {}


def reach(place: Place, engine: str) -> RemoteRuntime:
    """Return this process's runtime of the experiment and epoch, made at the first call.

    Raises Unfit with all reasons when this process cannot run its trials, Fenced when the epoch is over, DatabaseError when
    the database goes away meanwhile. Nothing is left then. Safe for several threads.
    """
    key = place.uuid, place.epoch
    with _lock:
        if (found := _reached.get(key)) is not None:
            return found
        _raise_known(key)
        opening, mine = _opening.get(key), False
        if opening is None:
            opening, mine = _opening.setdefault(key, Future()), True
    if not mine:
        return opening.result()
    try:
        _end_older(place)
        made = _open(place, engine)
    except BaseException as error:
        with _lock:
            del _opening[key]
            if isinstance(error, Unfit):
                _remembered(key, error)
        opening.set_exception(error)
        raise
    with _lock:
        del _opening[key]
        _unfit.pop(key, None)
        if made.over is None:
            _reached[key] = made
    opening.set_result(made)
    return made


def _raise_known(key: Key) -> None:
    """Raise what was found a moment ago: many trials may come at once."""
    until, unfit = _unfit.get(key, (0.0, None))
    if unfit is not None and time.monotonic() < until:
        raise Unfit(*unfit.args)


def _remembered(key: Key, unfit: Unfit) -> Unfit:
    _unfit[key] = time.monotonic() + UNFIT_SECONDS, unfit
    return unfit


@contextmanager
def using(place: Place, engine: str) -> Iterator[RemoteRuntime]:
    """Use this process's runtime of an experiment; raises as :func:`reach`. While it is used it is not idle."""
    while True:
        runtime = reach(place, engine)
        runtime.look_again()
        try:
            if runtime.enter():
                break
        except SpecError as error:
            raise Unfit(str(error)) from None
        _forget(runtime)
    try:
        yield runtime
    finally:
        runtime.leave()


def known(uuid: str, epoch: int) -> RemoteRuntime | None:
    """Return the runtime of an experiment and epoch if this process has one."""
    with _lock:
        return _reached.get((uuid, epoch))


def close_all() -> None:
    """End all runtimes of this process, with what runs in them, and wait until everything is given back."""
    with _lock:
        found = list(_left)
    for runtime in found:
        runtime.close("its process ends")


atexit.register(close_all)


def _forget(runtime: RemoteRuntime) -> None:
    with _lock:
        key = runtime.uuid, runtime.epoch
        if _reached.get(key) is runtime:
            del _reached[key]


def _end_older(place: Place) -> None:
    """End what is left of earlier drives: whoever sends this one a trial has taken over."""
    with _lock:
        older = [found for (uuid, epoch), found in _reached.items() if uuid == place.uuid and epoch < place.epoch]
    for runtime in older:
        runtime.close(f"epoch {place.epoch} has begun")


def _open(place: Place, engine: str) -> RemoteRuntime:
    reasons = probe(place)
    with contextlib.ExitStack() as made:
        try:
            database = open_database(place.database)
        except HoldfastError as error:
            raise Unfit(*(reasons or [str(error)])) from None
        made.callback(database.close)
        if reasons:
            raise _told_unfit(database, place, engine, reasons)
        try:
            runtime = _make(place, engine, database, made)
        except SpecError as error:
            raise _told_unfit(database, place, engine, [str(error)]) from None
        runtime.start()
        made.pop_all()
    return runtime


def _make(place: Place, engine: str, database: Database, made: contextlib.ExitStack) -> RemoteRuntime:
    record = experiments.by_uuid(database, place.uuid)
    if record is None:
        raise Fenced(f"experiment {place.name!r} is gone from the database; it was deleted meanwhile")
    options = options_of(place)
    data = {**record.spec, "storage": parent_of(place.location), **({"storage_options": options} if options else {})}
    spec = ExperimentSpec.parse(data, source=f"stored spec of {record.name}")
    references = {} if place.references is None else {"references": dict(place.references)}
    work = WorkFolder(settings().cache_folder / "work")
    made.callback(work.close)
    folder = Folder.at(place.location, options=options, work=work.path, cache_bytes=settings().cache_bytes)
    workdir, give_back = workdir_of(place, folder, work)
    made.callback(give_back)
    pool = make_pool(spec, place)
    made.callback(pool.close)
    reader = Reader(database, place.experiment)
    worker = join(database, place, engine)
    made.callback(lambda: _leave_quietly(database, place, worker, "it could not begin"))
    return RemoteRuntime(
        uuid=place.uuid,
        experiment=place.experiment,
        epoch=place.epoch,
        spec=spec.model_copy(update={"trainable": trainable_of(place, folder), **references}),
        workdir=str(workdir),
        database=database,
        reader=reader,
        folder=folder,
        checkpoints=checkpoints_in(folder),
        pool=pool,
        tags=lambda trial: (TAG, experiment_tag(record.name), trial_tag(trial)),
        worker=worker,
        began=began(reader, place.epoch),
        place=place,
        engine=engine,
        work=work,
        release=give_back,
    )


def _told_unfit(database: Database, place: Place, engine: str, reasons: list[str]) -> Unfit:
    """Return the error, its reasons left in a row of this worker for people to read, where that can be."""
    with suppress(HoldfastError):
        workers.leave(database, place.experiment, join(database, place, engine), f"unfit: {'; '.join(reasons)}")
    return Unfit(*reasons)


def _leave_quietly(database: Database, place: Place, worker: int, why: str) -> None:
    with suppress(HoldfastError):
        workers.leave(database, place.experiment, worker, why)
