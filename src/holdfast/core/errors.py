"""The error tree. Every message says what was given, what is allowed, and what to do.

HoldfastError
├── InvalidInput (ValueError)          the caller can mend it; exit code 2
│   ├── SpecError                      a spec, an override or a flag
│   ├── InvalidConfig                  a config that does not fit the space
│   ├── InvalidStep                    a step that is no whole number from 0, or before the newest; an unknown word
│   ├── TrainableError                 cannot be imported, or is none of the kinds
│   ├── NotStorable (TypeError)        a state or metric that cannot be stored as asked
│   ├── ExperimentExists               the name or the path is taken
│   └── ExperimentNotFound (FileNotFoundError)   no experiment there
├── Contention                         somebody else has it; exit code 3
│   ├── LeaseHeld                      a live holder drives the experiment
│   ├── Fenced                         a later epoch or attempt took over; nothing was written
│   └── AlreadyClaimed                 another process runs this attempt
├── Conflict                           the row is not in the state that the call needs
│   ├── AlreadyFinished                a final result stands already
│   └── CheckpointConflict             another writer committed this step
├── Corrupt                            stored state is torn, truncated or altered
│   ├── CheckpointCorrupt
│   └── NotACheckpoint
├── CheckpointNotFound (FileNotFoundError)
├── Infrastructure                     database, storage, Prefect or the installation failed; exit code 4
│   ├── DatabaseError
│   │   ├── RolledBack                 the database undid the call: it may be repeated
│   │   │   └── ConnectionLost
│   │   └── OutcomeUnknown             the connection was lost during a commit
│   ├── StorageError (OSError)
│   ├── EngineError
│   ├── Unfit                          a worker cannot run trials of the experiment; it has claimed nothing
│   ├── NewerFormat                    a newer holdfast wrote it: nothing is damaged, and nothing older is used instead
│   └── MissingLibrary (ImportError)   what was stored needs a library that is not installed here
├── Exhausted                          a proposer has nothing more to propose; ends the search, as a budget does
└── TrialFailure                       user code failed; ends one attempt
    ├── TrialFailed                    it raised, or returned no objective
    ├── TrialTimedOut (TimeoutError)   it ran into ``trial_timeout``
    └── TrialCrashed                   its process died
"""

from __future__ import annotations

from collections.abc import Sequence


class HoldfastError(Exception):
    """Root of every error that holdfast raises on purpose."""

    exit_code = 1


class InvalidInput(HoldfastError, ValueError):
    exit_code = 2


class SpecError(InvalidInput):
    """A spec, an override or a flag is wrong; nothing was created or changed."""


class InvalidConfig(InvalidInput):
    """A config does not fit the space."""


class InvalidStep(InvalidInput):
    """A step is no whole number from 0, or comes before the newest; or a word is none of latest, last, best and first."""


class TrainableError(InvalidInput):
    """A trainable cannot be imported or is none of the supported kinds."""


class NotStorable(InvalidInput, TypeError):
    """A value cannot be stored by the chosen serializer; the message names the path inside it."""


class ExperimentExists(InvalidInput):
    """The name is taken; the message holds the restore command."""


class ExperimentNotFound(InvalidInput, FileNotFoundError):
    """There is no experiment at the path, or of the name."""


class Contention(HoldfastError):
    exit_code = 3


class LeaseHeld(Contention):
    """A live process drives the experiment."""


class Fenced(Contention):
    """A later epoch or attempt took over; the refused call wrote nothing."""


class AlreadyClaimed(Contention):
    """Another process runs this attempt."""


class Conflict(HoldfastError):
    """The row is not in the state that the call needs; nothing was written."""


class AlreadyFinished(Conflict):
    """A final result stands already; it was not changed."""


class CheckpointConflict(Conflict):
    """Another writer committed this step of the attempt first."""


class Corrupt(HoldfastError):
    """Stored state is torn, truncated or altered."""

    exit_code = 4


class CheckpointCorrupt(Corrupt):
    """A checkpoint's content differs from its manifest."""


class NotACheckpoint(Corrupt):
    """A path holds no valid checkpoint manifest."""


class CheckpointNotFound(HoldfastError, FileNotFoundError):
    """There is no checkpoint of that step."""


class Infrastructure(HoldfastError):
    exit_code = 4


class DatabaseError(Infrastructure):
    """The database could not be reached, opened or written."""


class RolledBack(DatabaseError):
    """The database undid the transaction (a deadlock, say): nothing was written, and the call may be repeated."""


class ConnectionLost(RolledBack):
    """The connection to the database's server was lost: nothing was written, and the call may be repeated."""

    away: float = 0.0
    """seconds since the server was last heard of"""


class OutcomeUnknown(DatabaseError):
    """The connection was lost during a commit; whether anything was written cannot be found out."""


class StorageError(Infrastructure, OSError):
    """The storage under the experiment's path refused an operation (full, read-only, gone)."""


class EngineError(Infrastructure):
    """Prefect could not be started or reached, or did not persist a result; or an engine could not propose."""


class Unfit(Infrastructure):
    """A worker cannot run trials of an experiment, for the reasons in ``args``; it has claimed nothing."""

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(map(str, self.args))

    def __str__(self) -> str:
        return "; ".join(self.reasons)


class NewerFormat(Infrastructure):
    """A newer holdfast wrote what was to be read; it is intact, so no older checkpoint is taken in its place."""


class MissingLibrary(Infrastructure, ImportError):
    """What was stored needs a library that is not installed here; the message says which."""


class Exhausted(HoldfastError):
    """A proposer has nothing more to propose; the message says why. The search ends, as when its budget is used up."""


class TrialFailure(HoldfastError):
    """User code ended its attempt without a result."""


class TrialFailed(TrialFailure):
    """User code raised, or returned no value of an objective."""

    def __init__(self, message: str, *, kind: str = "TrialFailed", traceback: str = "", names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.traceback = traceback
        self.names = names or (kind,)
        """what ``failure.retry_on`` may call it"""


class TrialTimedOut(TrialFailure, TimeoutError):
    """The attempt ran into ``trial_timeout``."""


class TrialCrashed(TrialFailure):
    """The attempt's process died."""
