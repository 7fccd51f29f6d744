"""An engine of the user's own: found by ``file.py:Class`` or ``package.module:Class``, made, and held to the protocol."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from holdfast.core.errors import EngineError, Exhausted, InvalidConfig, NotStorable, SpecError
from holdfast.core.ports import Proposal
from holdfast.core.spec import ExperimentSpec
from holdfast.core.spelling import nearest
from holdfast.core.trial import Trial
from holdfast.core.values import plain
from holdfast.engines.guard import Conditions

PROTOCOL = "a class with observe(trial) and propose(number), constructed as Class(space, objectives, seed, **options)"

T = TypeVar("T")

_RAISED = (Exception, SystemExit)
"""What counts as an error of the user's: a file that calls sys.exit() must not end the search as if all were well."""


class OwnProposer:
    """Passes on to the user's engine; what it raises, or offers and may not, is an EngineError that names it."""

    def __init__(self, inner: Any, spec: ExperimentSpec) -> None:
        self._inner = inner
        self._name = spec.search.engine
        self._space = spec.space
        self._conditions = Conditions(spec)

    @property
    def size(self) -> int | None:
        size: Any = self._called("size", lambda: getattr(self._inner, "size", None))
        if size is None:
            return None
        try:
            count = -1 if isinstance(size, bool) else operator.index(size)  # numpy's numbers, too
        except TypeError:
            count = -1
        if count < 0:
            raise EngineError(
                f"search.engine {self._name}: size is {_shown(size, 80)}; it must be a whole number from 0, or None"
            )
        return count

    def observe(self, trial: Trial) -> None:
        # The engine may do with it as it likes: what is run and what is ranked is not its own.
        own = replace(trial, config=dict(trial.config), metrics=copy.deepcopy(trial.metrics))
        self._called(f"observe, for trial {trial.number}", lambda: self._inner.observe(own))

    def propose(self, number: int) -> Proposal:
        offered: Any = self._called(f"propose({number})", lambda: self._inner.propose(number), may_end=True)
        state: Any = None
        if isinstance(offered, Proposal):
            offered, state = offered.config, offered.state
        if not isinstance(offered, Mapping):
            self._refuse(number, offered, f"is a {type(offered).__name__}; it must be a mapping of parameters, or a Proposal")
        if state is not None and not isinstance(state, bytes):
            self._refuse(number, offered, f"comes with a state that is a {type(state).__name__}; it must be bytes, or None")
        given: dict[Any, Any] = self._called(f"reading what propose({number}) returned", lambda: dict(offered.items()))
        try:
            values = {name: plain(value, f"config[{name!r}]") for name, value in given.items()}
            config = self._space.validate_config(values)
        except RecursionError:
            self._refuse(number, type(offered).__name__, "is nested too deeply, or holds itself")
        except (InvalidConfig, NotStorable) as error:
            self._refuse(number, given, f"is no config of the space: {error}")
        if broken := self._conditions.broken(config):
            self._refuse(number, config, f"breaks the constraint {broken[0]!r}")
        return Proposal(config=config, state=state)

    def _refuse(self, number: int, offered: object, why: str) -> NoReturn:
        raise EngineError(
            f"search.engine {self._name}: what propose({number}) returned, {_shown(offered, 300)}, {why}; nothing was written: "
            "mend the engine, and restore"
        )

    def _called(self, what: str, call: Callable[[], T], *, may_end: bool = False) -> T:
        try:
            return call()
        except _RAISED as error:
            if may_end and isinstance(error, Exhausted):
                raise
            raise EngineError(
                f"search.engine {self._name}: {what} raised {_words(error)}; mend the engine, and restore\n{_traceback(error)}"
            ) from error


def make_own(spec: ExperimentSpec, seed: int, *, workdir: str) -> OwnProposer:
    """Return the user's engine for ``spec``; SpecError when it cannot be found, imported or made, or lacks a method."""
    name = spec.search.engine
    made = _class(name, _folders(spec, workdir), workdir)
    try:
        # Copies: what the class does to its arguments is neither stored nor searched.
        inner = made(spec.space.model_copy(deep=True), spec.goals, seed, **copy.deepcopy(spec.search.options))
    except _RAISED as error:
        raise SpecError(
            f"search.engine {name}: Class(space, objectives, seed, **options) with the options {spec.search.options} raised "
            f"{_words(error)}\n{_traceback(error)}"
        ) from error
    proposer = OwnProposer(inner, spec)
    try:
        proposer.size  # noqa: B018  # what is wrong with it is wrong from the beginning
    except EngineError as error:
        raise SpecError(str(error)) from error
    return proposer


