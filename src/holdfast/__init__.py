"""holdfast: hyperparameter and benchmark searches that survive anything, on Prefect 3.

The public names are imported when they are first used, so that ``import holdfast`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.api import can_restore, create, fork, import_experiment, open, restore, search  # holdfast.open
    from holdfast.core.checkpoint_config import CheckpointConfig
    from holdfast.core.choices import nested
    from holdfast.core.errors import (
        AlreadyFinished,
        CheckpointConflict,
        CheckpointCorrupt,
        CheckpointNotFound,
        Corrupt,
        EngineError,
        Exhausted,
        ExperimentExists,
        ExperimentNotFound,
        Fenced,
        HoldfastError,
        InvalidConfig,
        InvalidInput,
        InvalidStep,
        LeaseHeld,
        MissingLibrary,
        NewerFormat,
        NotACheckpoint,
        NotStorable,
        SpecError,
        StorageError,
        TrainableError,
    )
    from holdfast.core.objective import Objective
    from holdfast.core.ports import Proposal, Proposer
    from holdfast.core.resume import ResumePolicy
    from holdfast.core.space import Space
    from holdfast.core.trial import Trial, TrialStatus
    from holdfast.engines.values import config_at
    from holdfast.experiment import Experiment
    from holdfast.report.observer import Observer
    from holdfast.report.restored import RestoreSummary
    from holdfast.result import SearchResult
    from holdfast.specfile import ExperimentSpec
    from holdfast.storage.checkpoints.store import CheckpointStore, StoredCheckpoint

__version__ = "0.1.0"

_HOMES = {
    "holdfast.api": ("search", "restore", "open", "create", "fork", "import_experiment", "can_restore"),
    "holdfast.core.checkpoint_config": ("CheckpointConfig",),
    "holdfast.core.choices": ("nested",),
    "holdfast.core.errors": (
        "AlreadyFinished",
        "CheckpointConflict",
        "CheckpointCorrupt",
        "CheckpointNotFound",
        "Corrupt",
        "EngineError",
        "Exhausted",
        "ExperimentExists",
        "ExperimentNotFound",
        "Fenced",
        "HoldfastError",
        "InvalidConfig",
        "InvalidInput",
        "InvalidStep",
        "LeaseHeld",
        "MissingLibrary",
        "NewerFormat",
        "NotACheckpoint",
        "NotStorable",
        "SpecError",
        "StorageError",
        "TrainableError",
    ),
    "holdfast.core.objective": ("Objective",),
    "holdfast.core.ports": ("Proposal", "Proposer"),
    "holdfast.core.resume": ("ResumePolicy",),
    "holdfast.core.space": ("Space",),
    "holdfast.core.trial": ("Trial", "TrialStatus"),
    "holdfast.engines.values": ("config_at",),
    "holdfast.experiment": ("Experiment",),
    "holdfast.report.observer": ("Observer",),
    "holdfast.report.restored": ("RestoreSummary",),
    "holdfast.result": ("SearchResult",),
    "holdfast.specfile": ("ExperimentSpec",),
    "holdfast.storage.checkpoints.store": ("CheckpointStore", "StoredCheckpoint"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AlreadyFinished",
    "CheckpointConfig",
    "CheckpointConflict",
    "CheckpointCorrupt",
    "CheckpointNotFound",
    "CheckpointStore",
    "Corrupt",
    "EngineError",
    "Exhausted",
    "Experiment",
    "ExperimentExists",
    "ExperimentNotFound",
    "ExperimentSpec",
    "Fenced",
    "HoldfastError",
    "InvalidConfig",
    "InvalidInput",
    "InvalidStep",
    "LeaseHeld",
    "MissingLibrary",
    "NewerFormat",
    "NotACheckpoint",
    "NotStorable",
    "Objective",
    "Observer",
    "Proposal",
    "Proposer",
    "RestoreSummary",
    "ResumePolicy",
    "SearchResult",
    "Space",
    "SpecError",
    "StorageError",
    "StoredCheckpoint",
    "TrainableError",
    "Trial",
    "TrialStatus",
    "can_restore",
    "config_at",
    "create",
    "fork",
    "import_experiment",
    "nested",
    "open",
    "restore",
    "search",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
