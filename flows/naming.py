"""What things of ours are called in Prefect: deployments, tags, events, artifacts. Imports no library."""

from __future__ import annotations

import hashlib
import re

from holdfast.tasks import naming

TAG, experiment_tag, trial_tag = naming.TAG, naming.experiment_tag, naming.trial_tag
"""What tasks on any machine need, too."""

POOL = "holdfast"
"""The work pool."""

SEARCH, RESTORE, WATCH, COLLECT = "search/search", "restore/restore", "watch/watch", "collect/collect"
"""The deployments, as FLOW/DEPLOYMENT."""
TRIAL = "trial/trial"
"""The deployment whose flow runs are trials of searches with ``execution.runner: workpool``."""
STALE = "Stale"
"""The name of the state (of the type CANCELLED) of a trial's flow run that no search waits for; the trial was not touched."""

EXPERIMENT_EVENT = "holdfast.experiment."
"""What follows: started, interrupted, stopped (by a person), restored, completed, failed; recovering and gave-up by a watch."""
TRIAL_EVENT = "holdfast.trial."
"""What follows: started, or the trial's final status in lower case; omitted, for those that were too many."""
LEFT_EVENT = "holdfast.flow-run.left"
"""Of a flow run as the resource: its process ends though the run does not, since it is suspended; its silence is no death."""

_FOREIGN = re.compile(r"[^a-z0-9]+")
_KEY_LENGTH = 60


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
