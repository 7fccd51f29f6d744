"""What a trial's flow run is told, when trials cannot be flow runs at all, and runs that no search waits for."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled

from holdfast import locate
from holdfast.core.errors import SpecError
from holdfast.flows import hosts
from holdfast.flows.blocks import HoldfastDatabase, HoldfastStorage, register
from holdfast.flows.naming import STALE
from holdfast.flows.pooled import Told, check_public, parameters
from holdfast.flows.runners import workpool
from holdfast.flows.runners.port import How
from holdfast.flows.runners.workpool import WorkPoolRunner, check_deployment
from holdfast.flows.trial import trial
from holdfast.settings import settings
from holdfast.storage.database import workers
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.reads import Reader
from holdfast.tasks.place import Place
from holdfast.tasks.trial import run_trial
from holdfast.testing.samples import sample_spec

POOLED = {"runner": "workpool"}
REMOTE = {"storage": "s3://bucket/runs", "database": "postgresql+psycopg://me@db.example/x"}
CANARY = "canary-that-nobody-may-see"


@pytest.fixture
def api(prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        yield client
    settings.cache_clear()


def environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"database": f"postgresql+psycopg://me:{CANARY}@db.example/x"},
            "HoldfastDatabase .*or leave it out.* HOLDFAST_DATABASE_URL",
        ),
        ({"storage_options": {"secret": CANARY}}, "HoldfastStorage .*or leave it out.* HOLDFAST_STORAGE_OPTIONS"),
        ({"storage_options": {"client_kwargs": {"aws_session_token": CANARY}}}, "client_kwargs.aws_session_token"),
        ({"storage": f"s3://me:{CANARY}@bucket/runs"}, "credentials in its URL"),
        (
            {"execution": {**POOLED, "job_variables": {"env": {"AWS_SECRET_ACCESS_KEY": CANARY}}}},
            r"env holds AWS_SECRET_ACCESS_KEY.*prefect\.blocks\.secret",
        ),
        *(
            ({"execution": {**POOLED, "job_variables": {"image": "i", **variables}}}, rf"{words}.*prefect\.blocks\.secret")
            for variables, words in (
                ({"env": {"HOLDFAST_DATABASE_URL": f"postgresql://me:{CANARY}@h/x"}}, "env holds HOLDFAST_DATABASE_URL"),
                ({"env": {"HOLDFAST_DATABASE_URL": f"postgresql://me@h/x?password={CANARY}"}}, "holds HOLDFAST_DATABASE_URL"),
                ({"env": {"HOLDFAST_STORAGE_OPTIONS": f'{{"key": "{CANARY}"}}'}}, "env holds HOLDFAST_STORAGE_OPTIONS"),
                ({"env": {"PREFECT_API_AUTH_STRING": CANARY}}, "env holds PREFECT_API_AUTH_STRING"),
                ({"env": [{"name": "PREFECT_API_KEY", "value": CANARY}]}, "env holds PREFECT_API_KEY"),
                ({"env": [{"name": "A", "value": "b"}, {"name": "PGPASSWORD", "value": CANARY}]}, "env holds PGPASSWORD"),
                ({"env": {"HTTPS_PROXY": f"http://me:{CANARY}@proxy:3128"}}, "env.HTTPS_PROXY holds a URL with a password"),
                ({"command": f"run --to redis://:{CANARY}@h"}, "job_variables.command holds a URL with a password"),
                ({"kwargs": {"environment": {"DB_PASSWORD": CANARY}}}, "kwargs.environment holds DB_PASSWORD"),
            )
        ),
    ],
)
def test_a_secret_in_the_open_is_refused(api: SyncPrefectClient, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as refused:
        check_public(sample_spec(**{"execution": POOLED, **REMOTE, **changes}))
    assert CANARY not in str(refused.value)


def test_what_jobs_find_by_themselves_is_not_told(api: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are told by their names, what the environment says not at all; what is no secret may be told."""
    register()
    HoldfastStorage(location="s3://bucket/pooled", key="me", secret=CANARY, endpoint="http://h:1").save("pooled-lab")
    HoldfastDatabase(url="postgresql+psycopg://me@db.example/pooled", password=CANARY).save("pooled-main")
    secret = f"postgresql+psycopg://me:{CANARY}@db.example/environment"
    options = {"endpoint_url": "http://h:2", "secret": CANARY}
    environment(monkeypatch, HOLDFAST_DATABASE_URL=secret, HOLDFAST_STORAGE_OPTIONS=json.dumps(options))
    blocks = sample_spec(execution=POOLED, storage="block:pooled-lab", database="block:pooled-main")
    template = {
        "env": {
            "API_TOKEN": "{{ prefect.blocks.secret.token }}",
            "HOLDFAST_DATABASE_URL": "block:pooled-main",
            "HOLDFAST_STORAGE_OPTIONS": "{{ prefect.blocks.secret.options }}",
            "OMP_NUM_THREADS": "4",
            "HTTPS_PROXY": "http://proxy:3128",
        },
        "secret_name": "holdfast",
        "volumes": [{"name": "x", "secret": {"secretName": "holdfast"}}],
    }
    by_environment = sample_spec(execution={**POOLED, "job_variables": template}, storage="s3://other/runs")
    found = [check_public(locate.placed(spec)) for spec in (blocks, by_environment)]
    more = check_public(sample_spec(execution=POOLED, **{**REMOTE, "storage_options": {**options, "anon": True}}))
    assert found == [
        Told("block:pooled-lab/sample", "block:pooled-main", {}),
        Told("s3://other/runs/sample", None, {}),
    ]
    assert (more.options, more.database) == ({"anon": True}, REMOTE["database"])
    place = Place(
        uuid="u", name="sample", experiment=1, epoch=2, location="s3://other/runs/sample", options=options,
        database=secret, workdir="/w", trainable="train.py:train", host="h",
    )  # fmt: skip
    assert CANARY not in json.dumps(parameters(place, found[1], trial=0, attempt=1, row=1))


