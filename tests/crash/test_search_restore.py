"""Searches that are killed, stopped, damaged and restored, with real processes."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import DIED, Lab, MakeLab, starts, steps_of, tree

import holdfast


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, server_environment: dict[str, str]) -> Iterator[Lab]:
    """A laboratory with a finished search, which tests leave as they found it."""
    lab = Lab(tmp_path_factory.mktemp("finished") / "lab", server_environment)
    lab.run("run", lab.spec())
    yield lab
    lab.close()


class TestNothingLeftToDo:
    def test_a_finished_search_is_left_alone(self, finished: Lab) -> None:
        lab = finished
        rows, files, log, audit = lab.dump(audit=False), lab.tree(), lab.log(), len(lab.dump())
        for count in (1, 2):
            ended = lab.light("restore", lab.path())
            assert ended.code == 0, ended.output
            assert "nothing is left to do" in ended.output
            assert lab.dump(audit=False) == rows
            assert lab.tree() == files
            assert lab.log() == log
            assert len(lab.dump()) == audit + count

    def test_a_taken_name_is_refused_with_the_restore_command(self, finished: Lab) -> None:
        lab = finished
        rows, files = lab.dump(), lab.tree()
        ended = lab.light("run", lab.folder / "exp.yaml")
        assert ended.code == 2
        assert f"holdfast restore {lab.path()}" in ended.output
        assert (lab.dump(), lab.tree()) == (rows, files)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"resume_errored": True, "restart_errored": True}, ["resume_errored", "restart_errored"]),
            ({"trainable": "other.py:fit"}, ["train:train", "other:fit"]),
            ({"space": {"y": {"type": "float", "low": 0.0, "high": 4.0}}}, ["x", "y"]),
            ({"space": {"x": {"type": "float", "low": 0.0, "high": 5.0}}}, ["4.0", "5.0"]),
            ({"changes": {"search.engine": "grid"}}, ["search.engine", "search.num_trials"]),
            ({"changes": {"search.num_trials": "many"}}, ["search.num_trials", "many"]),
        ],
    )
    def test_what_contradicts_itself_or_the_experiment_is_refused(
        self, finished: Lab, arguments: dict[str, Any], words: list[str]
    ) -> None:
        lab = finished
        rows, files, raw = lab.dump(), lab.tree(), lab.database.read_bytes()
        with pytest.raises(holdfast.SpecError) as caught:
            holdfast.restore(lab.path(), **arguments)
        for word in words:
            assert word in str(caught.value)
        assert (lab.dump(), lab.tree(), lab.database.read_bytes()) == (rows, files, raw)

    def test_an_unknown_policy_is_refused(self) -> None:
        with pytest.raises(holdfast.SpecError, match=r"maybe.*resume, restart, skip"):
            holdfast.ResumePolicy(errored="maybe")  # type: ignore[arg-type]


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "experiment.json missing": ("exp/experiment.json", Path.unlink),
    "experiment.json empty": ("exp/experiment.json", lambda file: file.write_bytes(b"")),
    "experiment.json truncated": ("exp/experiment.json", lambda file: file.write_bytes(file.read_bytes()[:200])),
    "lease.json truncated": ("exp/lease.json", lambda file: file.write_bytes(file.read_bytes()[:20])),
    "database empty": ("holdfast.db", lambda file: file.write_bytes(b"")),
    "database truncated": ("holdfast.db", lambda file: file.write_bytes(file.read_bytes()[:9000])),
    "database garbage": ("holdfast.db", lambda file: file.write_bytes(b"no database" * 1000)),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_state_is_an_error_and_never_a_new_experiment(self, finished: Lab, damage: str) -> None:
        runs = finished.folder / "runs"
        kept = finished.folder / "kept"
        shutil.copytree(runs, kept)
        try:
            for rest in runs.glob("holdfast.db-*"):
                rest.unlink()  # with them SQLite would mend some of the damages
            name, do = DAMAGES[damage]
            do(runs / name)
            files = {name: digest for name, digest in tree(runs).items() if not name.startswith("holdfast.db-")}
            errors = (holdfast.Corrupt, holdfast.ExperimentNotFound, holdfast.core.errors.DatabaseError)
            with pytest.raises(errors) as caught:
                holdfast.restore(runs / "exp", changes={"search.num_trials": 5})
            assert str(runs) in str(caught.value)
            assert not holdfast.can_restore(runs / "exp")
            if "lease" not in damage:  # nothing is left to do, so nobody needs the lease
                with pytest.raises(holdfast.HoldfastError):
                    holdfast.search(finished.spec(if_exists="restore"))
            after = {name: digest for name, digest in tree(runs).items() if not name.startswith("holdfast.db-")}
            assert after == files
        finally:
            finished.spec()
            shutil.rmtree(runs)
            kept.rename(runs)

    def test_a_damaged_checkpoint_means_the_one_before(self, make_lab: MakeLab) -> None:
        """Deleted, truncated, a flipped bit; in the last trial no checkpoint is left intact."""
        lab = make_lab(steps=4)
        for number in range(4):
            lab.order("hold", number, 3)
        run = lab.start("run", lab.spec(search={"max_concurrent": 4}))
        for number in range(4):
            lab.until_logged("hold", number, 3, run)
        run.kill()
        for number, harm in enumerate((self.delete, self.truncate, self.flip, self.flip)):
            checkpoints = lab.checkpoints(number)
            assert [one.step for one in checkpoints][-2:] == [1, 2]
            for one in checkpoints if number == 3 else checkpoints[-1:]:
                harm(lab.path() / one.path)
            (lab.folder / "orders" / f"hold-{number}-3").unlink()
        plan = {line["trial"]: line for line in lab.json("restore", lab.path(), "--plan")}
        assert [plan[number]["step"] for number in range(4)] == [1, 1, 1, None]
        lab.clear_log()
        ended = lab.run("restore", lab.path())
        for number in range(4):
            assert "the checkpoint at step 2 is not used" in plan[number]["reason"]
            assert f"trial {number}: interrupted; the checkpoint at step 2 is not used" in ended.output
            assert starts(lab.log(), number) == [(2, 0 if number == 3 else 2)]
            assert steps_of(lab, number) == [0, 1, 2, 3]
        assert lab.statuses() == ["COMPLETED"] * 4
        with holdfast.open(lab.path()) as experiment:
            assert all("step 2 is not used" in trial.attempt.note for trial in experiment.trials)

    @staticmethod
    def data(folder: Path) -> Path:
        return max(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")

    def delete(self, folder: Path) -> None:
        shutil.rmtree(folder)

    def truncate(self, folder: Path) -> None:
        file = self.data(folder)
        file.write_bytes(file.read_bytes()[:-1])

    def flip(self, folder: Path) -> None:
        file = self.data(folder)
        body = bytearray(file.read_bytes())
        body[len(body) // 2] ^= 1
        file.write_bytes(bytes(body))


class TestFlags:
    def test_each_trial_goes_on_as_planned(self, lab: Lab) -> None:
        """One trial has finished, one failed, one runs, one waits; then the failed one is resumed, and restarted."""
        for order in (("hold", 1, 1), ("fail", 1, 2), ("hold", 2, 2)):
            lab.order(*order)
        run = lab.start("run", lab.spec(search={"max_concurrent": 2}), fault="proposal.committed:4")
        lab.until_logged("hold", 1, 1, run)
        lab.until_logged("hold", 2, 2, run)
        (lab.folder / "orders/hold-1-1").unlink()
        assert run.wait().code == DIED
        (lab.folder / "orders/hold-2-2").unlink()
        assert lab.statuses() == ["COMPLETED", "FAILED", "RUNNING", "PENDING"]
        with holdfast.open(lab.path()) as experiment:
            error = experiment.trial(1).error
        assert error is not None
        assert "no luck in step 2" in error.traceback

        rows, files = lab.dump(), lab.tree()
        plan = lab.json("restore", lab.path(), "--plan")
        assert (lab.dump(), lab.tree()) == (rows, files)
        assert [(line["status"], line["action"], line["step"]) for line in plan] == [
            ("COMPLETED", "keep", None),
            ("FAILED", "keep", None),
            ("RUNNING", "resume", 1),
            ("PENDING", "run", None),
        ]
        assert all(line["reason"] for line in plan)

        lab.clear_log()
        lab.run("restore", lab.path(), code=1)
        assert [starts(lab.log(), number) for number in range(4)] == [[], [], [(2, 2)], [(1, 0)]]
        assert lab.statuses() == ["COMPLETED", "FAILED", "COMPLETED", "COMPLETED"]
        with holdfast.open(lab.path()) as experiment:
            assert experiment.trial(1).error == error
        first = lab.trials()

        lab.clear_log()
        lab.run("restore", lab.path(), "--resume-errored", code=1)
        assert [starts(lab.log(), number) for number in range(4)] == [[], [(2, 2)], [], []]

        (lab.folder / "orders/fail-1-2").unlink()
        lab.clear_log()
        lab.run("restore", lab.path(), "--restart-errored")
        assert [starts(lab.log(), number) for number in range(4)] == [[], [(3, 0)], [], []]
        assert [trial["config"] for trial in lab.trials()] == [trial["config"] for trial in first]
        assert steps_of(lab, 1) == [0, 1, 2]
        with holdfast.open(lab.path()) as experiment:
            assert [(row.attempt, row.step, row.canonical) for row in experiment.history() if row.trial == 1] == [
                (1, 0, False),
                (3, 0, True),
                (1, 1, False),
                (3, 1, True),
                (3, 2, True),
            ]

    def test_unfinished_trials_can_be_left_out_for_now(self, lab: Lab) -> None:
        hold = lab.order("hold", 1, 2)
        run = lab.start("run", lab.spec(search={"num_trials": 3}))
        lab.until_logged("hold", 1, 2, run)
        run.kill()
        hold.unlink()
        lab.run("restore", lab.path(), "--no-resume-unfinished")
        assert lab.statuses() == ["COMPLETED", "SKIPPED", "COMPLETED"]
        shown = lab.json("show", lab.path())
        assert shown["trials"] == {"COMPLETED": 2, "SKIPPED": 1}
        assert shown["best"]["number"] != 1
        lab.clear_log()
        lab.run("restore", lab.path())
        assert [starts(lab.log(), number) for number in range(3)] == [[], [(2, 2)], []]
        assert lab.statuses() == ["COMPLETED"] * 3

    def test_a_restarted_trial_does_not_fall_back_to_the_old_checkpoints(self, lab: Lab) -> None:
        fail = lab.order("fail", 0, 2)
        lab.run("run", lab.spec(search={"num_trials": 1}), code=1)
        assert lab.checkpoints(0)
        fail.unlink()
        hold = lab.order("hold", 0, 0)
        lab.clear_log()
        run = lab.start("restore", lab.path(), "--restart-errored")
        lab.until_logged("hold", 0, 0, run)
        run.kill()
        hold.unlink()
        lab.run("restore", lab.path())
        assert starts(lab.log(), 0) == [(2, 0), (3, 0)]
        assert lab.statuses() == ["COMPLETED"]
        assert steps_of(lab, 0) == [0, 1, 2]

    def test_the_same_run_started_again_goes_on(self, lab: Lab) -> None:
        spec = lab.spec(if_exists="restore", search={"num_trials": 2})
        lab.run("run", spec, fault="checkpoint.committed:5", code=DIED)
        lab.clear_log()
        lab.run("run", spec)
        assert [starts(lab.log(), number) for number in range(2)] == [[], [(2, 2)]]
        rows = lab.dump(audit=False)
        ended = lab.light("run", spec)
        assert ended.code == 0, ended.output
        assert lab.dump(audit=False) == rows
        for changes in ({"objectives": {"loss": "max"}}, {"space": {"x": {"type": "float", "low": 0.0, "high": 9.0}}}):
            ended = lab.light("run", lab.spec(if_exists="restore", **changes))
            assert ended.code == 2, ended.output
            assert lab.dump(audit=False) == rows
        lab.clear_log()
        lab.run("run", lab.spec(if_exists="restore", search={"num_trials": 3}))
        assert lab.statuses() == ["COMPLETED"] * 3
        assert {entry.trial for entry in lab.log()} == {2}


class TestSameAnswer:
    def test_a_grid_has_each_combination_as_often_as_asked(self, make_lab: MakeLab) -> None:
        lab = make_lab(steps=1)
        space = {
            "x": {"type": "categorical", "choices": [1.0, 2.0, 3.0]},
            "y": {"type": "categorical", "choices": ["a", "b", "c"]},
        }
        search = {"engine": "grid", "samples": 3, "num_trials": None, "max_concurrent": 2}
        lab.run("run", lab.spec(space=space, search=search), fault="proposal.committed:20", code=DIED)
        assert len(lab.trials()) == 20
        lab.run("restore", lab.path())
        configs = [trial["config"] for trial in lab.trials()]
        assert len(configs) == 27
        assert set(Counter((config["x"], config["y"]) for config in configs).values()) == {3}
        assert set(lab.statuses()) == {"COMPLETED"}

    @pytest.mark.parametrize(("engine", "trials", "killed"), [("random", 6, 3), ("tpe", 14, 12), ("grid", 6, 4)])
    def test_killed_after_k_of_n_the_configs_are_the_same(
        self, make_lab: MakeLab, engine: str, trials: int, killed: int
    ) -> None:
        space = {"x": {"type": "float", "low": 0.0, "high": 4.0, **({"step": 0.5} if engine == "grid" else {})}}
        whole, lab = make_lab("whole", steps=1), make_lab("killed", steps=1)
        changes = {"space": space, "search": {"engine": engine, "num_trials": trials}}
        beside = whole.start("run", whole.spec(**changes))
        lab.run("run", lab.spec(**changes), fault=f"trial.completed:{killed}", code=DIED)
        lab.run("restore", lab.path())
        assert beside.wait().code == 0
        assert lab.outcome() == whole.outcome()
        assert len(lab.trials()) == trials


class TestOneOwner:
    def test_a_live_experiment_is_refused_and_a_dead_one_is_not(self, lab: Lab) -> None:
        lab.order("hold", 0, 1)
        spec = lab.spec(search={"num_trials": 1})
        run = lab.start("run", spec)
        lab.until_logged("hold", 0, 1, run)
        lab.spec(search={"num_trials": 1}, if_exists="restore")
        for command in (("restore", lab.path()), ("run", spec), ("run", spec, "--set", "if_exists=fail")):
            ended = lab.light(*command)
            assert ended.code == 3, ended.output
            assert f"process {run.process.pid} on" in ended.output
            assert " s unless renewed" in ended.output
        assert not holdfast.can_restore(lab.path())
        run.kill()
        lab.clear_log()
        run = lab.start("restore", lab.path())
        lab.until_logged("hold", 0, 1, run)
        assert starts(lab.log(), 0) == [(2, 1)]
        run.kill()

    def test_a_suspended_driver_that_was_taken_over_writes_nothing_more(self, lab: Lab) -> None:
        holds = [lab.order("hold", number, 1) for number in (0, 1)]
        run = lab.start("run", lab.spec(search={"num_trials": 3, "max_concurrent": 2}))
        for number in (0, 1):
            lab.until_logged("hold", number, 1, run)
        lab.suspend(run)
        assert lab.light("restore", lab.path()).code == 3
        for hold in holds:
            hold.unlink()
        lab.run("restore", lab.path(), "--force")
        assert lab.statuses() == ["COMPLETED"] * 3
        rows, files, log = lab.dump(), lab.tree(), lab.log()
        run.signal(signal.SIGCONT)
        zombie = run.wait()
        assert zombie.code == 3, zombie.output
        assert (lab.dump(), lab.tree(), lab.log()) == (rows, files, log)
