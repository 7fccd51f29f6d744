"""What is seen of a search in Prefect, on a real server: events, artifacts and tags, also of those that were cut off."""

from __future__ import annotations

import json
import signal
import textwrap
from typing import Any

from support import DIED, Lab
from support_prefect import View

EVENTS = "holdfast."


def events_of(view: View, uuid: str) -> list[dict[str, Any]]:
    """Return the events about an experiment, oldest first."""
    resource = {"id": [f"holdfast.experiment.{uuid}"]}
    query = {"filter": {"event": {"prefix": [EVENTS]}, "resource": resource, "order": "ASC"}, "limit": 50}
    found: list[dict[str, Any]] = view.ask("POST", "/events/filter", query)["events"]
    return sorted(found, key=lambda event: str(event["occurred"]))


def said_of(view: View, uuid: str) -> list[str]:
    """Return what events say, in short: of the experiment by its name alone, of trials with their numbers and attempts."""
    words = []
    for event in events_of(view, uuid):
        what, payload = event["event"].removeprefix(EVENTS), event["payload"]
        words.append(f"{what} {payload['trial']}#{payload['attempt']}" if "trial" in payload else what)
    return words


def artifacts_of(view: View, name: str) -> dict[str, dict[str, Any]]:
    """Return the newest artifact of each kind, which the UI shows as one with a history."""
    query = {"artifacts": {"key": {"like_": f"-{name}-"}}}
    return {each["key"].split("-")[1]: each for each in view.ask("POST", "/artifacts/latest/filter", query)}


def uuid_of(lab: Lab, name: str) -> str:
    return str(json.loads((lab.path(name) / "experiment.json").read_text())["uuid"])


NASTY = 'raise RuntimeError(f"no luck in step {step}")'
NASTIER = r'raise RuntimeError("| <b>no</b> `luck`\n# in\udcff " + "x" * 1_000_000)'


