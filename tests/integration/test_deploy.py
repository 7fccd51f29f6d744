"""``holdfast deploy`` on a real server: the same state however often, what people changed is theirs, and what it refuses."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fastapi
import pytest
import yaml
from packaging.version import Version
from prefect.settings import PREFECT_API_URL, temporary_settings
from support_own_server import Own, at_once, without

from holdfast.cli import main
from holdfast.core.errors import EngineError, SpecError
from holdfast.deployments import automations
from holdfast.deployments.catalogue import HEARTBEAT_VARIABLE, WATCH_SLUG, catalogue, prefect_yaml
from holdfast.deployments.deploy import Change, Wanted, deploy
from holdfast.flows.naming import COLLECT, POOL, RESTORE, SEARCH, TAG, TRIAL, WATCH

pytestmark = pytest.mark.xdist_group("own-server")

SPEC = """\
name: digits
trainable: train.py:train
objectives: {loss: min}
space: {x: {type: float, low: 0, high: 1}}
search: {engine: random, num_trials: 1}
"""


@pytest.fixture(scope="module")
def own(own_server: Own) -> Iterator[Own]:
    with own_server.used() as server:
        yield server


@pytest.fixture
def server(own: Own) -> Own:
    own.empty()
    return own


def quietly(wanted: Wanted) -> list[Change]:
    return deploy(wanted, lambda text: None)


def what(changes: list[Change]) -> dict[str, str]:
    return {change.name: change.what for change in changes}


def watch_schedule(server: Own) -> dict[str, Any]:
    (found,) = [one for one in server.deployment(WATCH)["schedules"] if one["slug"] == WATCH_SLUG]
    return dict(found)


def test_five_times_is_the_same_state_each_time(server: Own, tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(SPEC)
    wanted = Wanted(workdir=str(tmp_path), specs=(str(tmp_path / "digits.yaml"),))
    changes = quietly(wanted)
    assert {change.what for change in changes if change.kind != "block type"} == {"made"}
    first = server.state()
    names = [f"{one['entrypoint'].split('.')[-1]}/{one['name']}" for one in first["deployments"]]
    assert sorted(names) == sorted([SEARCH, RESTORE, WATCH, COLLECT, TRIAL])
    assert [pool["name"] for pool in first["work_pools"]] == [POOL]
    assert sorted(one["name"] for one in first["automations"]) == sorted(automations.NAMES)
    assert [one["name"] for one in first["block_documents"]] == ["digits"]
    assert all(one["tags"] == [TAG] and one["enforce_parameter_schema"] for one in first["deployments"])
    assert server.deployment(SEARCH)["schedules"][0]["parameters"]["spec"] == "block:digits"
    assert not server.deployment(SEARCH)["schedules"][0]["active"]
    assert (tmp_path / "runs").is_dir()
    for _ in range(4):
        assert {change.what for change in quietly(wanted)} == {"as it was"}
        assert server.state() == first  # ids, times of change, schedules and all


def test_the_other_way_of_healing_and_back(server: Own, tmp_path: Path) -> None:
    with_automations = Wanted(workdir=str(tmp_path))
    without_them = Wanted(workdir=str(tmp_path), automations=False)
    quietly(with_automations)
    first = server.state()
    assert not watch_schedule(server)["active"]
    assert what(quietly(without_them))[automations.SILENCE] == "removed"
    assert server.every("automations") == []
    assert watch_schedule(server)["active"]
    identity = watch_schedule(server)["id"]
    assert {change.what for change in quietly(without_them)} == {"as it was"}
    assert what(quietly(with_automations))[automations.SILENCE] == "made"
    assert not watch_schedule(server)["active"]
    assert watch_schedule(server)["id"] == identity
    now = server.state()
    told = [{one["name"]: one["actions"] for one in state["automations"]} for state in (first, now)]
    assert told[0] == told[1]
    assert len(now["automations"]) == len(automations.NAMES)
    # Switched by a person, and the way stays the same: theirs.
    server.ask("PATCH", f"/deployments/{server.deployment(WATCH)['id']}/schedules/{identity}", {"active": True})
    assert {change.what for change in quietly(with_automations)} == {"as it was"}
    assert watch_schedule(server)["active"]


def test_what_a_person_changed_stays_and_what_is_ours_is_mended(server: Own, tmp_path: Path) -> None:
    wanted = Wanted(workdir=str(tmp_path))
    quietly(wanted)
    collect, watch = server.deployment(COLLECT), server.deployment(WATCH)
    (nightly,) = collect["schedules"]
    server.ask("PATCH", f"/deployments/{collect['id']}/schedules/{nightly['id']}", {"active": False})
    own_schedule = {"schedule": {"cron": "5 5 * * *", "timezone": "UTC"}, "active": True}
    server.ask("POST", f"/deployments/{collect['id']}/schedules", [own_schedule])
    changes = {"tags": ["holdfast", "team-a"], "concurrency_limit": 3, "paused": True, "job_variables": {"env": {"A": "b"}}}
    server.ask("PATCH", f"/deployments/{collect['id']}", changes)
    theirs = {**collect["parameters"], "verify": True, "storages": ["/elsewhere"]}
    server.ask("PATCH", f"/deployments/{collect['id']}", {"parameters": theirs, "description": "?", "pull_steps": []})
    server.ask("PATCH", f"/deployments/{watch['id']}", {"parameters": {**watch["parameters"], "deployment": "restore/gpu"}})
    server.ask("PATCH", f"/work_pools/{POOL}", {"concurrency_limit": 2, "is_paused": True})
    (silence,) = [one for one in server.every("automations") if one["name"] == automations.SILENCE]
    server.ask("PATCH", f"/automations/{silence['id']}", {"enabled": False})
    found = what(quietly(Wanted(workdir=str(tmp_path), silence=120)))  # which changes the automation, too
    assert found[automations.SILENCE] == found[COLLECT] == "changed"
    now = server.deployment(COLLECT)
    slugs = {one["slug"]: one for one in now["schedules"]}
    assert slugs["nightly"]["active"] is False
    assert slugs[None]["schedule"]["cron"] == "5 5 * * *"
    assert (now["tags"], now["paused"]) == (["holdfast", "team-a"], True)
    assert now["global_concurrency_limit"]["limit"] == 3
    assert now["parameters"] == {"storages": ["./runs"], "verify": True}
    assert now["description"] == collect["description"]
    assert now["pull_steps"] == collect["pull_steps"]
    assert now["job_variables"]["env"] == {"A": "b", HEARTBEAT_VARIABLE: "30"}
    assert server.deployment(WATCH)["parameters"]["deployment"] == "restore/gpu"
    pool = server.ask("GET", f"/work_pools/{POOL}")
    assert (pool["concurrency_limit"], pool["is_paused"]) == (2, True)
    (silence,) = [one for one in server.every("automations") if one["name"] == automations.SILENCE]
    assert silence["enabled"] is False
    assert silence["trigger"]["within"] == 120
    before = server.state()
    assert {change.what for change in quietly(Wanted(workdir=str(tmp_path), silence=120))} == {"as it was"}
    assert server.state() == before
    quietly(wanted)
    assert server.deployment(COLLECT)["job_variables"]["env"] == {"A": "b"}


def test_several_at_once_make_everything_once(server: Own, tmp_path: Path) -> None:
    wanted = Wanted(workdir=str(tmp_path))
    at_once(*[partial(quietly, wanted)] * 3)
    state = server.state()
    assert sorted(one["name"] for one in state["deployments"]) == ["collect", "restore", "search", "trial", "watch"]
    assert sorted(one["name"] for one in state["automations"]) == sorted(automations.NAMES)
    assert [pool["name"] for pool in state["work_pools"]] == [POOL]
    for one in state["deployments"]:
        slugs = [schedule["slug"] for schedule in one["schedules"]]
        assert len(slugs) == len(set(slugs))
    assert {change.what for change in quietly(wanted)} == {"as it was"}
    assert server.state() == state


def test_what_cannot_be_is_refused_and_nothing_is_written(server: Own, tmp_path: Path) -> None:
    before = server.state()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    here = str(tmp_path)
    refused: list[tuple[Wanted, str]] = [
        (Wanted(workdir=here, storages=()), "name at least one folder"),
        (Wanted(workdir=here, storages=("file",)), "is a file"),
        (Wanted(workdir=here, storages=("new", "file/below")), "file/below cannot be made: .*file is a file"),
        (Wanted(workdir=here, storages=("link",)), "is a link to nothing"),
        (Wanted(workdir=here, storages=("block:nobody",)), "there is no block 'nobody'"),
        (Wanted(workdir=str(tmp_path / "nowhere")), "does not exist; make it"),
        (Wanted(workdir=here, silence=1), "silence is 1 s"),
        (Wanted(workdir=here, database="postgresql://me:secret@host/db"), "has a password"),
        (Wanted(workdir=here, specs=(str(tmp_path / "nothing.yaml"),)), "nothing.yaml"),
    ]
    for wanted, words in refused:
        with pytest.raises(SpecError, match=words) as caught:
            quietly(wanted)
        assert "secret" not in str(caught.value)
    server.ask("POST", "/work_pools/", {"name": "elsewhere", "type": "kubernetes", "base_job_template": {}})
    with pytest.raises(SpecError, match="'elsewhere' is of type kubernetes"):
        quietly(Wanted(workdir=here, pool="elsewhere"))
    server.ask("DELETE", "/work_pools/elsewhere")
    assert without(server.state(), "block_schemas") == without(before, "block_schemas")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link"]


def test_a_pool_of_containers_gets_no_folder_of_this_machine(server: Own, tmp_path: Path) -> None:
    """Neither one that runs work in, nor storages made here; what every job can reach is deployed, and taken up again."""
    server.ask("POST", "/work_pools/", {"name": "containers", "type": "docker", "base_job_template": {}})
    volume = str(tmp_path / "volume")
    for relative in ("./runs", "runs", "../runs"):
        with pytest.raises(SpecError, match=r"of type docker, where no folder .*, and the storage .*absolute path"):
            quietly(Wanted(workdir=str(tmp_path), pool="containers", storages=("s3://bucket/runs", relative)))
    assert server.every("deployments") == []
    wanted = Wanted(workdir=str(tmp_path), pool="containers", storages=(volume, "s3://bucket/runs"))
    assert "storage" not in {change.kind for change in quietly(wanted)}
    for name in (SEARCH, RESTORE, WATCH, COLLECT, TRIAL):
        assert (server.deployment(name)["pull_steps"], server.deployment(name)["work_pool_name"]) == ([], "containers")
    assert server.deployment(WATCH)["parameters"]["storages"] == [volume, "s3://bucket/runs"]
    assert list(tmp_path.iterdir()) == []
    assert {change.what for change in quietly(wanted)} == {"as it was"}
    # To a pool of this machine's processes, and so to its folder.
    quietly(Wanted(workdir=str(tmp_path), storages=("runs",)))
    assert server.deployment(SEARCH)["pull_steps"]
    assert (tmp_path / "runs").is_dir()


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as a server does that wants a password."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None: ...


def test_an_api_that_cannot_be_used_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusing = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=refusing.serve_forever, daemon=True).start()
    closed = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    closed.server_close()
    try:
        for url, words in (
            (None, "set PREFECT_API_URL"),
            (f"http://127.0.0.1:{closed.server_port}/api", "does not answer"),
            (f"http://127.0.0.1:{refusing.server_port}/api", "PREFECT_API_AUTH_STRING"),
        ):
            with temporary_settings({PREFECT_API_URL: url}):
                with pytest.raises(EngineError, match=words):
                    quietly(Wanted(workdir=str(tmp_path)))
                assert main(["deploy", "--workdir", str(tmp_path)]) == 4
            assert words in capsys.readouterr().err
    finally:
        refusing.shutdown()
        refusing.server_close()
    assert main(["deploy", "--workdir", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "runs").exists()


def test_prefect_yaml_is_up_to_date_and_says_the_same(server: Own, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prefect's own command makes of it, without a prompt, what `holdfast deploy` makes without automations."""
    text = (Path(__file__).parents[2] / "prefect.yaml").read_text()
    assert text == prefect_yaml(), "prefect.yaml is out of date: run `holdfast deploy --print-yaml > prefect.yaml`"
    assert main(["deploy", "--print-yaml"]) == 0
    assert capsys.readouterr().out == text
    assert [one["name"] for one in yaml.safe_load(text)["deployments"]] == [entry.name for entry in catalogue()]
    (tmp_path / "prefect.yaml").write_text(text)
    server.ask("POST", "/work_pools/", {"name": POOL, "type": "process", "base_job_template": {}})
    if Version(fastapi.__version__) >= Version("0.151"):
        pytest.skip(
            f"fastapi<0.151 is missing: Prefect's server with {fastapi.__version__} refuses what `prefect deploy` sends it"
        )
    prefect = str(Path(sys.executable).with_name("prefect"))
    done = subprocess.run(
        [prefect, "--no-prompt", "deploy", "--all"],
        cwd=tmp_path,
        env=server.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = {one["name"]: comparable(one) for one in server.every("deployments")}
    server.empty()
    quietly(Wanted(workdir=str(tmp_path), automations=False))
    ours = {one["name"]: comparable(one) for one in server.every("deployments")}
    assert theirs.keys() == ours.keys()
    for name, entry in ours.items():
        for key, value in entry.items():
            assert theirs[name][key] == value, f"{name}: {key}"


def comparable(deployment: dict[str, Any]) -> dict[str, Any]:
    kept = (
        "name",
        "version",
        "description",
        "tags",
        "parameters",
        "entrypoint",
        "job_variables",
        "pull_steps",
        "work_pool_name",
    )
    schedules = [
        {**{key: one[key] for key in ("slug", "active", "parameters")}, "cron": one["schedule"]["cron"]}
        for one in deployment["schedules"]
    ]
    more = ("work_queue_name", "enforce_parameter_schema", "parameter_openapi_schema", "paused", "concurrency_limit")
    return {**{key: deployment[key] for key in (*kept, *more)}, "schedules": sorted(schedules, key=lambda one: one["slug"])}


def test_the_command_says_what_became_of_each_thing_and_what_to_do(
    server: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["deploy", "--storage", "a", "--storage", "s3://bucket/runs", "--no-automations"]) == 0
    said = capsys.readouterr().out
    assert "prefect worker start --pool holdfast" in said
    assert all(name in said for name in (SEARCH, RESTORE, WATCH, COLLECT, TRIAL, str(tmp_path / "a")))
    assert server.deployment(WATCH)["parameters"] == {"storages": ["a", "s3://bucket/runs"], "deployment": RESTORE}
    assert server.deployment(WATCH)["pull_steps"][0]["prefect.deployments.steps.set_working_directory"] == {
        "directory": str(tmp_path)
    }
