"""Tags of trials' task runs in Prefect."""

from __future__ import annotations

TAG = "holdfast"
"""Every flow run of ours has it; automations match it, and nobody else's runs."""


def experiment_tag(name: str) -> str:
    """Return the tag of the runs of an experiment."""
    return f"experiment:{name}"


def trial_tag(number: int) -> str:
    """Return the tag of the task runs of a trial."""
    return f"trial:{number}"
