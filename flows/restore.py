"""The flow ``restore``: reads what is stored and re-submits unfinished or errored trials, as its flags say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.runtime import flow_run

from holdfast.flows.prefect_runs import wish_behind
from holdfast.flows.prepare import prepare_restore
from holdfast.flows.requesting import request_of
from holdfast.flows.search import drive, nothing_left, watcher_here
from holdfast.flows.session import prepared_session
from holdfast.flows.signals import explained


def _run_name() -> str:
    return Path(str(flow_run.parameters.get("path"))).name


@flow(name="restore", flow_run_name=_run_name, persist_result=False)
def restore(
    path: str,
    resume_unfinished: bool = True,
    resume_errored: bool = False,
    restart_errored: bool = False,
    new_trials: bool = True,
    force: bool = False,
    storage_options: dict[str, Any] | None = None,
    policy: dict[str, str] | None = None,
    trainable: str | None = None,
    changes: dict[str, Any] | None = None,
    database: str | None = None,
) -> State[Any]:
    """Restore an experiment and drive it to the end of its budget.

    Args:
        path: The experiment's folder, or its URL on an object store.
        resume_unfinished: Go on with unfinished trials from their newest checkpoints; else leave them out.
        resume_errored: Go on with errored trials from their newest checkpoints; else keep them as they are.
        restart_errored: Begin errored trials again at step 0; else keep them as they are.
        new_trials: Propose new trials up to the budget.
        force: Take over from a process that drives the experiment and seems alive.
        storage_options: Options of an object store, such as its endpoint; no credentials, because Prefect keeps parameters.
        policy: What becomes of unfinished, errored and finished trials, in place of the three flags: resume, restart or skip
            for each, such as {"errored": "restart"}; as by default where it is not named.
        trainable: Where the same trainable is now, if it was moved, such as /new/place/train.py:train.
        changes: New values of what a restore may change, such as {"search.num_trials": 40}.
        database: URL of the experiment's database, if it is not beside it; without a password, because Prefect keeps
            parameters: leave that to HOLDFAST_DATABASE_URL, or to what the database's own client reads.
    """
    watcher = watcher_here()
    session = prepared_session()
    if session is None:
        request = request_of(
            path,
            trainable,
            resume_unfinished=resume_unfinished,
            resume_errored=resume_errored,
            restart_errored=restart_errored,
            policy=policy,
            changes=changes,
            new_trials=new_trials,
            force=force,
            database=database,
            storage_options=storage_options,
        )
        with explained(wish_behind):
            restored = prepare_restore(request, watcher)
        if restored.session is None:
            return nothing_left(restored)
        session = restored.session
    return drive(session, watcher)
