"""Flow runs as forms, schedules and Prefect's Retry make them, on a real server."""

from __future__ import annotations

import json
import signal

from support import Lab

RUNS = """
import json, os, sys
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flow_engine import load_flow_run, run_flow
from prefect.states import Scheduled
from holdfast.flows.restore import restore
from holdfast.flows.search import search
from holdfast.testing.faults import install

if len(sys.argv) > 2:
    install(sys.argv[2])
told = json.loads(sys.argv[1])
flows = {"search": search, "restore": restore}
deployed = {name: flow.to_deployment(name="formed").apply() for name, flow in flows.items()}
client = get_client(sync_client=True)
runs = {}
for run in told:
    if "again" in run:
        found = runs.get(run["again"], run["again"])
        if run.get("retry"):
            client.set_flow_run_state(UUID(str(found)), Scheduled(name="AwaitingRetry"), force=True)
    else:
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": run.get("at", "2026-01-05T12:00:00Z")}}
        body = {"parameters": run["parameters"], "state": state}
        try:
            answer = client._client.post(f"/deployments/{deployed[run['flow']]}/create_flow_run", json=body)
        except PrefectHTTPStatusError as error:
            print("ANSWER", error.response.status_code, error.response.json()["detail"], flush=True)
            continue
        found = runs[run["as"]] = answer.json()["id"]
    print("ID", found, flush=True)
    loaded = load_flow_run(UUID(str(found)))
    name = run.get("flow", "search")
    run_flow(flows[name], flow_run=loaded, parameters=loaded.parameters, return_type="state")
    state = client.read_flow_run(UUID(str(found)))
    print("STATE", state.name, state.state.type.value, state.state.message, flush=True)
"""


def said(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("ANSWER ", "STATE "))]


def test_what_is_wrong_is_refused_with_its_reason_and_the_date_is_the_schedules(lab: Lab) -> None:
    spec = lab.spec(name="night-{date}", search={"num_trials": 1})
    by_field = {
        "name": "byfield",
        "trainable": f"{lab.folder}/train.py:train",
        "storage": str(lab.folder / "runs"),
        "objectives": {"loss": "min"},
        "space": {"x": {"type": "float", "low": 0, "high": 1}},
        "search": {"engine": "random", "num_trials": 1},
    }
    half = {"type": "int", "low": 2}
    on = ["if_exists=restore"]

    def search(name: str, overrides: list[str], at: str = "2026-01-05T12:00:00Z") -> dict[str, object]:
        parameters = {"spec": str(spec), "overrides": overrides}
        return {"as": name, "flow": "search", "at": at, "parameters": parameters}

    path = str(lab.folder / "runs" / "night-2026-01-05")
    (begun,) = [search("killed", on)]
    died = lab.python(RUNS, json.dumps([begun]), "checkpoint.committed:2")
    assert died.code == -signal.SIGKILL, died.output
    (killed,) = [line.split()[1] for line in died.output.splitlines() if line.startswith("ID ")]
    plan = [
        ({"again": killed}, "STATE night-2026-01-05 COMPLETED every trial of the budget was proposed"),
        ({"again": killed, "retry": True}, "STATE night-2026-01-05 COMPLETED nothing is left to do"),
        (search("same", on), "STATE night-2026-01-05 COMPLETED nothing is left to do"),
        (search("fail", []), "STATE night-2026-01-05 FAILED the name 'night-2026-01-05' is taken: "),
        (search("next", on, "2026-01-06T12:00:00Z"), "STATE night-2026-01-06 COMPLETED every trial"),
        (search("new", ["if_exists=new"]), "STATE night-2026-01-05 COMPLETED every trial"),
        (search("unknown", ["serach.seed=1"]), "STATE night-2026-01-05 FAILED"),
        ({"as": "a", "flow": "search", "parameters": {"spec": by_field}}, "STATE byfield COMPLETED every trial"),
        (
            {
                "as": "b",
                "flow": "search",
                "parameters": {"spec": {**by_field, "name": "b", "space": {"x": half}}},
            },
            "STATE b FAILED spec: space.x.high is missing; add it",
        ),
        (
            {"as": "c", "flow": "search", "parameters": {"spec": {**by_field, "search": {"num_trials": -1}}}},
            "ANSWER 409 Error creating flow run: Validation failed for field 'spec.search.num_trials'. Failure reason:",
        ),
        (
            {"as": "d", "flow": "restore", "parameters": {"path": path, "resume_errored": True, "restart_errored": True}},
            "STATE night-2026-01-05 FAILED resume_errored and restart_errored are both set; choose one",
        ),
        (
            {"as": "e", "flow": "restore", "parameters": {"path": f"{path}-nobody"}},
            f"STATE night-2026-01-05-nobody FAILED {path}-nobody",
        ),
        (
            {"as": "f", "flow": "restore", "parameters": {"path": path, "database": "postgresql://u:canary@h/d"}},
            "ANSWER 409 Error creating flow run: Validation failed for field 'database'",
        ),
        (
            {"as": "g", "flow": "restore", "parameters": {"path": path, "changes": {"search.num_trials": 2}}},
            "STATE night-2026-01-05 COMPLETED every trial",
        ),
    ]
    ended = lab.python(RUNS, json.dumps([step for step, _ in plan]))
    found = said(ended.output)
    assert len(found) == len(plan), ended.output
    for line, (_, wanted) in zip(found, plan, strict=True):
        assert line.startswith(wanted), f"{line}\n\n{ended.output}"
    assert "holdfast restore" in found[3]
    names = sorted(folder.name for folder in (lab.folder / "runs").iterdir() if folder.is_dir())
    assert names == ["byfield", "night-2026-01-05", "night-2026-01-05-2", "night-2026-01-06"]
    assert lab.statuses("night-2026-01-05") == ["COMPLETED"] * 2
