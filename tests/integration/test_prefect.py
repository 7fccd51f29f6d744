"""What a search looks like in Prefect, and the public functions, on a real server."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import DIED, Lab, holdfast_environment, starts, tree
from support_prefect import View

MakeLab = Callable[..., Lab]


def ask(lab: Lab, what: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the API's filter for ``what`` finds."""
    found: list[dict[str, Any]] = View(lab, "").ask("POST", f"/{what}/filter", query)
    return found


def flow_runs(lab: Lab, name: str) -> list[dict[str, Any]]:
    return ask(lab, "flow_runs", {"flow_runs": {"name": {"any_": [name]}}, "sort": "START_TIME_ASC"})


def task_runs(lab: Lab, name: str) -> dict[str, str]:
    """Return the state of each task run of the experiment, by name."""
    found = ask(lab, "task_runs", {"flow_runs": {"name": {"any_": [name]}}, "limit": 200})
    return {run["name"]: run["state_type"] for run in found}


def test_runs_have_names_and_states_and_results_are_persisted(lab: Lab) -> None:
    """Task runs are recorded with a delay, so their states are waited for."""
    lab.order("fail", 0, 1)
    spec = lab.spec(name="seen", failure={"max_failures": 1}, search={"num_trials": 3})
    hold = lab.order("hold", 2, 1)
    run = lab.start("run", spec, fault="checkpoint.committed:6")
    # The server learns of a task's start from events, which go with the process; a restore can only close what it knows.
    lab.until(lambda: task_runs(lab, "seen").get("seen/trial-2#1") == "RUNNING", run)
    hold.unlink()
    assert run.wait().code == DIED
    assert [run["state_type"] for run in flow_runs(lab, "seen")] == ["RUNNING"]
    lab.run("restore", lab.path("seen"), code=1)
    assert [(run["state_type"], run["name"]) for run in flow_runs(lab, "seen")] == [("CRASHED", "seen"), ("COMPLETED", "seen")]
    assert "3 trials, 1 errored" in flow_runs(lab, "seen")[1]["state"]["message"]
    expected = {
        "seen/trial-0#1": "FAILED",
        "seen/trial-0#2": "FAILED",
        "seen/trial-1#1": "COMPLETED",
        "seen/trial-2#1": "CRASHED",
        "seen/trial-2#2": "COMPLETED",
    }
    lab.until(lambda: task_runs(lab, "seen") == expected)
    results = sorted(str(file.relative_to(lab.path("seen"))) for file in lab.path("seen").glob("trials/*/result-*.json"))
    assert results == ["trials/000001/result-a1.json", "trials/000002/result-a2.json"]
    assert not [file for file in lab.path("seen").rglob("*") if file.name.startswith((".prefect", ".tmp"))]


@pytest.mark.parametrize("fail_fast", [True, False])
def test_the_flow_fails_when_fail_fast_or_every_trial_errs(lab: Lab, fail_fast: bool) -> None:
    for number in (0,) if fail_fast else (0, 1):
        lab.order("fail", number, 0)
    name = f"failed-{fail_fast}".lower()
    lab.run("run", lab.spec(name=name, failure={"fail_fast": fail_fast}, search={"num_trials": 2}), code=1)
    (run,) = flow_runs(lab, name)
    assert run["state_type"] == "FAILED"
    assert ("1 trials, 1 errored" if fail_fast else "2 trials, 2 errored") in run["state"]["message"]
    assert lab.json("show", lab.path(name))["status"] == "failed"


SCRIPT = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path

    import holdfast

    folder = Path(sys.argv[1])
    data = json.loads(sys.argv[2])


    if __name__ == "__main__":
        result = holdfast.search(data)
        assert not result.failed
        assert [trial.status for trial in result.trials] == ["COMPLETED"] * 3
        assert result.best is min(result.trials, key=lambda trial: trial.metrics["loss"])
        assert result.path == folder / "runs" / "exp"
        frame = result.results_df()
        assert list(frame["trial"]) == [0, 1, 2]
        assert {"config.x", "metric.loss", "status", "step", "attempts"} <= set(frame.columns)

        assert holdfast.can_restore(result.path)
        more = holdfast.restore(result.path, changes={"search.num_trials": 4})
        assert len(more.trials) == 4
        assert more.trials[:3] == result.trials

        with holdfast.open(result.path) as experiment:
            assert experiment.status == "completed"
            assert experiment.best_trial() == more.best
            ids, configs, scores, statuses = experiment.load()
            assert ids == [0, 1, 2, 3] and all(set(config) == {"x"} for config in configs)
            assert experiment.load(last_trial_id=2).ids == [3]
            assert len(experiment.history_df()) == 12
            actions = [row.action for row in experiment.audit()]
            assert actions == ["created", "started", "driving", "restored", "changed", "driving"]

        assert not holdfast.can_restore(folder)
        try:
            holdfast.search(data)
        except holdfast.ExperimentExists as error:
            assert "holdfast restore" in str(error)
        else:
            raise AssertionError("a taken name was not refused")
        again = holdfast.restore(result.path)
        assert again.trials == more.trials
        print("all good")
    """
)


def data_of(lab: Lab) -> dict[str, Any]:
    return {
        "name": "exp",
        "trainable": str(lab.folder / "train.py") + ":train",
        "storage": str(lab.folder / "runs"),
        "objectives": {"loss": "min"},
        "space": {"x": {"type": "float", "low": 0.0, "high": 4.0}},
        "search": {"engine": "random", "num_trials": 3, "seed": 1, "max_concurrent": 2},
    }


def test_the_public_functions(lab: Lab) -> None:
    ended = lab.python(SCRIPT, lab.folder, json.dumps(data_of(lab)))
    assert ended.code == 0, ended.output
    assert ended.output.strip().endswith("all good")


def test_without_a_server_one_is_embedded(tmp_path: Path, prefect_home: Path) -> None:
    """Killed, restored, done; no server and none of its folders is left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    home = tmp_path / "home"
    environment = holdfast_environment(
        PREFECT_HOME=str(home), XDG_CACHE_HOME=str(prefect_home / "cache"), TMPDIR=str(scratch), HOME=str(home)
    )
    lab = Lab(tmp_path / "lab", environment)
    try:
        lab.run("run", lab.spec(search={"num_trials": 2}), fault="checkpoint.committed:4", code=137)
        lab.until(lambda: not any(scratch.iterdir()))
        lab.run("restore", lab.path())
        assert lab.statuses() == ["COMPLETED"] * 2
        assert starts(lab.log(), 1) == [(1, 0), (2, 1)]
        assert not tree(scratch)
    finally:
        lab.close()


def test_prefect_that_cannot_be_reached_is_said_so_and_loses_nothing(lab: Lab) -> None:
    spec = lab.spec(search={"num_trials": 1})
    ended = lab.run("run", spec, code=4, PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES="0")
    assert "Traceback" not in ended.output
    lab.run("restore", lab.path())
    assert lab.statuses() == ["COMPLETED"]
