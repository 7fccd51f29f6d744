"""Searches whose trials save in the background: stopped, killed at each moment of a save, and restored to the same bits."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3
from support import DIED, Lab, MakeLab, executed, starts, steps_of

ASYNCHRONOUS = {"asynchronous": True}

EXACT = '''
"""A state with a generator in it: each step depends on every bit of the ones before."""
import json, os
from pathlib import Path
import numpy as np

HERE = Path(__file__).parent


def train(trial):
    generator = np.random.default_rng(trial.seed)
    w, start = generator.standard_normal(20_000), 0
    if trial.checkpoint is not None:
        state = trial.checkpoint.load()
        w, start = state["w"].copy(), trial.checkpoint.step + 1
        generator.bit_generator.state = json.loads(state["generator"])
    for step in range(start, STEPS):
        die = HERE / f"die-{step}"
        if die.exists():
            die.unlink()
            os.kill(os.getpid(), 9)
        w += 0.1 * generator.standard_normal(w.size) - 0.05 * w
        trial.report(
            {"loss": float(w @ w), "bits": w.tobytes()[:8].hex()},
            step=step,
            state={"w": w, "generator": json.dumps(generator.bit_generator.state)},
        )
        np.negative(w, out=w)  # what was reported must not feel that
        np.negative(w, out=w)
'''


def saved(lab: Lab, trial: int = 0) -> list[int]:
    return [one.step for one in lab.checkpoints(trial)]


def staged(lab: Lab) -> list[str]:
    return [folder.name for folder in lab.path().glob("trials/*/checkpoints/.staging*")]


class TestStopping:
    @pytest.mark.parametrize("period", [1, 1000])
    def test_sigterm_finishes_what_is_being_saved(self, make_lab: MakeLab, period: int) -> None:
        """At a step that is due the save in the background is waited for, at another one the step is saved at once."""
        lab = make_lab(steps=100_000)
        lab.order("slow", 0, 0)
        run = lab.start("run", lab.spec(search={"num_trials": 1}, checkpoints={**ASYNCHRONOUS, "save_period": period}))
        lab.until_logged("step", 0, 5, run)
        run.signal(signal.SIGTERM)
        ended = run.wait()
        assert ended.code == 143, ended.output
        last = executed(lab.log(), 0)[-1]
        assert saved(lab)[-1] == last
        assert lab.statuses() == ["PENDING"]
        assert staged(lab) == []

    def test_the_end_of_a_trial_finishes_its_last_save(self, lab: Lab) -> None:
        lab.order("fail", 1, 2)
        lab.run("run", lab.spec(search={"num_trials": 2}, checkpoints=ASYNCHRONOUS), code=1)
        assert lab.statuses() == ["COMPLETED", "FAILED"]
        assert (saved(lab, 0)[-1], saved(lab, 1)[-1]) == (2, 1)

    def test_inline(self, make_lab: MakeLab) -> None:
        lab = make_lab(steps=8)
        fail = lab.order("fail", 0, 5)
        lab.run("run", lab.spec(search={"num_trials": 1}, checkpoints=ASYNCHRONOUS, execution={"isolation": "inline"}), code=1)
        assert saved(lab)[-1] == 4
        fail.unlink()
        lab.run("restore", lab.path(), "--resume-errored")
        assert starts(lab.log(), 0) == [(1, 0), (2, 5)]
        assert steps_of(lab, 0) == list(range(8))
        assert saved(lab)[-1] == 7


class TestKilled:
    @pytest.mark.parametrize(
        ("isolation", "point", "kept"),
        [
            ("process", "checkpoint.staged:4", 2),
            ("process", "checkpoint.manifest-written:4", 2),
            ("process", "checkpoint.renamed:4", 2),
            ("process", "checkpoint.committed:4", 3),
            ("process", "checkpoint.pruned-row:1", 0),
            ("process", "report.committed:4", 2),
            ("inline", "checkpoint.staged:4", 2),
            ("inline", "checkpoint.committed:4", 3),
        ],
    )
    def test_at_each_moment_of_a_save(self, make_lab: MakeLab, point: str, kept: int, isolation: str) -> None:
        """No more is lost than the save that was under way and what came after it; also when only the path is left."""
        lab = make_lab(steps=6)
        spec = lab.spec(
            search={"num_trials": 1}, checkpoints={**ASYNCHRONOUS, "save_period": 1}, execution={"isolation": isolation}
        )
        lab.run("run", spec, fault=point, code=DIED)
        newest = max(saved(lab), default=-1)
        reported = steps_of(lab, 0)
        assert newest >= kept
        assert reported[-1] - newest <= 1
        told = lab.outcome()[0][3]
        shutil.copytree(lab.path(), lab.folder / "alone" / "exp")
        lab.clear_log()
        lab.run("restore", lab.path())
        assert starts(lab.log(), 0) == [(2, newest + 1)]
        assert steps_of(lab, 0) == list(range(6))
        assert staged(lab) == []
        assert lab.outcome()[0][3][: len(told)] == told  # a step that was done again came out alike
        whole = lab.outcome()

        (lab.folder / "runs").rename(lab.folder / "gone")
        (lab.folder / "alone").rename(lab.folder / "runs2")
        lab.clear_log()
        lab.run("restore", lab.folder / "runs2" / "exp")
        (lab.folder / "runs2").rename(lab.folder / "runs")
        ((_, first),) = starts(lab.log(), 0)
        assert first >= newest + 1
        assert lab.outcome() == whole

    def test_a_trials_own_process(self, make_lab: MakeLab) -> None:
        """Bit for bit what an uninterrupted trial gives, though every process dies while its last step is being saved."""
        whole, lab = make_lab("whole"), make_lab("killed")
        for place in (whole, lab):
            (place.folder / "train.py").write_text(EXACT.replace("STEPS", "12"))
        for step in (3, 4, 9):
            (lab.folder / f"die-{step}").touch()
        changes: dict[str, Any] = {"search": {"num_trials": 1}, "failure": {"max_failures": 3}}
        whole.run("run", whole.spec(**changes))
        lab.run("run", lab.spec(**changes, checkpoints=ASYNCHRONOUS))
        assert lab.trials()[0]["attempts"] == 4
        assert lab.outcome() == whole.outcome()
        assert steps_of(lab, 0) == list(range(12))
        states = []
        for place in (whole, lab):
            newest = place.checkpoints(0)[-1]
            assert newest.step == 11
            states.append((place.path() / newest.path / "arrays.bin").read_bytes())
        assert states[0] == states[1]

    def test_the_search_at_random_moments(self, make_lab: MakeLab) -> None:
        lab = make_lab(steps=400)
        slow = lab.order("slow", 0, 0)
        command: tuple[object, ...] = ("run", lab.spec(search={"num_trials": 1}, checkpoints=ASYNCHRONOUS))
        newest = -1
        for steps in (3, 11, 6):
            lab.clear_log()
            run = lab.start(*command)
            lab.until(lambda: len(executed(lab.log(), 0)) >= steps, run)  # noqa: B023  # within the loop
            run.kill()
            assert starts(lab.log(), 0)[0][1] == newest + 1
            newest, last = saved(lab)[-1], executed(lab.log(), 0)[-1]
            assert last - newest <= 2  # the one that was being saved, and one that was not reported yet
            command = ("restore", lab.path())
        slow.unlink()
        lab.run(*command)
        assert steps_of(lab, 0) == list(range(400))


@pytest.mark.parametrize("point", ["checkpoint.manifest-written:3", "checkpoint.renamed:3"])
def test_on_an_object_store(s3: S3, tmp_path: Path, server_environment: dict[str, str], point: str) -> None:
    """Killed before and after the manifest is uploaded, restored, and ended by a signal."""
    changes = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_DATA_HOME": str(tmp_path / "lab" / "data"), **s3.environment}
    storage = s3.bucket("async") + "/runs"
    lab = Lab(tmp_path / "lab", {**server_environment, **changes}, steps=100_000, storage=storage, options=s3.options)
    try:
        lab.order("slow", 0, 0)
        spec = lab.spec(search={"num_trials": 1}, checkpoints=ASYNCHRONOUS)
        lab.run("run", spec, fault=point, code=DIED)
        newest = saved(lab)[-1]
        assert newest >= 1
        lab.clear_log()
        run = lab.start("restore", lab.path())
        lab.until_logged("step", 0, newest + 4, run)
        assert starts(lab.log(), 0) == [(2, newest + 1)]
        run.signal(signal.SIGTERM)
        ended = run.wait()
        assert ended.code == 143, ended.output
        assert saved(lab)[-1] == executed(lab.log(), 0)[-1]
        lab.run("checkpoints", lab.path(), "--verify")
    finally:
        lab.close()
