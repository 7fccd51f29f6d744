"""What a member of a population must report: the end of each generation, with something to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from workers_kit import Recorder, make_job

from holdfast.core.errors import TrialFailed
from holdfast.core.trial import Outcome
from holdfast.tasks.workers.inline import run_inline

TRAINABLE = """
def train(trial):
    for step in trial.config["steps"]:
        trial.report({"loss": 1.0}, step=step, state=None if step in trial.config["bare"] else {})
"""


def run(folder: Path, steps: Sequence[int], bare: Sequence[int] = (), **changes: Any) -> list[int]:
    (folder / "members.py").write_text(TRAINABLE)
    job = make_job(folder, "noop", trainable="members.py:train", workdir=str(folder), interval=5, **changes)
    job.config.update(steps=list(steps), bare=list(bare))
    recorder = Recorder(job)
    assert run_inline(job, recorder).outcome is Outcome.COMPLETED
    return [report.step for report in recorder.reports]


@pytest.mark.parametrize(
    ("steps", "max_steps"), [([4, 9, 14], None), ([0, 3, 4, 5, 9, 10], None), ([3], None), ([4, 9, 12], 10), ([8], 5), ([], 5)]
)
def test_the_end_of_each_generation_is_enough(tmp_path: Path, steps: list[int], max_steps: int | None) -> None:
    assert run(tmp_path, steps, max_steps=max_steps) == steps


@pytest.mark.parametrize(
    ("steps", "max_steps", "end", "after", "given"),
    [([0, 5, 10], 20, 4, 0, 5), ([5], None, 4, -1, 5), ([2, 4, 6, 8, 10], 11, 9, 8, 10), ([4, 30], 15, 9, 4, 30)],
)
def test_an_end_that_is_passed_over_is_refused(
    tmp_path: Path, steps: list[int], max_steps: int | None, end: int, after: int, given: int
) -> None:
    with pytest.raises(TrialFailed) as failure:
        run(tmp_path, steps, max_steps=max_steps)
    said = f"a generation of the population ends with step {end}, but the report after step {after} is of step {given};"
    said = said.replace("after step -1", "at the start") if after < 0 else said
    assert said in str(failure.value)


def test_an_end_without_a_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match="a generation of the population ends with step 9, and members go on from what is"):
        run(tmp_path, range(12), bare=[2, 9])