def test_a_private_server_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    environment(monkeypatch, PREFECT_HOME=str(tmp_path), XDG_DATA_HOME=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(SpecError, match=r"PREFECT_API_URL.*holdfast up"):
            check_public(sample_spec(execution=POOLED, **REMOTE))
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def deployment(client: SyncPrefectClient, name: str, pool: str | None, entrypoint: str = "holdfast.flows.trial.trial") -> str:
    identity = client.create_flow_from_name("trial")
    body = {"name": name, "flow_id": str(identity), "entrypoint": entrypoint, "work_pool_name": pool}
    client.request("POST", "/deployments/", json=body)
    return f"trial/{name}"


def test_a_deployment_that_would_begin_no_trial_is_refused(api: SyncPrefectClient, tmp_path: Path) -> None:
    for name, kind in (("refused-here", "process"), ("refused-elsewhere", "docker")):
        api.create_work_pool(WorkPoolCreate(name=name, type=kind))
    told = Told("s3://bucket/runs/sample", None, {})
    local = Told(str(tmp_path / "sample"), f"sqlite:///{tmp_path}/holdfast.db", {})
    good = deployment(api, "refused-good", "refused-here")
    elsewhere = deployment(api, "refused-elsewhere", "refused-elsewhere")
    for name, words in (
        ("trial/none", "no deployment 'trial/none'.*`holdfast deploy`"),
        ("none", "no deployment 'none'"),
        (deployment(api, "refused-other", "refused-here", "other.py:trial"), "runs other.py:trial.*`holdfast deploy`"),
        (deployment(api, "refused-poolless", None), "no work pool"),
    ):
        with pytest.raises(SpecError, match=words):
            check_deployment(name, told)
    assert check_deployment(good, local).kind == "process"
    assert check_deployment(elsewhere, told).pool == "refused-elsewhere"
    template = json.loads((resources.files("holdfast.deployments.templates") / "kubernetes.json").read_text())
    api.create_work_pool(WorkPoolCreate(name="refused-cluster", type="kubernetes", base_job_template=template))
    cluster = deployment(api, "refused-cluster", "refused-cluster")
    assert check_deployment(cluster, told, ["image", "cpu_request"]).kind == "kubernetes"
    with pytest.raises(SpecError, match=r"job_variables holds cpu, which .* 'refused-cluster' .*cpu_request, cpu_limit"):
        check_deployment(cluster, told, ["image", "cpu"])
    with pytest.raises(SpecError, match=r"of type docker.*storage: s3://.*and the database .*database: postgresql"):
        check_deployment(elsewhere, local)
    with pytest.raises(SpecError, match="`holdfast deploy`"):  # as a search asks, before anything is written
        hosts.check_hosts(sample_spec(execution={**POOLED, "deployment": "trial/none"}, storage=str(tmp_path / "runs")))
    assert list(tmp_path.iterdir()) == []
    api.update_work_pool("refused-here", WorkPoolUpdate(is_paused=True))
    with pytest.raises(SpecError, match=r"refused-here' is paused.*prefect work-pool resume refused-here"):
        check_deployment(good, told)


def test_a_run_that_nobody_waits_for_ends_and_leaves_no_trace(api: SyncPrefectClient, tmp_path: Path) -> None:
    opened = locate.create(sample_spec(storage=str(tmp_path), execution=POOLED), seed=1, workdir=str(tmp_path))
    database, experiment = opened.database, opened.record.id
    epoch = 1
    Leases(database, experiment).take(seen=0, epoch=epoch, holder={"pid": 1, "hostname": "h"}, action="started", detail={})
    Driver(database, experiment, epoch, seed=1).propose({"x": 0.5}, number=0, source="proposed")
    proposed = Reader(database, experiment).trial(0)
    assert proposed is not None
    row = proposed.attempt.id
    drive = {"name": "sample", "workdir": str(tmp_path), "trainable": "train.py:train", "host": "h"}
    given: dict[str, Any] = {
        "path": opened.folder.location, "uuid": opened.record.uuid, "epoch": epoch, "trial": 0, "attempt": 1, "row": row,
        "drive": drive,
    }  # fmt: skip
    seq = Reader(database, experiment).seq()
    before = sorted(path.name for path in opened.folder.path.rglob("*"))
    for changes, words in (
        ({"epoch": epoch + 1}, "does not drive 'sample' any more"),
        ({"row": row + 7}, "attempt 1 of trial 0 is over"),
        ({"trial": 5}, "attempt 1 of trial 5 is over"),
        ({"uuid": str(uuid.uuid4())}, "does not have the experiment"),
    ):
        state = trial(**{**given, **changes}, return_state=True)
        assert (state.name, state.is_cancelled()) == (STALE, True), state
        assert words in str(state.message)
    person = trial(**{**given, "drive": None}, return_state=True)
    assert person.is_failed()
    assert "started by searches" in str(person.message)
    assert sorted(path.name for path in opened.folder.path.rglob("*")) == before
    assert (Reader(database, experiment).seq(), workers.every(database, experiment)) == (seq, [])
    opened.close()


def test_runs_are_made_once_and_taken_back(api: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """No worker polls the pool: runs wait, which is said once; what the search takes back or leaves never begins."""
    api.create_work_pool(WorkPoolCreate(name="nobody", type="process"))
    name = deployment(api, "nobody", "nobody")
    monkeypatch.setattr(workpool, "LATE_SECONDS", 0.0)
    monkeypatch.setattr(workpool, "POLL_SECONDS", 0.05)
    spec = sample_spec(execution={**POOLED, "deployment": name, "job_variables": {"working_dir": "/w"}}, **REMOTE)
    place = Place(
        uuid=str(uuid.uuid4()), name="nobody", experiment=1, epoch=3, location="s3://bucket/runs/nobody",
        database=REMOTE["database"], workdir="/w", trainable="train.py:train", host="h",
    )  # fmt: skip

    def runs() -> dict[str, Any]:
        body = {"flow_runs": {"name": {"like_": "nobody/trial-"}}}
        return {run["name"]: run for run in api.request("POST", "/flow_runs/filter", json=body).json()}

    def given(number: int) -> dict[str, Any]:
        return {"trial": number, "attempt": 1, "row": number + 1}

    said: list[str] = []

    @flow(name="search-of-nobody")
    def search() -> list[Any]:
        with WorkPoolRunner(spec, place) as runner:
            runner.check(place)
            told = threading.Event()
            runner._say = lambda text: (said.append(text), told.set())
            ended = [threading.Event() for _ in range(2)]
            futures = [runner.submit(run_trial, given(number)) for number in range(3)]
            for future, event in zip(futures, ended, strict=False):
                future.add_done_callback(lambda _, event=event: event.set())
            assert told.wait(60)
            runner.withdraw(futures[0])
            assert ended[0].wait(60)
            api.set_flow_run_state(runs()["nobody/trial-1#1"]["id"], Cancelled())
            assert ended[1].wait(60)
            return [runner.ended(future) for future in futures[:2]]

    first, second = search()
    assert (first.how, first.is_unwanted, second.how, second.is_unwanted) == (How.UNCLEAR, False, How.UNCLEAR, True)
    assert len([text for text in said if "prefect worker start --pool nobody" in text]) == 1
    found = runs()
    assert {name: run["state_name"] for name, run in found.items()} == {
        "nobody/trial-0#1": STALE,
        "nobody/trial-1#1": "Cancelled",
        "nobody/trial-2#1": STALE,
    }
    last = found["nobody/trial-2#1"]
    assert last["idempotency_key"] == f"holdfast-{place.uuid}-3-3"
    assert last["job_variables"] == {"working_dir": "/w"}
    assert set(last["tags"]) == {"holdfast", "experiment:nobody", "trial:2"}
    stands_for = api.read_task_run(uuid.UUID(last["parent_task_run_id"]))
    assert (stands_for.name, stands_for.state_name) == ("nobody/trial-2#1", STALE)
