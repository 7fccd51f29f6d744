"""A restore up to the moment at which trials would run: what it refuses, what it plans, and that it does just that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from restoring_kit import GONE, SPACE, alter, deserted, leave, made, saved
from store_kit import content, unprivileged
from upkeep_kit import Shop, reachable

import holdfast
from holdfast.cli import main
from holdfast.core.errors import LeaseHeld, SpecError, TrainableError
from holdfast.core.resume import Action, Planned, Rerun, ResumePolicy
from holdfast.core.space import config_digest
from holdfast.core.trial import ERRORED, FINISHED, UNFINISHED, Attempt, Outcome, Trial, TrialStatus
from holdfast.core.values import dumps
from holdfast.experiment import Experiment
from holdfast.flows.changing import RestoreRequest
from holdfast.flows.prepare import plan_restore, prepare_restore
from holdfast.flows.requesting import request_of
from holdfast.locate import Opened
from holdfast.report.observer import Observer
from holdfast.storage.database.driver import Ending
from holdfast.testing.lab import FAILED


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with made(tmp_path) as opened:
        yield opened


@pytest.fixture
def shop(opened: Opened) -> Shop:
    return deserted(opened)


def damage(folder: Path) -> None:
    """Change one byte of a checkpoint's files."""
    file = max(
        (one for one in folder.rglob("*") if one.is_file() and one.name != "manifest.json"), key=lambda one: one.stat().st_size
    )
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(bytes(body))


def persisted(shop: Shop, number: int, body: str | None = None) -> None:
    """Persist the result of a trial's first attempt, as Prefect does; or ``body`` in its place."""
    config = config_digest(shop.lab.trial(number).config)
    result = {"trial": number, "attempt": 1, "outcome": "completed", "metrics": {"loss": 0.5}, "config": config}
    file = shop.path / f"trials/{number:06d}/result-a1.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"result": dumps(result)}) if body is None else body)


def every_state(shop: Shop) -> None:
    """Leave trials in every status, with good, damaged and missing files."""
    lab = shop.lab
    saved(shop, 0, 1, 2, reported=(3,))  # 0: RUNNING
    saved(shop, 0, 1)
    persisted(shop, 1)  # 1: its result was persisted
    saved(shop, 0)
    persisted(shop, 2, "{garbage")  # 2: and here it is none
    _, paths = saved(shop, 0, 1, 2)
    damage(shop.path / paths[-1])  # 3: the newest is damaged
    _, paths = saved(shop, 0, 1)
    for path in paths:
        shutil.rmtree(shop.path / path)  # 4: none is left
    saved(shop, 0, 1)
    shutil.rmtree(shop.path / "trials/000005")  # 5: neither is the trial's folder
    saved(shop, 0, 1)
    shutil.rmtree(shop.path / "trials/000006/checkpoints")
    (shop.path / "trials/000006/checkpoints").write_text("a file")  # 6
    for number, outcome in ((7, Outcome.COMPLETED), (8, Outcome.PRUNED), (9, Outcome.CANCELLED), (10, Outcome.TIMED_OUT)):
        saved(shop, 0, 1, reported=(2, 3))
        lab.end(lab.writer(number), outcome, loss=1.0)
    _, paths = saved(shop, 0, 1, 2, reported=(3, 5))
    damage(shop.path / paths[-1])
    lab.driver.end(lab.writer(11).attempt, FAILED)  # 11: FAILED, its newest checkpoint is damaged
    saved(shop)
    lab.driver.end(lab.writer(12).attempt, FAILED)  # 12: FAILED, and has none
    saved(shop, 0, 1, reported=(2,))
    lab.writer(13).fail(FAILED, max_failures=1)  # 13: waits for its retry
    lab.driver.propose({"x": 0.9, "n": 2})  # 14: never started
    lab.driver.skip([lab.row(lab.driver.propose({"x": 0.9, "n": 3}))])  # 15: SKIPPED, never started
    saved(shop, 0, 1)
    lab.driver.end(lab.writer(16).attempt, Ending(outcome=Outcome.LOST))
    lab.driver.skip([lab.row(16)])  # 16: SKIPPED, has checkpoints
    saved(shop, 0)
    Experiment(shop.opened).cancel(17)  # 17: RUNNING, and somebody asked for its end


POLICIES = [
    ResumePolicy(),
    ResumePolicy(unfinished=Rerun.SKIP),
    ResumePolicy(errored=Rerun.RESUME),
    ResumePolicy(unfinished=Rerun.SKIP, errored=Rerun.RESTART),
    ResumePolicy(unfinished=Rerun.RESTART, errored=Rerun.RESTART, finished=Rerun.RESTART),
    ResumePolicy(unfinished=Rerun.RESUME, errored=Rerun.RESUME, finished=Rerun.RESUME),
]


