"""The names of checkpoints, and what lies around them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from holdfast.core.errors import InvalidInput

STAGING = ".staging-"
TRASH = ".trash-"
PIN = ".pin-"
"""before the name of a checkpoint: an empty file that keeps it from being pruned"""
STEP = r"step_(?P<step>[0-9]{8}|[1-9][0-9]{8,})-a(?P<attempt>[1-9][0-9]*)-(?P<writer>[0-9a-f]{4,32})"
OWN = re.compile(rf"({re.escape(STAGING)}|{re.escape(TRASH)})?{STEP}")
"""what holdfast makes in a folder of checkpoints"""


@cache
def _pattern(template: str) -> re.Pattern[str]:
    prefix = re.escape(template).replace(re.escape("{:06d}"), "(?P<trial>[0-9]{6}|[1-9][0-9]{6,})")
    return re.compile(prefix + STEP)


@dataclass(frozen=True)
class Layout:
    """Where checkpoints lie below a root: a format for their folder by trial, and an example."""

    template: str
    example: str

    def folder(self, trial: int) -> str:
        """Return the folder of a trial's checkpoints, relative to the root, with a slash at its end unless it is the root."""
        return self.template.format(trial)

    def match(self, path: str) -> dict[str, int]:
        """Return what a published checkpoint's path says: attempt, step, and its trial; InvalidInput when it is none."""
        found = _pattern(self.template).fullmatch(path)
        if found is None:
            raise InvalidInput(f"{path!r} is no checkpoint's path; one looks like {self.example}")
        return {name: int(value) for name, value in found.groupdict().items() if name != "writer"}


TRIALS = Layout("trials/{:06d}/checkpoints/", "trials/000007/checkpoints/step_00000012-a2-3f9c")
"""below an experiment's path"""
FLAT = Layout("", "step_00000012-a2-3f9c")
"""a store of its own: everything is trial 0's"""


def is_name(name: str) -> bool:
    """Tell whether a published checkpoint's folder may have this name."""
    return re.fullmatch(STEP, name) is not None
