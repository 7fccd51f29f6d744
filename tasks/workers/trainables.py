"""Trainables: find what a spec names, tell of which kind it is, and run it."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from holdfast.core.errors import NotStorable, TrainableError
from holdfast.core.values import Metrics, plain_metrics
from holdfast.tasks.workers.trial_api import Trial

Kind = Literal["function", "class", "callable"]
ALIAS = "holdfast_trainable_"
"""Begins the name of a module whose own name is taken."""
KINDS = "a function f(trial), a callable object, or a class with step()"


@dataclass(frozen=True, kw_only=True)
class Trainable:
    name: str
    kind: Kind
    target: Callable[..., Any]


def load(trainable: str, workdir: str) -> Trainable:
    """Import and return what ``trainable`` names; TrainableError with the reason when it cannot be, or is of no kind."""
    target, _, name = trainable.rpartition(":")
    if not target:
        raise TrainableError(f"the trainable is {trainable!r}; it must look like train.py:train or package.module:train")
    _reach(workdir)
    if target.startswith("pickle:"):
        found = _unpickled(Path(workdir, target.removeprefix("pickle:")), trainable)
    else:
        module = _file(Path(workdir, target), trainable) if target.endswith(".py") else _module(target, trainable, workdir)
        found = _attribute(module, name, trainable)
    return Trainable(name=trainable, kind=_kind(found, trainable), target=found)


def _reach(folder: str) -> None:
    """Let modules of ``folder`` be imported, as if the script had been started there."""
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()  # the file may be younger than this process


def _file(path: Path, trainable: str) -> ModuleType:
    path = Path(os.path.abspath(path))
    if not path.is_file():
        near = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.glob("*.py")), n=3)
        raise TrainableError(f"{trainable}: there is no file {path}{_hint(near)}")
    _reach(str(path.parent))
    name = _free_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TrainableError(f"{trainable}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before
        raise _import_error(error, trainable) from error
    return module


def _free_name(path: Path) -> str:
    """Return the name to import ``path`` under: its own, which pickles and subprocesses need, unless that is taken."""
    taken = sys.modules.get(path.stem)
    if path.stem in sys.stdlib_module_names or path.stem in ("holdfast", "__main__"):
        return f"{ALIAS}{path.stem}"
    if taken is not None and getattr(taken, "__file__", None) != str(path):
        return f"{ALIAS}{path.stem}"
    return path.stem


def _module(name: str, trainable: str, workdir: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise TrainableError(
                f"{trainable}: there is no module {error.name!r}, neither in {workdir} nor installed; "
                f"a file is named with its ending, as in train.py:train"
            ) from None
        raise _import_error(error, trainable) from error
    except BaseException as error:
        raise _import_error(error, trainable) from error


def _unpickled(path: Path, trainable: str) -> Any:
    import pickle

    if not path.is_file():
        raise TrainableError(f"{trainable}: there is no file {path}; name the trainable anew")
    try:
        with open(path, "rb") as file:
            return pickle.load(file)
    except BaseException as error:
        raise _import_error(error, trainable) from error


def _import_error(error: BaseException, trainable: str) -> TrainableError:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    where = f'; File "{own[-1].filename}", line {own[-1].lineno}: {own[-1].line}' if own else ""
    message = "(it cannot be shown)"
    with contextlib.suppress(BaseException):  # __str__ is the user's code
        message = str(error)
    return TrainableError(f"{trainable} cannot be imported: {type(error).__name__}: {message}{where}")


def _attribute(module: ModuleType, name: str, trainable: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:5]
        raise TrainableError(f"{trainable}: {module.__file__ or module.__name__} has no {name!r}{_hint(near)}") from None


def _hint(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _kind(target: Any, trainable: str) -> Kind:
    called = target if inspect.isroutine(target) else getattr(type(target), "__call__", None)  # noqa: B004  # the method itself is looked at
    if inspect.isclass(target):
        return _class(target, trainable)
    if not callable(target):
        raise TrainableError(f"{trainable} is a {type(target).__name__}; it must be {KINDS}")
    for test, what in _LAZY.items():
        if test(target) or test(called):
            raise TrainableError(f"{trainable} is {what}, whose body a plain call does not run; it must be {KINDS}")
    try:
        inspect.signature(target).bind(object())
    except TypeError:
        raise TrainableError(
            f"{trainable} takes {inspect.signature(target)}; it is called with one argument, the trial"
        ) from None
    except ValueError:
        pass  # a builtin that does not tell
    return "function" if inspect.isroutine(target) else "callable"


_LAZY: dict[Callable[[object], bool], str] = {
    inspect.iscoroutinefunction: "an async function",
    inspect.isasyncgenfunction: "an async generator",
    inspect.isgeneratorfunction: "a generator",
}


def _class(target: type, trainable: str) -> Kind:
    step = getattr(target, "step", None)
    if not callable(step):
        raise TrainableError(f"{trainable} is a class without step(); it must be {KINDS}")
    for test, what in _LAZY.items():
        if test(step):
            raise TrainableError(f"{trainable}: its step() is {what}; it must be a plain method that returns metrics")
    if callable(getattr(target, "save", None)) and not callable(getattr(target, "load", None)):
        raise TrainableError(f"{trainable} has save() and no load(); without it no attempt could continue from its states")
    _argument(target, trainable)
    return "class"


def _argument(target: type, trainable: str) -> tuple[str, bool] | None:
    """Return (parameter, whether by keyword) to construct ``target`` with, or None when it takes nothing."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:
        return ("trial", False)
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p for p in plain if p.default is p.empty]
    if len(required) > 1:
        names = ", ".join(p.name for p in required)
        raise TrainableError(f"{trainable} is constructed from {names}; it must take the trial, config, or nothing")
    chosen = required or [p for p in plain[:1] if p.name in ("trial", "config")]
    if not chosen:
        return None
    return (chosen[0].name, chosen[0].kind is chosen[0].KEYWORD_ONLY)


def run(trainable: Trainable, trial: Trial, *, max_steps: int | None = None) -> Metrics | None:
    """Run the user's code to its end and return the record that it returned, if any; whatever it raises passes."""
    if trainable.kind == "class":
        _run_class(trainable, trial, max_steps)
        return None
    result = trainable.target(trial)
    if result is None:
        return None
    if not isinstance(result, Mapping):
        raise NotStorable(f"{trainable.name} returned a {type(result).__name__}; it must return a dict of metrics, or nothing")
    return plain_metrics(result, "the returned record")


def _run_class(trainable: Trainable, trial: Trial, max_steps: int | None) -> None:
    argument = _argument(trainable.target, trainable.name)  # type: ignore[arg-type]  # a class, by its kind
    given: Any = trial.config if argument is not None and argument[0] == "config" else trial
    if argument is None:
        instance = trainable.target()
    else:
        instance = trainable.target(**{argument[0]: given}) if argument[1] else trainable.target(given)
    step = 0
    if trial.checkpoint is not None:
        step = trial.checkpoint.step + 1
        if callable(getattr(instance, "load", None)):
            instance.load(trial.checkpoint.load())
        if trial.checkpoint.metrics.get("done") is True:
            return  # its process died between the last report and the end
    save = getattr(instance, "save", None)
    while max_steps is None or step < max_steps:
        metrics = instance.step()
        if metrics is None:
            return
        values = plain_metrics(metrics, "what step() returned")
        if values.get("done") is not True:
            values.pop("done", None)
        trial.report(values, step=step, state=save)
        if values.get("done") is True:  # kept in the metrics: an attempt that continues from here must know
            return
        step += 1
