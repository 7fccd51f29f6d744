"""What may be said and changed at a restore, and what is seen of an experiment whose driver was killed."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from restoring_kit import GONE, SPACE, TRAINABLE, alter, deserted, leave, made, saved
from store_kit import content, create
from upkeep_kit import Shop

import holdfast
from holdfast.cli import main
from holdfast.core.errors import HoldfastError, SpecError
from holdfast.core.resume import Rerun, ResumePolicy
from holdfast.core.spec import CHANGEABLE
from holdfast.experiment import Experiment
from holdfast.flows.changing import RestoreRequest, changed_spec
from holdfast.flows.prepare import prepare_restore
from holdfast.flows.requesting import request_of
from holdfast.locate import Opened, open_path
from holdfast.report.observer import Observer


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with made(tmp_path) as opened:
        yield opened


@pytest.fixture
def shop(opened: Opened) -> Shop:
    return deserted(opened)


class TestArguments:
    @pytest.mark.parametrize(
        "given",
        ["unfinished=skip, errored=restart", {"unfinished": "skip", "errored": "restart"}],
        ids=["text", "mapping"],
    )
    def test_a_policy_may_be_said_in_any_way(self, given: Any) -> None:
        expected = ResumePolicy(unfinished=Rerun.SKIP, errored=Rerun.RESTART)
        assert request_of("x", policy=given).policy == request_of("x", policy=expected).policy == expected
        assert request_of("x").policy == ResumePolicy()

    def test_the_same_space_may_be_given_in_a_file_of_its_own_or_a_spec(
        self, shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        saved(shop, 0)
        file = tmp_path / "space.yaml"
        for body in (SPACE, {"name": "x", "space": SPACE}):
            file.write_text(json.dumps(body))
            assert main(["restore", str(shop.path), "--plan", "--space", str(file)]) == 0
        capsys.readouterr()
        for text_, word in (("[1]", "holds a list"), ("", "NoneType"), ("x: [", "not valid YAML")):
            file.write_text(text_)
            assert main(["restore", str(shop.path), "--plan", "--space", str(file)]) == 2
            assert word in capsys.readouterr().err
        assert main(["restore", str(shop.path), "--space", str(tmp_path / "none.yaml")]) == 2
        assert "there is no such file" in capsys.readouterr().err

    def test_a_parameter_may_be_called_space(self, tmp_path: Path) -> None:
        from holdfast.specfile import space_in

        parameter = {"type": "int", "low": 0, "high": 1}
        for body, expected in (
            ({"space": parameter}, {"space": parameter}),
            ({"space": {"space": parameter, "type": parameter}}, {"space": parameter, "type": parameter}),
        ):
            (tmp_path / "s.yaml").write_text(json.dumps(body))
            assert space_in(tmp_path / "s.yaml") == expected

    def test_references(self, tmp_path: Path) -> None:
        from holdfast.specfile import references_in

        (tmp_path / "r.yaml").write_text("data: /old\nsize: 3\n")
        assert references_in([]) is None
        assert references_in([str(tmp_path / "r.yaml"), "data=/new data", "deep.key=[1, 2]"]) == {
            "data": "/new data",
            "size": 3,
            "deep": {"key": [1, 2]},
        }
        (tmp_path / "r.yaml").write_text("- 1\n")
        with pytest.raises(SpecError, match="mapping"):
            references_in([str(tmp_path / "r.yaml")])
        with pytest.raises(SpecError, match="no such file"):
            references_in([str(tmp_path / "none.yaml")])


# What may be changed

CHANGES: dict[str, Any] = {
    "search.num_trials": 40,
    "search.time_budget": 1e6,
    "search.max_concurrent": 3,
    "search.target": 0.25,
    "search.plateau": 9,
    "search.max_cost": 1e6,
    "failure.max_failures": 5,
    "failure.retry_on": ["OSError", "crashed"],
    "failure.retry_delay": 1.5,
    "failure.retry_backoff": 3.0,
    "failure.max_retry_delay": 60.0,
    "failure.fail_fast": True,
    "failure.trial_timeout": 12.5,
    "recovery.after": ["lost", "failed"],
    "recovery.unfinished": "restart",
    "recovery.errored": "resume",
    "recovery.max_restores": 2,
    "recovery.delay": 5.0,
    "recovery.max_delay": 50.0,
    "execution.isolation": "process",
    "execution.runner": "dask",
    "execution.address": "tcp://127.0.0.1:8786",
    "execution.deployment": "trial/other",
    "execution.resources": {"cpu": 2, "gpu": 0, "custom": {}},
    "execution.ship": ["train.py"],
    "execution.trials_per_run": 5,
}
NEEDS: dict[str, Any] = {
    "search.max_cost": {"search": {"engine": "random", "num_trials": 20, "seed": 1, "cost_metric": "cost"}},
    "execution.runner": {"execution": {}},
    "execution.address": {"execution": {"runner": "dask"}},
}
NEEDS_A_DEPLOYMENT = {"execution.job_variables"}


def test_every_changeable_key_has_a_change_here() -> None:
    assert set(CHANGES) | NEEDS_A_DEPLOYMENT == set(CHANGEABLE)


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_takes_effect_and_is_recorded(key: str, tmp_path: Path) -> None:
    """R22."""
    (tmp_path / "train.py").write_text(TRAINABLE)
    changes = {"trainable": f"{tmp_path}/train.py:train", "execution": {"isolation": "inline"}, **NEEDS.get(key, {})}
    with closing(create(tmp_path / "runs", **changes)) as opened:
        section, _, name = key.partition(".")
        old = opened.spec.stored()[section][name]
        assert old != CHANGES[key]
        restored = prepare_restore(RestoreRequest(path=opened.folder.path, changes={key: CHANGES[key]}), Observer())
        assert restored.session is not None
        restored.session.journal.flush()  # as before anything runs
        stored = restored.session.spec.stored()
        assert stored[section][name] == CHANGES[key]
        leave(restored.session)
        audit = Experiment(opened).audit()
        assert [row.action for row in audit] == ["created", "restored", "changed"]
        assert audit[-1].detail == {key: [old, CHANGES[key]]}
        with closing(open_path(opened.folder.path, readonly=True)) as again:
            assert again.spec.stored() == stored
    # The path tells it, too, whatever becomes of the database.
    for file in (tmp_path / "runs").glob("holdfast.db*"):
        file.unlink()
    with closing(open_path(opened.folder.path, readonly=True)) as rebuilt:
        assert rebuilt.spec.stored() == stored


def test_one_key_of_a_nested_one_may_be_changed(opened: Opened) -> None:
    request = RestoreRequest(path=opened.folder.path, changes={"execution.resources.cpu": 3, "execution.resources.gpu": 0})
    spec, changes = changed_spec(opened, request)
    assert spec.execution.resources.cpu == 3
    assert changes == {"execution.resources.cpu": [1, 3]}
    for key in ("execution.resources.cpus", "execution.ship.0", "execution", "space.x", "execution.resources.cpu.x"):
        with pytest.raises(SpecError):
            changed_spec(opened, RestoreRequest(path=opened.folder.path, changes={key: 3}))


def test_only_time_in_which_somebody_drove_counts_against_the_time_budget(shop: Shop) -> None:
    """R22: a year has passed since, 5 s of it were driven."""
    saved(shop, 0)
    shop.lab.end(shop.lab.writer(0), loss=1.0)
    shop.leave("stopped on request")
    year = 365 * 86400 * 10**6
    for column in ("trial SET created = created", "attempt SET started = started", "experiment SET created = created"):
        alter(shop.opened, f"UPDATE {column} - {year}")
    spent = prepare_restore(RestoreRequest(path=shop.path, changes={"search.time_budget": 4.0}), Observer())
    leave(spent.session)  # the change itself has to be written
    alter(shop.opened, "UPDATE experiment SET holder = NULL, active_seconds = 5")
    lease = json.loads((shop.path / "lease.json").read_text())
    (shop.path / "lease.json").write_text(json.dumps({**lease, "holder": None}))
    assert prepare_restore(RestoreRequest(path=shop.path), Observer()).session is None
    left = prepare_restore(RestoreRequest(path=shop.path, changes={"search.time_budget": 6.0}), Observer())
    leave(left.session)


# What a killed driver leaves is believed by nobody


class TestKilled:
    def test_it_is_seen_at_once(self, shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
        saved(shop, 0)
        experiment = Experiment(shop.opened)
        assert experiment.lease.is_held
        assert (experiment.is_driven, experiment.status) == (False, "interrupted")
        assert holdfast.can_restore(shop.path)
        assert main(["show", str(shop.path)]) == 0
        out = capsys.readouterr().out
        assert "status:  interrupted" in out
        assert f"nobody; the last drive was cut off: process {GONE['pid']} on here, epoch 1, is gone" in out
        assert main(["list", str(shop.path.parent)]) == 0
        assert "interrupted" in capsys.readouterr().out
        assert main(["show", str(shop.path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["lease"] == {
            **{"driven": False, "held": True, "epoch": 1, "host": "here", "pid": GONE["pid"]},
            "remaining": found["lease"]["remaining"],
        }
        assert 0 < found["lease"]["remaining"] <= 30
        assert found["ended"] is None

    def test_another_host_may_still_drive(self, shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
        other = {**GONE, "host": "another", "hostname": "another"}
        alter(shop.opened, f"UPDATE experiment SET holder = '{json.dumps(other)}'")
        assert (Experiment(shop.opened).is_driven, Experiment(shop.opened).status) == (True, "running")
        assert not holdfast.can_restore(shop.path)
        main(["show", str(shop.path)])
        assert f"process {GONE['pid']} on another, epoch 1, for another" in capsys.readouterr().out
        alter(shop.opened, "UPDATE experiment SET lease_expires = 0")
        assert Experiment(shop.opened).status == "interrupted"
        assert holdfast.can_restore(shop.path)
        main(["show", str(shop.path)])
        assert "fell silent" in capsys.readouterr().out

    def test_how_the_last_drive_ended_is_shown(self, shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
        shop.leave("stopped on request")
        assert main(["show", str(shop.path)]) == 0
        assert "nobody; the last drive ended: stopped on request" in capsys.readouterr().out
        main(["show", str(shop.path), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["ended"] == "stopped on request"
        assert found["lease"] == {"driven": False, "held": False, "epoch": 1, "host": None, "pid": None, "remaining": 0.0}
        assert {"name", "id", "status", "path", "epoch", "trials", "best"} <= found.keys()

    def test_a_new_one_was_never_driven(self, opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["show", str(opened.folder.path)]) == 0
        assert "nobody; it was never driven" in capsys.readouterr().out

    def test_asking_whether_it_can_be_restored_writes_nothing(self, shop: Shop) -> None:
        """Not even for a path without its database, or a copy."""
        leave(prepare_restore(RestoreRequest(path=shop.path), Observer()).session)  # now the path knows everything
        shop.opened.close()
        copy = shutil.copytree(shop.path, shop.path.parent.parent / "elsewhere" / "copy")
        before = content(copy.parent)
        assert holdfast.can_restore(copy)
        assert content(copy.parent) == before

    def test_the_lease_in_the_path_counts_for_another_database(self, shop: Shop, tmp_path: Path) -> None:
        session = prepare_restore(RestoreRequest(path=shop.path), Observer()).session
        other = f"sqlite:///{tmp_path}/other.db"
        assert not holdfast.can_restore(shop.path, database=other)
        leave(session)


HARMS: list[Callable[[Path], object]] = [
    lambda path: (path / "experiment.json").unlink(),
    lambda path: (path / "lease.json").write_text("{"),
]


@pytest.mark.parametrize("harm", HARMS)
def test_can_restore_says_no_to_what_is_damaged(shop: Shop, harm: Callable[[Path], object]) -> None:
    harm(shop.path)
    assert not holdfast.can_restore(shop.path)
    with pytest.raises(HoldfastError):
        holdfast.restore(shop.path, force=True)


def test_the_database_is_sqlite(shop: Shop) -> None:
    """The tests above read its file."""
    file = shop.opened.database.file
    assert file is not None
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT COUNT(*) FROM experiment").fetchone() == (1,)