def words(policy: ResumePolicy) -> str:
    return ",".join(f"{name}={value}" for name, value in vars(policy).items())


class TestPlan:
    @pytest.mark.parametrize("policy", POLICIES, ids=words)
    def test_what_was_planned_is_what_is_done(self, shop: Shop, policy: ResumePolicy) -> None:
        """R25, with damaged files of every kind, which are no reason to leave the other trials alone (R27)."""
        every_state(shop)
        before = {trial.number: trial for trial in shop.lab.reader.trials()}
        attempts = shop.lab.reader.attempts()
        request = RestoreRequest(path=shop.path, policy=policy)
        rows, files = shop.opened.database.file, content(shop.path)
        assert rows is not None
        stored = rows.read_bytes()
        opened, plan = plan_restore(request)
        opened.close()
        assert content(shop.path) == files
        assert rows.read_bytes() == stored
        assert [planned.trial for planned in plan] == [*before]

        restored = prepare_restore(request, Observer())
        assert restored.plan == plan
        reader = shop.lab.reader
        for planned in plan:
            found = reader.trial(planned.trial)
            assert found is not None
            self.judge(planned, before[planned.trial], found, reader.attempts()[planned.trial])
            for number, old in attempts[planned.trial].items():  # nothing that had ended is rewritten
                if old.outcome is not None:
                    assert reader.attempts()[planned.trial][number] == old
        leave(restored.session)

    @staticmethod
    def judge(planned: Planned, before: Trial, after: Trial, attempts: dict[int, Attempt]) -> None:
        assert (after.number, after.config, planned.status) == (before.number, before.config, before.status)
        current = after.attempt
        match planned.action:
            case Action.KEEP:
                assert after == before
            case Action.SKIP:
                assert (after.status, current.claimed) == (TrialStatus.SKIPPED, False)
            case Action.ADOPT:
                assert after.status in (TrialStatus.COMPLETED, TrialStatus.CANCELLED)
                assert current.number == before.attempt.number
            case Action.RUN:
                assert (after.status, current.number, current.parent_step) == (TrialStatus.PENDING, 1, None)
            case Action.RESTART:
                assert (after.status, current.claimed, current.parent) == (TrialStatus.PENDING, False, None)
                assert current.reason == "restart"
            case Action.RESUME:
                assert (after.status, current.claimed) == (TrialStatus.PENDING, False)
                parent = None if current.parent is None else (current.parent, current.parent_step)
                assert parent == planned.parent
                assert ("not used" in planned.reason) == ("not used" in current.note)
        assert set(attempts) == set(range(1, current.number + 1))

    def test_what_it_says_of_each(self, shop: Shop) -> None:
        every_state(shop)
        _, plan = plan_restore(RestoreRequest(path=shop.path, policy=ResumePolicy(errored=Rerun.RESUME)))
        assert [(planned.action.value, planned.step, planned.lost) for planned in plan] == [
            ("resume", 2, 1),
            ("adopt", None, 0),
            ("resume", 0, 0),
            ("resume", 1, 1),
            ("resume", None, 2),
            ("resume", None, 2),
            ("skip", None, 0),
            *[("keep", None, 0)] * 3,
            ("resume", 1, 2),
            ("resume", 1, 3),
            ("resume", None, 0),
            ("resume", 1, 0),  # what a retry goes back behind has been lost to its failure, not to a crash
            ("run", None, 0),
            ("run", None, 0),
            ("resume", 1, 0),
            ("adopt", None, 0),
        ]
        for number in (3, 4, 5, 11):
            assert "is not used" in plan[number].reason
        assert "trials/000006/checkpoints: Not a directory; mend that" in plan[6].reason
        _, plan = plan_restore(RestoreRequest(path=shop.path, policy=ResumePolicy(finished=Rerun.RESTART)))
        assert [planned.lost for planned in plan if planned.status in FINISHED] == [4, 4, 4]
        _, plan = plan_restore(RestoreRequest(path=shop.path))
        assert {planned.lost for planned in plan if planned.status not in UNFINISHED} == {0}

    def test_a_trial_whose_files_cannot_be_used_is_left_out_until_they_can(self, shop: Shop) -> None:
        """R27: neither begun anew, since its files may be intact, nor in the way of the others."""
        for number in range(3):
            saved(shop, 0, 1)
            if number == 2:
                shop.lab.driver.end(shop.lab.writer(2).attempt, FAILED)
        broken = [shop.path / "trials/000001", shop.path / "trials/000002"]
        request = RestoreRequest(path=shop.path, policy=ResumePolicy(errored=Rerun.RESUME))
        for folder in [*shop.path.parent.rglob("*"), shop.path.parent]:
            folder.chmod(0o777)
        reachable(shop.path)
        for folder in broken:
            folder.chmod(0o000)
        try:
            with unprivileged():
                opened, plan = plan_restore(request)
                opened.close()
        finally:
            for folder in broken:
                folder.chmod(0o777)
        assert [planned.action.value for planned in plan] == ["resume", "skip", "keep"]
        for planned in plan[1:]:
            assert "Permission denied; mend that, and restore again" in planned.reason
        opened, plan = plan_restore(request)
        opened.close()
        assert [(planned.action.value, planned.step) for planned in plan] == [("resume", 1)] * 3

    def test_the_command_shows_it_and_its_json_has_no_more_keys(self, shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
        every_state(shop)
        assert main(["restore", str(shop.path), "--plan", "--policy", "errored=restart", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {tuple(line) for line in found} == {("trial", "status", "action", "step", "reason")}
        assert [line["action"] for line in found if line["status"] in ERRORED] == ["restart"] * 3
        assert main(["restore", str(shop.path), "--plan"]) == 0
        out = capsys.readouterr().out
        assert "lost steps" in out.splitlines()[0]
        assert "nothing was changed" in out

    def test_again_and_again_it_comes_to_the_same(self, shop: Shop) -> None:
        """R26: killed after everything was reconciled and planned; the next one plans to go on from the same places."""
        every_state(shop)
        request = RestoreRequest(path=shop.path, policy=ResumePolicy(errored=Rerun.RESTART))
        first = prepare_restore(request, Observer())
        leave(first.session)
        alter(shop.opened, f"UPDATE experiment SET holder = '{json.dumps(GONE)}'")
        lease = json.loads((shop.path / "lease.json").read_text())
        (shop.path / "lease.json").write_text(json.dumps({**lease, "holder": GONE}))
        second = prepare_restore(RestoreRequest(path=shop.path), Observer())
        for before, after in zip(first.plan, second.plan, strict=True):
            if before.action in (Action.RESUME, Action.RESTART, Action.RUN):
                assert after.action in (Action.RESUME, Action.RUN)
                assert (after.step, after.lost) == (before.step, 0)
            else:
                assert after.action is (Action.SKIP if after.trial == 6 else Action.KEEP)
        assert [trial.attempt.number for trial in shop.lab.reader.trials()] == [
            *(2, 1, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 1, 1, 2, 1)
        ]
        leave(second.session)


class TestLeftOut:
    def test_unfinished_trials_are_no_candidates_and_may_come_back(self, shop: Shop) -> None:
        """R4: the ones that run, wait and never started; another flag concerns the errored ones alone."""
        lab = shop.lab
        saved(shop, 0)
        lab.driver.propose({"x": 0.5, "n": 1})
        saved(shop, 0)
        lab.end(lab.writer(2), loss=7.0)
        saved(shop, 0, 1)
        lab.driver.end(lab.writer(3).attempt, FAILED)
        restored = prepare_restore(request_of(shop.path, resume_unfinished=False, resume_errored=True), Observer())
        experiment = Experiment(shop.opened)
        assert [trial.status.value for trial in experiment.trials] == ["SKIPPED", "SKIPPED", "COMPLETED", "PENDING"]
        assert experiment.trial(0).metrics == {"loss": 0.0}
        best = experiment.best_trial()
        assert best is not None
        assert best.number == 2
        assert experiment.load().ids == [2]
        assert sum(experiment.counts().values()) == 4
        leave(restored.session)
        plan = {line.trial: line for line in plan_restore(RestoreRequest(path=shop.path))[1]}
        assert [(plan[number].action.value, plan[number].step) for number in (0, 1, 3)] == [
            ("resume", 0),
            ("run", None),
            ("resume", 1),
        ]


# What is refused

OTHER_SPACES = {
    "a key added": ({**SPACE, "y": {"type": "int", "low": 0, "high": 1}}, ["y: absent / int"]),
    "a key removed": ({"x": SPACE["x"]}, ["n: int", "/ absent"]),
    "a key renamed": ({"x": SPACE["x"], "m": SPACE["n"]}, ["n: int", "m: absent"]),
    "a bound": ({**SPACE, "x": {**SPACE["x"], "high": 2.0}}, ["1.0", "2.0"]),
    "a scale": ({**SPACE, "n": {**SPACE["n"], "log": True}}, ["n: int", "log"]),
    "a type": ({**SPACE, "n": {"type": "float", "low": 1.0, "high": 4.0}}, ["n: int", "float"]),
    "empty": ({}, ["x: float", "n: int"]),
    "no space": ({"x": {"type": "flat"}}, ["flat"]),
}
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "both flags": ({"resume_errored": True, "restart_errored": True}, ["resume_errored", "restart_errored"]),
    "a flag and a policy": ({"resume_errored": True, "policy": "errored=skip"}, ["policy", "flag"]),
    "another flag and a policy": ({"resume_unfinished": False, "policy": {}}, ["policy", "flag"]),
    "an unknown value": ({"policy": "errored=maybe"}, ["maybe", "resume, restart, skip"]),
    "an unknown class": ({"policy": "failed=resume"}, ["failed", "unfinished, errored, finished"]),
    "a class twice": ({"policy": "errored=skip,errored=resume"}, ["once"]),
    "no policy": ({"policy": ""}, ["unfinished, errored, finished"]),
    "a list": ({"policy": ["skip"]}, ["unfinished, errored, finished"]),
    "an unhashable value": ({"policy": {"errored": []}}, ["errored is []"]),
    "another trainable": ({"trainable": "other.py:fit"}, ["train:train", "other:fit"]),
    "a trainable that is not there": ({"trainable": "elsewhere/train.py:train"}, ["elsewhere/train.py"]),
    "an objective": ({"changes": {"objectives": {"loss": "max"}}}, ["objectives", "search.num_trials"]),
    "an engine": ({"changes": {"search.engine": "grid"}}, ["search.engine", "search.num_trials"]),
    "a value of a wrong type": ({"changes": {"search.num_trials": "many"}}, ["search.num_trials", "many"]),
    "a value out of range": ({"changes": {"failure.max_failures": -1}}, ["failure.max_failures", "-1"]),
    "no changes": ({"changes": "search.num_trials=4"}, ["changes", "search.num_trials"]),
    **{f"space: {name}": ({"space": space}, said) for name, (space, said) in OTHER_SPACES.items()},
}


def as_arguments(given: dict[str, Any], folder: Path) -> list[str] | None:
    """Return a call's arguments as the command line's, or None where it has no way to say them."""
    found: list[str] = []
    for name, value in given.items():
        match name:
            case "resume_unfinished":
                found.append("--no-resume-unfinished")
            case "resume_errored" | "restart_errored":
                found.append("--" + name.replace("_", "-"))
            case "policy" | "trainable" if isinstance(value, str):
                found += [f"--{name}", value]
            case "changes" if isinstance(value, dict) and not isinstance(next(iter(value.values())), dict):
                found += [word for key, new in value.items() for word in ("--set", f"{key}={new}")]
            case "space":
                (folder / "space.yaml").write_text(json.dumps({"space": value}))
                found += ["--space", str(folder / "space.yaml")]
            case _:
                return None
    return found


class TestRefusals:
    """R5: refused before anything is written, with both sides in the message; by Python and the command line alike."""

    @pytest.mark.parametrize("name", REFUSED)
    def test_nothing_is_changed(self, shop: Shop, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments, said = REFUSED[name]
        saved(shop, 0)
        file = shop.opened.database.file
        assert file is not None
        shop.opened.close()  # with it the database's log is merged
        stored, files = file.read_bytes(), content(shop.path)
        with pytest.raises((SpecError, TrainableError)) as caught:
            holdfast.restore(shop.path, **arguments)
        messages = [str(caught.value)]
        line = as_arguments(arguments, tmp_path)
        if line is not None:
            for plan in ([], ["--plan"]) if "not there" not in name else ([],):  # a plan loads no trainable
                assert main(["restore", str(shop.path), *line, *plan]) == 2
                messages.append(capsys.readouterr().err)
        for message in messages:
            for word in said:
                assert word in message
        assert (file.read_bytes(), content(shop.path)) == (stored, files)

    def test_another_objective(self, shop: Shop, tmp_path: Path) -> None:
        """By way of a spec with ``if_exists: restore``."""
        saved(shop, 0)
        spec = shop.opened.spec
        again = {**spec.stored(), "storage": str(tmp_path / "runs"), "if_exists": "restore"}
        file = shop.opened.database.file
        assert file is not None
        shop.opened.close()
        stored, files = file.read_bytes(), content(shop.path)
        for objectives in ({"loss": "max"}, {"loss": "min", "size": "min"}, {"size": "min"}):
            with pytest.raises(SpecError, match=r"(?s)stored \{loss: min\}, given "):
                holdfast.search({**again, "objectives": objectives})
        assert (file.read_bytes(), content(shop.path)) == (stored, files)

    def test_a_living_one_is_left_alone(self, shop: Shop) -> None:
        from holdfast.holding import holder

        alter(shop.opened, f"UPDATE experiment SET holder = '{json.dumps(holder())}'")
        assert not holdfast.can_restore(shop.path)
        with pytest.raises(LeaseHeld, match="drives the experiment"):
            holdfast.restore(shop.path)
        assert Experiment(shop.opened).status == "running"
