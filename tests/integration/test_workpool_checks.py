"""What a trial's flow run is told, when trials cannot be flow runs at all, and runs that no search waits for."""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.logging import disable_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Cancelling, Completed, Pending, Running

from holdfast import locate
from holdfast.core.errors import Infrastructure, SpecError
from holdfast.flows import hosts
from holdfast.flows.blocks import HoldfastDatabase, HoldfastStorage, register
from holdfast.flows.changing import RestoreRequest
from holdfast.flows.naming import STALE
from holdfast.flows.pooled import Told, check_public, parameters
from holdfast.flows.prepare import prepare_restore
from holdfast.flows.runners import workpool
from holdfast.flows.runners.deployed import check_deployment
from holdfast.flows.runners.port import How
from holdfast.flows.runners.workpool import WorkPoolRunner
from holdfast.flows.trial import trial
from holdfast.report.observer import Observer
from holdfast.settings import settings
from holdfast.storage.database import workers
from holdfast.storage.database.attempts import AttemptWriter
from holdfast.storage.database.driver import Driver
from holdfast.storage.database.leases import Leases
from holdfast.storage.database.reads import Reader
from holdfast.tasks.place import Place, own_references
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


def test_references_of_a_restore_are_told_only_if_everybody_may_read_them(api: SyncPrefectClient, tmp_path: Path) -> None:
    """What the stored spec names is not told at all, so it may be anything; a tuple is the list that was stored."""
    stored = {"token": CANARY, "shape": [1, 2]}
    spec = sample_spec(execution=POOLED, **REMOTE, references=stored)

    def given(**references: Any) -> Any:
        return spec.model_copy(update={"references": references})

    check_public(spec)
    check_public(given(token=CANARY, shape=(1, 2)), stored)
    check_public(given(data="/mnt/new", shape=(1, 2)), stored)
    for own, words in (
        ({"token": f"{CANARY}-2"}, r"credential 'token'.*environment of the pool's jobs"),
        ({"login": {"password": CANARY}}, r"login\.password"),
        ({"lock": threading.Lock()}, r"references\['lock'\] is a .*finite"),
        ({"scale": float("nan")}, "keeps JSON"),
    ):
        with pytest.raises(SpecError, match=words) as refused:
            check_public(given(**own), stored)
        assert CANARY not in str(refused.value)
    opened = locate.create(
        sample_spec(storage=str(tmp_path), execution=POOLED, references=stored), seed=1, workdir=str(tmp_path)
    )
    restore = RestoreRequest(path=opened.folder.location, references={"token": f"{CANARY}-2"})
    seq = Reader(opened.database, opened.record.id).seq()
    with pytest.raises(SpecError, match="credential 'token'"):
        prepare_restore(restore, Observer())
    assert (Reader(opened.database, opened.record.id).seq(), Leases(opened.database, opened.record.id).look().epoch) == (seq, 0)
    opened.close()
    with pytest.raises(SpecError, match="keeps JSON"):  # a fresh search could not store it either
        hosts.check_hosts(given(lock=threading.Lock()))
    assert own_references({"shape": (1, 2)}, {"shape": [1, 2]}) is None
    assert own_references({"lock": Path}, {}) == {"lock": Path}  # the other engines' business
    place = Place(
        uuid="u", name="n", experiment=1, epoch=1, location="s3://b/n", database="x", workdir="/w", trainable="t:t",
        host="h", references={"token": CANARY},
    )  # fmt: skip
    assert CANARY not in repr(place)


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

    searches: list[str] = []

    @flow(name="search-of-nobody")
    def search() -> list[Any]:
        searches.append(str(flow_run.id))
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
    assert last["idempotency_key"] == f"holdfast-{place.uuid}-3-{searches[0]}-3"
    assert last["job_variables"] == {"working_dir": "/w"}
    assert set(last["tags"]) == {"holdfast", "experiment:nobody", "trial:2"}
    stands_for = api.read_task_run(uuid.UUID(last["parent_task_run_id"]))
    assert (stands_for.name, stands_for.state_name) == ("nobody/trial-2#1", STALE)

    @flow(name="search-of-nobody")
    def goes_on() -> bool:
        """The next flow run of the same process, in the same epoch: what was taken back is made anew."""
        with WorkPoolRunner(spec, place) as runner:
            told = threading.Event()
            runner._say = lambda text: told.set()
            future = runner.submit(run_trial, given(0))
            return told.wait(60) and not future.wrapped_future.done()

    assert goes_on()


