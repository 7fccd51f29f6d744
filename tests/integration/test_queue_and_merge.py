"""Trials from outside in real searches: queued while one runs, or while none does; due later; merged from other experiments."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from support import DIED, Lab, MakeLab, starts

import holdfast

GRID: dict[str, Any] = {
    "space": {"x": {"type": "int", "low": 0, "high": 3}},
    "search": {"engine": "grid", "num_trials": None},
}


def xs(lab: Lab, name: str = "exp") -> list[Any]:
    return [trial["config"]["x"] for trial in lab.trials(name)]


def sources(lab: Lab) -> list[str]:
    with holdfast.open(lab.path()) as experiment:
        return [trial.source for trial in experiment.trials]


def test_a_running_search_takes_queued_trials_before_it_proposes(lab: Lab) -> None:
    hold = lab.order("hold", 0, 1)
    running = lab.start("run", lab.spec(**GRID))
    lab.until_logged("hold", 0, 1, running)
    told = lab.run("enqueue", lab.path(), "--config", '{"x": 2}', "--repeat", 2, "--metadata", "why=noise").output
    assert "trials 1 to 2 are queued; the running search starts them" in told
    hold.unlink()
    assert running.wait().code == 0, running.output
    assert xs(lab) == [0, 2, 2, 1, 2, 3]  # no point of the grid is lost or comes twice
    assert sources(lab) == ["proposed", "queued", "queued", "proposed", "proposed", "proposed"]
    assert lab.statuses() == ["COMPLETED"] * 6
    with holdfast.open(lab.path()) as experiment:
        assert experiment.trial(2).metadata == {"why": "noise"}
        table = experiment.results_df(aggregate="mean")
        assert table["group"].tolist() == [0, 1, 3, 4, 5]
        assert table["scored"].tolist() == [1, 2, 1, 1, 1]


def test_what_is_queued_while_nobody_drives_is_run_by_the_next_restore(lab: Lab) -> None:
    lab.order("hold", 1, 1)
    running = lab.start("run", lab.spec(**GRID))
    lab.until_logged("hold", 1, 1, running)
    running.kill()
    (queued,) = lab.json("enqueue", lab.path(), "--config", '{"x": 3}')
    assert (queued["number"], queued["status"], queued["config"], queued["group"]) == (2, "PENDING", {"x": 3}, 2)
    (lab.folder / "orders" / "hold-1-1").unlink()
    lab.run("restore", lab.path())
    assert xs(lab) == [0, 1, 3, 2, 3]
    assert lab.statuses() == ["COMPLETED"] * 5
    assert "nothing is left to do" in lab.run("restore", lab.path()).output
    lab.run("enqueue", lab.path(), "--config", '{"x": 1}')  # the budget is used up: it runs all the same
    lab.run("restore", lab.path(), "--no-new-trials")
    assert xs(lab) == [0, 1, 3, 2, 3, 1]
    assert lab.statuses() == ["COMPLETED"] * 6


def test_queued_trials_count_against_the_number_of_trials(lab: Lab) -> None:
    hold = lab.order("hold", 0, 0)
    running = lab.start("run", lab.spec(search={"num_trials": 3}))
    lab.until_logged("hold", 0, 0, running)
    config = json.dumps({"x": 1, "b": 2, "a": "t"})
    (lab.folder / "config.json").write_text(config)
    lab.run("enqueue", lab.path(), "--config", f"@{lab.folder / 'config.json'}")
    hold.unlink()
    assert running.wait().code == 0, running.output
    assert sources(lab) == ["proposed", "queued", "proposed"]


def test_a_scheduled_trial_is_waited_for_and_not_started_before_its_time(lab: Lab) -> None:
    lab.run("run", lab.spec(**{**GRID, "space": {"x": {"type": "int", "low": 0, "high": 0}}}))
    start = datetime.now(UTC) + timedelta(seconds=3)
    lab.run("enqueue", lab.path(), "--config", '{"x": 0}', "--at", start.isoformat())
    lab.run("restore", lab.path())
    assert lab.statuses() == ["COMPLETED"] * 2
    with holdfast.open(lab.path()) as experiment:
        trial = experiment.trial(1)
        assert trial.ts_start == start
        assert trial.attempt.started is not None
        assert trial.attempt.started >= start


def test_stop_ends_a_search_that_waits_for_a_scheduled_trial(lab: Lab) -> None:
    lab.run("run", lab.spec(**{**GRID, "space": {"x": {"type": "int", "low": 0, "high": 0}}}))
    start = datetime.now(UTC) + timedelta(hours=1)
    lab.run("enqueue", lab.path(), "--config", '{"x": 0}', "--at", start.isoformat())
    lab.run("enqueue", lab.path(), "--config", '{"x": 0}')
    running = lab.start("restore", lab.path())
    lab.until_logged("done", 2, lab.steps, running)
    lab.run("stop", lab.path())
    assert running.wait().code == 0, running.output
    assert "stopped on request" in running.output
    assert lab.statuses() == ["COMPLETED", "PENDING", "COMPLETED"]
    assert starts(lab.log(), 1) == []


def test_tpe_is_warmed_up_by_merged_trials_and_a_restore_knows_them(make_lab: MakeLab) -> None:
    lab = make_lab(steps=1)
    tpe = {"engine": "tpe", "num_trials": 4}
    lab.run("run", lab.spec(name="old", search={"num_trials": 12, "seed": 3}))
    lab.run("run", lab.spec(name="cold", search=tpe))
    lab.run("run", lab.spec(name="warm", search=tpe, merge=["old"]))
    lab.run("run", lab.spec(search=tpe, merge=["old"]), fault="experiment.rows-made", code=DIED)  # created again, and whole
    lab.run("run", lab.spec(search=tpe, merge=["old"]), fault="proposal.committed:2", code=DIED)
    lab.run("restore", lab.path(), fault="proposal.committed:1", code=DIED)
    lab.run("restore", lab.path())
    assert lab.outcome("exp") == lab.outcome("warm")
    cold, warm = ([trial["config"] for trial in lab.trials(name)] for name in ("cold", "warm"))
    assert [one != other for one, other in zip(cold, warm, strict=True)] == [True] * 4
    with holdfast.open(lab.path("exp")) as experiment:
        assert len(experiment.load().ids) == 4 + 12
        assert experiment.load().left_out == 0
    assert "0 trials of old were merged into exp" in lab.run("merge", lab.path(), "old").output
    assert lab.json("merge", lab.path("cold"), "old", "warm") == {"old": 12, "warm": 4}
    before = lab.outcome("cold")
    lab.run("restore", lab.path("cold"), "--set", "search.num_trials=6")
    after = lab.outcome("cold")
    assert {number: after[number] for number in before} == before
    assert len(after) == 6


def test_a_merge_takes_effect_in_a_running_search(make_lab: MakeLab) -> None:
    """What is proposed after it is what a restore after it proposes."""
    lab = make_lab(steps=2)
    search = {"engine": "tpe", "num_trials": 3}
    lab.run("run", lab.spec(name="old", search={"num_trials": 12, "seed": 3}))
    for name in ("live", "killed"):
        hold = lab.order("hold", 0, 1)
        running = lab.start("run", lab.spec(name=name, search=search))
        lab.until_logged("hold", 0, 1, running)
        if name == "killed":
            running.kill()
        lab.run("merge", lab.path(name), "old")
        hold.unlink()
        if name == "killed":
            lab.run("restore", lab.path(name))
        else:
            assert running.wait().code == 0, running.output
        lab.clear_log()
    assert [trial["config"] for trial in lab.trials("live")] == [trial["config"] for trial in lab.trials("killed")]


RACE = """
import sys
import holdfast
from holdfast.flows import driver

make, raced = driver.make_proposer, set()


def patched(spec, seed, **options):
    proposer = make(spec, seed, **options)
    propose = proposer.propose

    def slow(number):
        config = propose(number)
        if number in (0, 2, 5) and number not in raced:  # somebody queues before the proposal is committed
            raced.add(number)
            with holdfast.open("runs/exp") as experiment:
                assert experiment.new_trial({"x": 3}).number == number
        return config

    proposer.propose = slow
    return proposer


if __name__ == "__main__":
    driver.make_proposer = patched
    holdfast.search(sys.argv[1])
"""


def test_a_trial_that_is_queued_while_a_config_is_proposed_comes_before_it(lab: Lab) -> None:
    (lab.folder / "race.py").write_text(RACE)
    ended = lab.python("import runpy; runpy.run_path('race.py', run_name='__main__')", lab.spec(**GRID))
    assert ended.code == 0, ended.output
    assert xs(lab) == [3, 0, 3, 1, 2, 3, 3]
    assert [number for number, source in enumerate(sources(lab)) if source == "queued"] == [0, 2, 5]
    assert lab.statuses() == ["COMPLETED"] * 7
    assert [entry.trial for entry in lab.log() if entry.event == "start"] == list(range(7))
