"""A restore's arguments, checked alike for Python, the command line and the flow. Imports no Prefect."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from holdfast.core.errors import SpecError
from holdfast.core.resume import ResumePolicy
from holdfast.core.space import Space
from holdfast.core.spec import explain
from holdfast.core.values import Json
from holdfast.flows.changing import RestoreRequest


def request_of(
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
) -> RestoreRequest:
    """Check a restore's arguments and return the request; SpecError for what contradicts itself."""
    flags = ResumePolicy.from_flags(
        resume_unfinished=resume_unfinished, resume_errored=resume_errored, restart_errored=restart_errored
    )
    if policy is not None and flags != ResumePolicy():
        raise SpecError("policy and a resume flag are both given; policy says it all: leave the flags out")
    if changes is not None and not isinstance(changes, Mapping):
        raise SpecError(f"changes is {changes!r}; give new values by key, such as {{'search.num_trials': 40}}")
    if trainable is not None and trainable.rpartition(":")[0].endswith(".py"):
        trainable = os.path.abspath(trainable.rpartition(":")[0]) + ":" + trainable.rpartition(":")[2]
    if space is not None and not isinstance(space, Space):
        try:
            space = Space.model_validate(dict(space))
        except ValidationError as error:
            raise SpecError(explain(error, Space, source="space")) from None
    return RestoreRequest(
        path=path,
        policy=flags if policy is None else ResumePolicy.of(policy),
        trainable=trainable,
        changes=changes or {},
        space=space,
        references=references,
        database=database,
        storage_options=storage_options,
        new_trials=new_trials,
        force=force,
    )