def test_what_happens_to_one_run_or_to_the_deployment_stops_nothing_else(
    api: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.create_work_pool(WorkPoolCreate(name="mended", type="process"))
    monkeypatch.setattr(workpool, "LATE_SECONDS", 600.0)
    name = deployment(api, "mended", "mended")
    monkeypatch.setattr(workpool, "POLL_SECONDS", 0.05)
    spec = sample_spec(execution={**POOLED, "deployment": name}, **REMOTE)
    place = Place(
        uuid=str(uuid.uuid4()), name="mended", experiment=1, epoch=1, location="s3://bucket/runs/mended",
        database=REMOTE["database"], workdir="/w", trainable="train.py:train", host="h",
    )  # fmt: skip
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    with disable_run_logger(), WorkPoolRunner(spec, place) as runner:
        runner.check(place)
        runner._say = said.put

        def submitted(number: int) -> Any:
            return runner.submit(run_trial, {"trial": number, "attempt": 1, "row": number + 1})

        def made(number: int) -> dict[str, Any]:
            body = {"flow_runs": {"name": {"any_": [f"mended/trial-{number}#1"]}}}
            return until(lambda: api.request("POST", "/flow_runs/filter", json=body).json())[0]

        first, second, third = (submitted(number) for number in range(3))
        runs = [made(number) for number in range(3)]
        # One that was deleted by a person, and taken back by the search at that moment.
        with runner._lock:
            api.delete_flow_run(uuid.UUID(runs[0]["id"]))
            next(run for run in runner._runs if run.future is first).is_withdrawn = True
        runner.withdraw(first)
        assert first.wrapped_future.result(60).is_crashed()
        assert runner.ended(first).how is How.LOST
        # The deployment is deleted: Prefect deletes what was scheduled with it, the search goes on with what is left, and what
        # has no run waits, which is said once.
        api.set_flow_run_state(uuid.UUID(runs[1]["id"]), Pending())
        api.delete_deployment(api.read_deployment_by_name(name).id)
        late = submitted(3)
        assert "no deployment 'trial/mended'" in said.get(timeout=60)
        assert third.wrapped_future.result(60).is_crashed()
        runner.withdraw(second)
        assert second.wrapped_future.result(60).name == STALE
        assert said.empty()
        # It is made anew, under another id.
        deployment(api, "mended", "mended")
        assert made(3)["deployment_id"] == str(api.read_deployment_by_name(name).id) != runs[0]["deployment_id"]
        runner.look()
        api.set_flow_run_state(uuid.UUID(made(3)["id"]), Pending())
        # Again, so fast that nobody saw it gone.
        api.delete_deployment(api.read_deployment_by_name(name).id)
        deployment(api, "mended", "mended")
        submitted(4)
        assert made(4)["deployment_id"] == str(api.read_deployment_by_name(name).id)
        assert ["made anew" in said.get(timeout=60) for _ in range(2)] == [True, True]
        runner.look()
        # What nobody thought of ends the search, and what waits is withdrawn all the same.
        runner._place = replace(place, references={"lock": threading.Lock()})
        submitted(5)
        until(lambda: runner._error)
        with pytest.raises(Infrastructure, match=r"NotStorable: references\['lock'\].*then restore"):
            runner.look()
    assert late.wrapped_future.result(60).name == STALE


def test_a_run_whose_worker_died_before_it_began_is_given_up(
    api: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pending or running in Prefect, and claimed by nobody; one that was claimed is left alone, however long it runs."""
    api.create_work_pool(WorkPoolCreate(name="stuck", type="process"))
    name = deployment(api, "stuck", "stuck")
    monkeypatch.setattr(workpool, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(workpool, "LATE_SECONDS", 0.0)
    spec = sample_spec(storage=str(tmp_path), execution={**POOLED, "deployment": name})
    opened = locate.create(spec, seed=1, workdir=str(tmp_path))
    database, experiment = opened.database, opened.record.id
    Leases(database, experiment).take(seen=0, epoch=1, holder={"pid": 1, "hostname": "h"}, action="started", detail={})
    driver, reader = Driver(database, experiment, 1, seed=1), Reader(database, experiment)
    rows = []
    for number in range(4):
        driver.propose({"x": 0.1 * number}, number=number, source="proposed")
        trial = reader.trial(number)
        assert trial is not None
        rows.append(trial.attempt.id)
    AttemptWriter.claim(database, experiment, 1, rows[0], token="t")
    place = Place(
        uuid=opened.record.uuid, name="stuck", experiment=experiment, epoch=1, location=opened.folder.location,
        database=database.address, workdir="/w", trainable="train.py:train", host="h",
    )  # fmt: skip
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    with disable_run_logger(), WorkPoolRunner(spec, place) as runner:
        runner._say = said.put
        futures = [runner.submit(run_trial, {"trial": n, "attempt": 1, "row": rows[n]}) for n in range(4)]
        body = {"flow_runs": {"name": {"like_": "stuck/trial-"}}}
        until(lambda: len(api.request("POST", "/flow_runs/filter", json=body).json()) == 4)
        found = {run["name"]: uuid.UUID(run["id"]) for run in api.request("POST", "/flow_runs/filter", json=body).json()}
        runs = [found[f"stuck/trial-{number}#1"] for number in range(4)]
        for run, states in zip(
            runs, ((Pending(), Running()), (Pending(),), (Pending(), Running()), (Cancelling(),)), strict=True
        ):
            for state in states:
                api.set_flow_run_state(run, state)
        until(lambda: "taken by a worker" in said.get(timeout=60))
        assert not any(future.wrapped_future.done() for future in futures[:3])  # Prefect itself may end a cancelled one
        monkeypatch.setattr(workpool, "STUCK_SECONDS", 0.0)
        for future in futures[1:]:
            future.wrapped_future.result(60)
        until(lambda: runner._runs[0].is_claimed)
        assert [runner.ended(future).how for future in futures[1:]] == [How.LOST, How.LOST, How.UNCLEAR]
        assert runner.ended(futures[3]).is_unwanted
        assert [api.read_flow_run(run).state_name for run in runs] == ["Running", "Crashed", "Crashed", "Cancelled"]
        assert not futures[0].wrapped_future.done()
        api.set_flow_run_state(runs[0], Completed())
        assert runner.ended(futures[0]).how is How.STATE if futures[0].wrapped_future.result(60) else False
        runner.look()
    opened.close()


def until(found: Callable[[], Any]) -> Any:
    """Return what is true after a while."""
    deadline = time.monotonic() + 60
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value
