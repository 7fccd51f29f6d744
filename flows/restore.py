"""The flow ``restore``: reads what is stored and re-submits unfinished or errored trials, as its flags say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.runtime import flow_run

from holdfast.core.errors import HoldfastError
from holdfast.flows import forms
from holdfast.flows.continuing import carried_on, told_to_go_on
from holdfast.flows.prefect_runs import wish_behind
from holdfast.flows.prepare import prepare_restore
from holdfast.flows.requesting import request_of
from holdfast.flows.search import drive, nothing_left, refused, watcher_here
from holdfast.flows.session import prepared_session
from holdfast.flows.signals import explained


def _run_name() -> str:
    return PurePosixPath(str(flow_run.parameters.get("path") or "")).name or "restore"


@flow(name="restore", flow_run_name=_run_name, persist_result=False, validate_parameters=False)
def restore(
    path: forms.Experiment,
    resume_unfinished: forms.ResumeUnfinished = True,
    resume_errored: forms.ResumeErrored = False,
    restart_errored: forms.RestartErrored = False,
    new_trials: forms.NewTrials = True,
    force: forms.Force = False,
    storage_options: forms.Options = None,
    policy: forms.Policy = None,
    trainable: forms.Trainable = None,
    changes: forms.Changes = None,
    database: forms.Database = None,
) -> State[Any]:
    """Restore an experiment and drive it to the end of its budget. What each parameter means stands in :mod:`flows.forms`."""
    watcher = watcher_here()
    session = prepared_session()
    if session is None:
        try:
            form = forms.restore_form(
                {
                    "path": path,
                    "resume_unfinished": resume_unfinished,
                    "resume_errored": resume_errored,
                    "restart_errored": restart_errored,
                    "new_trials": new_trials,
                    "force": force,
                    "storage_options": storage_options,
                    "policy": policy,
                    "trainable": trainable,
                    "changes": changes,
                    "database": database,
                }
            )
            request = replace(request_of(**dict(form)), continues=told_to_go_on())
            with explained(wish_behind):
                restored = prepare_restore(request, watcher)
        except HoldfastError as error:
            return refused(error)
        if restored.session is None:
            return nothing_left(restored)
        session = restored.session
    return carried_on(session, drive(session, watcher))
