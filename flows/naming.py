"""What things of ours are called in Prefect: deployments, tags, events, artifacts. Imports nothing but the standard library."""

from __future__ import annotations

import hashlib
import re

TAG = "holdfast"
"""Every flow run of ours has it; automations match it, and nobody else's runs."""

POOL = "holdfast"
"""The work pool."""

SEARCH, RESTORE, WATCH, COLLECT = "search/search", "restore/restore", "watch/watch", "collect/collect"
"""The deployments, as FLOW/DEPLOYMENT."""

EXPERIMENT_EVENT = "holdfast.experiment."
"""What follows: started, interrupted, stopped (by a person), continued (in a new flow run), restored, completed, failed;
recovering and gave-up by a watch."""
TRIAL_EVENT = "holdfast.trial."
"""What follows: started, or the trial's final status in lower case; omitted, for those that were too many."""
LEFT_EVENT = "holdfast.flow-run.left"
"""Of a flow run as the resource: its process ends though the run does not, since it is suspended; its silence is no death."""

_FOREIGN = re.compile(r"[^a-z0-9]+")
_KEY_LENGTH = 60


def experiment_tag(name: str) -> str:
    """Return the tag of the runs of an experiment."""
    return f"experiment:{name}"


def trial_tag(number: int) -> str:
    """Return the tag of the task runs of a trial."""
    return f"trial:{number}"


def experiment_resource(uuid: str) -> str:
    """Return the id of an experiment as the resource of events."""
    return f"holdfast.experiment.{uuid}"


def artifact_key(kind: str, name: str, uuid: str) -> str:
    """Return the key of an artifact of an experiment: Prefect takes small letters, digits and dashes.

    ``kind`` is progress, leaderboard or summary. The end of the key tells experiments of one name, or of names that look
    alike once they are spelled so, apart.
    """
    spelled = _FOREIGN.sub("-", name.lower()).strip("-")[:_KEY_LENGTH].strip("-")
    return "-".join(part for part in ("holdfast", kind, spelled, hashlib.sha256(uuid.encode()).hexdigest()[:6]) if part)
