"""The flow ``search``: creates an experiment, or goes on with it, and drives it to the end of its budget."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from holdfast.core.errors import HoldfastError, SpecError
from holdfast.core.trial import ERRORED
from holdfast.experiment import SearchResult, result_of
from holdfast.flows.driver import Drive
from holdfast.flows.prefect_runs import close_dead_runs
from holdfast.flows.prepare import prepare_search
from holdfast.flows.session import Session, prepared
from holdfast.report.observer import observer
from holdfast.specfile import ExperimentSpec


def _run_name() -> str:
    spec = flow_run.parameters.get("spec")
    name = spec.get("name") if isinstance(spec, dict) else getattr(spec, "name", None)
    return str(name or Path(str(spec)).stem)


@flow(name="search", flow_run_name=_run_name, persist_result=False)
def search(spec: ExperimentSpec | str, overrides: list[str] | None = None) -> State[Any]:
    """Search as a spec says.

    Args:
        spec: A spec, or the path of its file.
        overrides: Changes to a spec from a file, such as search.seed=1.
    """
    session = prepared.get()
    if session is None:
        if isinstance(spec, str):
            spec = ExperimentSpec.from_file(spec, overrides or ())
        elif overrides:
            raise SpecError("overrides change a spec that is read from a file; change the spec itself")
        session = prepare_search(spec, observer()).session
    if session is None:
        return Completed(message="nothing is left to do")
    return drive(session)


def drive(session: Session) -> State[Any]:
    """Drive a prepared session inside a flow run; return the flow's final state."""
    watcher = observer()
    try:
        close_dead_runs(session.dead)
        reason = Drive(session, watcher).run()
        session.keeper.release(_ended(reason))
    except BaseException as error:
        session.error = error
        _interrupted(session, error)
        raise
    fast = reason.endswith("fail_fast is set")
    result = result_of(session.opened, reason, fast_failed=fast)
    session.close()
    watcher.ended(result)
    return _state(result)


def _ended(reason: str) -> str:
    return reason if reason.startswith("stopped") else f"completed: {reason}"


def _interrupted(session: Session, error: BaseException) -> None:
    """Leave everything so that a restore goes on from here, and say so; nothing after the flow call may run any more."""
    why = _describe(error)
    try:
        session.keeper.release(f"interrupted: {why}")
        result = result_of(session.opened, f"interrupted: {why}")
    except HoldfastError:
        return  # somebody else holds it now, or the database is gone: there is nothing that we may write
    finally:
        session.close()
    observer().ended(result)


def _describe(error: BaseException) -> str:
    if isinstance(error, TerminationSignal):
        return signal.Signals(error.signal).name
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT"
    return f"{type(error).__name__}: {error}"


def _state(result: SearchResult) -> State[Any]:
    errored = sum(trial.status in ERRORED for trial in result.trials)
    message = f"{result.reason}: {len(result.trials)} trials, {errored} errored; {result.path}"
    return Failed(message=message) if result.failed else Completed(message=message)