def engine_name(engine: str) -> str:
    """Return an engine's own name, wherever its file lies: ``engine:Class`` for ``/any/engine.py:Class``."""
    target, _, attribute = engine.rpartition(":")
    return f"{Path(target).stem}:{attribute}" if target.endswith(".py") else engine


def _folders(spec: ExperimentSpec, workdir: str) -> list[Path]:
    """Return where else an engine's file may be: beside the trainable's, wherever that is now, and in the working folder."""
    target = spec.trainable.rpartition(":")[0]
    beside = [Path(workdir, target).parent] if target.endswith(".py") else []
    return [*beside, Path(workdir)]


def _class(name: str, folders: Sequence[Path], workdir: str) -> type:
    target, _, attribute = name.rpartition(":")
    module = _file(name, Path(workdir, target), folders) if target.endswith(".py") else _module(name, target, workdir)
    found = getattr(module, attribute, None)
    if found is None:
        known = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__]
        near = nearest(attribute, known)
        hint = f"; did you mean {near}?" if near else f"; its classes: {', '.join(known) or 'none'}"
        raise SpecError(f"search.engine {name}: {module.__file__ or target} has no {attribute!r}{hint}")
    if not inspect.isclass(found):
        raise SpecError(f"search.engine {name} is a {type(found).__name__}; it must be {PROTOCOL}")
    for method in ("observe", "propose"):
        if not callable(getattr(found, method, None)):
            raise SpecError(f"search.engine {name} has no {method}(); it must be {PROTOCOL}")
    return found


def _file(name: str, path: Path, folders: Sequence[Path]) -> ModuleType:
    places = list(dict.fromkeys(os.path.abspath(place) for place in (path, *(folder / path.name for folder in folders))))
    file = next((place for place in places if os.path.isfile(place)), None)
    if file is None:
        elsewhere = "".join(f", nor {place}" for place in places[1:])
        raise SpecError(f"search.engine {name}: there is no file {places[0]}{elsewhere}; put it there, or beside the trainable")
    _reach(os.path.dirname(file))
    title = f"holdfast_engine_{Path(file).stem}"
    found = importlib.util.spec_from_file_location(title, file)
    if found is None or found.loader is None:
        raise SpecError(f"search.engine {name}: {file} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[title] = module  # before it runs: dataclasses look their module up by name
    try:
        found.loader.exec_module(module)
    except _RAISED as error:
        sys.modules.pop(title, None)
        raise _not_imported(name, error) from error
    return module


def _module(name: str, target: str, workdir: str) -> ModuleType:
    _reach(workdir)
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is not None and (target == error.name or target.startswith(error.name + ".")):
            raise SpecError(
                f"search.engine {name}: there is no module {error.name!r}, neither in {workdir} nor installed; "
                "a file is named with its ending, as in engine.py:Class"
            ) from None
        raise _not_imported(name, error) from error
    except _RAISED as error:
        raise _not_imported(name, error) from error


def _reach(folder: str) -> None:
    """Let modules of ``folder`` be imported, after all others: this process is not the user's."""
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()


def _not_imported(name: str, error: BaseException) -> SpecError:
    return SpecError(f"search.engine {name} cannot be imported: {_words(error)}\n{_traceback(error)}")


def _words(error: BaseException) -> str:
    """Return an error's kind and message; the user's own class may have none to give."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  # the user's own class
        return type(error).__name__


def _shown(value: object, length: int) -> str:
    """Return at most ``length`` characters of a user's value, which need not have a text of its own."""
    try:
        return repr(value)[:length]
    except Exception:  # noqa: BLE001  # the user's own class
        return f"a {type(value).__name__}"


def _traceback(error: BaseException) -> str:
    """Return the traceback of the user's own frames."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    return "".join(traceback.format_list(own)).rstrip()