# Words about what is stored are not waited for when a server is slow; what they say is what is looked at here.
PATIENT = """
import sys
from holdfast.flows import telling
telling.AWAY_SECONDS = 60.0
from holdfast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_search_that_is_killed_told_to_end_and_restored_is_one_story(lab: Lab) -> None:
    name, view = "told-story", View(lab, "told-story")
    code = (lab.folder / "train.py").read_text()
    assert NASTY in code
    (lab.folder / "train.py").write_text(code.replace(NASTY, NASTIER))
    lab.order("fail", 1, 1)
    hold = lab.order("hold", 2, 1)
    run = lab.start("run", lab.spec(name=name, search={"num_trials": 4}))
    lab.until_logged("hold", 2, 1, run)
    uuid = uuid_of(lab, name)
    first = ["experiment.started", "trial.started 0#1", "trial.completed 0#1"]
    first += ["trial.started 1#1", "trial.failed 1#1", "trial.started 2#1"]
    # What is seen of a search that is killed without a word is its last state.
    last = "1 RUNNING, 1 COMPLETED, 1 FAILED"
    lab.until(lambda: last in artifacts_of(view, name).get("summary", {"data": ""})["data"], run)
    lab.until(lambda: said_of(view, uuid) == first, run)
    assert run.kill().code == DIED
    left = artifacts_of(view, name)
    assert left["progress"]["data"] == 50.0
    assert [row["trial"] for row in json.loads(left["leaderboard"]["data"])] == [0]
    assert f"# {name}: running" in left["summary"]["data"]

    restore = lab.start("restore", lab.path(name), script=PATIENT)
    lab.until(lambda: "trial.started 2#2" in said_of(view, uuid), restore)
    restore.signal(signal.SIGTERM)
    lab.until(lambda: "running trials have" in restore.output, restore)
    hold.unlink()
    assert restore.wait().code == 143
    second = ["experiment.restored", "trial.started 2#2", "experiment.interrupted"]
    lab.until(lambda: said_of(view, uuid) == first + second)
    broken = artifacts_of(view, name)
    assert broken.keys() == left.keys()
    assert all(broken[kind]["key"] == left[kind]["key"] for kind in left)
    assert all(broken[kind]["latest_id"] != left[kind]["latest_id"] for kind in left)
    assert f"# {name}: interrupted" in broken["summary"]["data"]
    assert "| reason | interrupted: SIGTERM |" in broken["summary"]["data"]
    assert f"holdfast restore {lab.path(name)}\n" in broken["summary"]["data"]

    lab.run("restore", lab.path(name), code=1)
    lab.until(lambda: said_of(view, uuid)[-1] == "experiment.completed")
    ends = [word for word in said_of(view, uuid) if "completed" in word or "failed" in word]
    assert ends == [f"trial.{word}" for word in ("completed 0#1", "failed 1#1", "completed 2#3", "completed 3#1")] + [
        "experiment.completed"
    ]
    done = artifacts_of(view, name)
    assert done["progress"]["data"] == 100.0
    best = lab.json("show", lab.path(name))["best"]["number"]
    assert json.loads(done["leaderboard"]["data"])[0]["trial"] == best
    text = done["summary"]["data"]
    assert f"| best | trial {best}: " in text
    assert "work was lost" in text or "steps of work were lost" in text
    assert r"RuntimeError: \| \<b\>no\</b\> \`luck\`\\n\# in" in text
    assert "x" * 1000 not in text

    # Runs and events can be found by their tags, also those of the process that died.
    ours = ["experiment:told-story", "holdfast"]
    assert [sorted(run["tags"]) for run in view.flow_runs()] == [ours] * 3
    ended = {"trial-0#1", "trial-1#1", "trial-2#2", "trial-2#3", "trial-3#1"}  # 2#1 died before it could say so
    lab.until(lambda: {each for each, run in view.task_runs().items() if run["state_type"] != "RUNNING"} >= ended)
    for each, task in view.task_runs().items():
        assert each not in ended or sorted(task["tags"]) == [*ours, f"trial:{each[6]}"], each
    for event in events_of(view, uuid):
        related = {each["prefect.resource.id"] for each in event["related"]}
        assert {f"prefect.tag.{tag}" for tag in ours} <= related
        assert {f"prefect.flow-run.{run['id']}" for run in view.flow_runs()} & related
        assert event["resource"]["holdfast.path"] == str(lab.path(name))


FLOWS = textwrap.dedent(
    """
    import sys
    from prefect import tags
    from holdfast.flows.search import search

    with tags("mine"):
        print(search("told-flow.yaml", return_state=True).type)
    print(search("told-flow.yaml", overrides=["objectives.loss=up"], return_state=True).type)
    """
)


def test_a_search_whose_trials_all_fail_and_flows_that_others_call(lab: Lab) -> None:
    lab.order("fail", 0, 0)
    spec = lab.spec(name="told-fail", failure={"fail_fast": True}, search={"num_trials": 3})
    assert lab.start("run", spec, script=PATIENT).wait().code == 1
    view, uuid = View(lab, "told-fail"), uuid_of(lab, "told-fail")
    story = ["experiment.started", "trial.started 0#1", "trial.failed 0#1", "experiment.failed"]
    lab.until(lambda: said_of(view, uuid) == story)
    failed = events_of(view, uuid)[-1]["payload"]
    assert failed["trials"] == {"FAILED": 1}
    assert failed["restore"] == f"holdfast restore {lab.path('told-fail')}"
    assert failed["best"] == "none yet"
    text = artifacts_of(view, "told-fail")["summary"]["data"]
    assert "# told-fail: failed" in text
    assert "| 1 | 0 | RuntimeError: no luck in step 0 |" in text
    assert f"{failed['restore']} --restart-errored" in text.replace(" \\\n  ", " ")  # a long command has several lines

    lab.spec(name="told-flow", search={"num_trials": 1})
    (lab.folder / "orders" / "fail-0-0").unlink()
    ended = lab.python(FLOWS)
    assert [line for line in ended.output.splitlines() if line.startswith("StateType")] == [
        "StateType.COMPLETED",
        "StateType.FAILED",
    ], ended.output
    view = View(lab, "told-flow")
    good, bad = view.flow_runs()
    assert sorted(good["tags"]) == ["experiment:told-flow", "holdfast", "mine"]
    lab.until(lambda: "trial:0" in view.task_runs().get("trial-0#1", {"tags": []})["tags"])
    assert sorted(view.task_runs()["trial-0#1"]["tags"]) == ["experiment:told-flow", "holdfast", "mine", "trial:0"]
    assert bad["tags"] == []
    uuid = uuid_of(lab, "told-flow")
    lab.until(lambda: "experiment.completed" in said_of(view, uuid))
    assert said_of(view, uuid).count("experiment.started") == 1, "a spec that is refused is no experiment"
