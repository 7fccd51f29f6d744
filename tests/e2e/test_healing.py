"""Searches that a worker runs die by SIGKILL, and come back: by a webhook, by the automations, by a watch, by the UI's form."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support_deployed import Process, Refused, Site, browsing, http, postgres_for_prefect
from support_healing import Crash
from support_pages import Pages

from holdfast.flows.naming import RESTORE, SEARCH, WATCH

BY_HAND: dict[str, Any] = {"recovery": {"after": []}}
"""What a spec says that no watch restores."""
SILENCE = 90
"""seconds without a heartbeat that make a flow run Crashed; Prefect's heartbeats are 30 s apart at least"""
SECRET = base64.b64encode(b"a secret of this test alone, long enough").decode()

THEIRS = """
import sys, time
from prefect import flow

@flow(name="search", flow_run_name="theirs")
def search(spec: str) -> None:
    print("running", flush=True)
    time.sleep(3600)

search(sys.argv[1])
"""


class Others:
    """Runs of another team on the same server, of flows that are called as ours are: one is silent, one has crashed."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._processes = [
            Process.start(site.folder / f"theirs-{name}.txt", site.environment, sys.executable, "-c", THEIRS, name)
            for name in ("silent", "crashed")
        ]
        site.started += self._processes

    def die(self) -> None:
        """Let one go silent for ever, after its first heartbeat, and the other one crash."""
        silent, crashed = self._processes
        for each in self._processes:
            each.until(lambda each=each: "running" in each.output, "another team's flow run")
        silent.until(lambda: beats(self._site, self.run("silent")["id"]), "its first heartbeat")
        silent.kill()
        crashed.process.send_signal(signal.SIGTERM)
        crashed.process.wait()
        assert self.states() == ["CRASHED", "RUNNING"]

    def run(self, name: str) -> dict[str, Any]:
        (found,) = [run for run in self.runs() if run["parameters"]["spec"] == name]
        return found

    def runs(self) -> list[dict[str, Any]]:
        return self._site.runs(name={"any_": ["theirs"]})

    def states(self) -> list[str]:
        """Return the states of their runs, which nobody may change or add to."""
        return sorted(str(run["state_type"]) for run in self.runs())


def beats(site: Site, run: str) -> int:
    """Return how many heartbeats of a flow run the server knows."""
    return len(site.events("prefect.flow-run.heartbeat", f"prefect.flow-run.{run}"))


class Healing:
    """A server that tests share, and a search that died there with its worker, so that only silence can tell of it."""

    silent: Crash
    others: Others

    def __init__(self, site: Site) -> None:
        self.site = site
        site.deploy("--silence", SILENCE)

    def fall_silent(self) -> None:
        """Let a search of ours, and a run of another team, be killed together with whoever could tell of it."""
        site = self.site
        self.others = Others(site)
        worker = site.worker()
        self.silent = Crash.begin(site, "silent")
        self.others.die()
        self.silent.until_told()
        self.silent.until(lambda: beats(site, self.silent.run), "its first heartbeat")
        self.silent.kill(worker)
        assert site.state(self.silent.run) == "RUNNING"


SQLITE, POSTGRESQL = (pytest.param(name, marks=pytest.mark.xdist_group(f"healing-{name}")) for name in ("sqlite", "postgresql"))
ON_SQLITE = pytest.mark.parametrize("healing", [SQLITE], indirect=True)
"""What does not depend on the database of Prefect's server."""


@contextmanager
def served(folder: Path, database: str) -> Iterator[Site]:
    """Have a server on a database of that kind; the experiments are on another one of the same kind."""
    with ExitStack() as stack:
        urls = stack.enter_context(postgres_for_prefect()) if database == "postgresql" else (None, None)
        site = Site.start(folder, *urls)
        stack.callback(site.close)
        yield site


@pytest.fixture(scope="module", params=[SQLITE, POSTGRESQL])
def healing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Healing]:
    with served(tmp_path_factory.mktemp(f"healing-{request.param}"), request.param) as site:
        healing = Healing(site)
        if request.param == "sqlite":
            healing.fall_silent()
        site.worker()
        yield healing


@pytest.fixture
def site(healing: Healing) -> Site:
    return healing.site


@pytest.fixture(scope="module")
def receiver(healing: Healing) -> str:
    """A webhook receiver, by its address."""
    hook = {"signature": "standard", "secrets": {"env": "HOOK_SECRET"}}
    config = healing.site.folder / "hooks.yaml"
    config.write_text(json.dumps({"roots": [str(healing.site.storage)], "hooks": {"again": hook}, "prefect_seconds": 60}))
    healing.site.environment["HOOK_SECRET"] = f"whsec_{SECRET}"
    return f"{healing.site.receiver(config)}/hooks/again"


def deliver(address: str, body: dict[str, Any], delivery: str, *, secret: str = SECRET) -> Any:
    """Send a delivery that is signed as Standard Webhooks says."""
    text, now = json.dumps(body).encode(), str(int(time.time()))
    signed = hmac.new(base64.b64decode(secret), f"{delivery}.{now}.".encode() + text, hashlib.sha256).digest()
    headers = {
        "webhook-id": delivery,
        "webhook-timestamp": now,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }
    for _ in range(30):
        try:
            return http("POST", address, text, headers)
        except Refused as refused:
            if refused.code != 503:  # Prefect's database is busy: the receiver says to try again, as its senders do
                raise
            time.sleep(1)
    raise AssertionError("Prefect's API did not answer the receiver for a long time")


def test_a_signed_webhook_restores(site: Site, receiver: str) -> None:
    crash = Crash.begin(site, "by-webhook", **BY_HAND)
    crash.until_told()
    wanted, delivery = {"experiment": crash.name}, f"msg_{uuid.uuid4().hex}"
    with pytest.raises(Refused, match="running") as refused:  # while it runs
        deliver(receiver, wanted, f"{delivery}-early")
    assert refused.value.code == 409
    crash.kill()
    with pytest.raises(Refused, match="signature") as refused:
        deliver(receiver, wanted, delivery, secret=base64.b64encode(b"a secret that was guessed").decode())
    assert refused.value.code == 401
    answers = [deliver(receiver, wanted, delivery) for _ in range(3)]
    assert answers[1:] == answers[:1] * 2
    crash.ends_well(claims=0)
    assert crash.flow_runs()[-1]["id"] == answers[0]["flow_run_id"]
    crash.told(claims=0)


def test_the_automation_restores_what_crashed(site: Site) -> None:
    """However many look at it at the same time."""
    crash = Crash.begin(site, "by-automation")
    crash.kill()
    site.start_run(WATCH, {})  # by hand, beside the automation
    crash.ends_well(claims=1)
    crash.told(claims=1)


@ON_SQLITE
def test_a_person_restores_by_the_form(site: Site) -> None:
    crash = Crash.begin(site, "by-form", **BY_HAND)
    crash.kill()
    with browsing() as browser:
        pages = Pages.open(browser, site)
        pages.custom_run(RESTORE)
        pages.fill("Experiment", str(crash.path))
        pages.submit()
    crash.ends_well(claims=0)
    crash.told(claims=0)


@ON_SQLITE
def test_wrong_values_are_refused_and_nothing_starts(site: Site) -> None:
    """The form says so before a run exists, and so does the server to whoever asks without the form."""
    before = started(site)
    with browsing() as browser:
        pages = Pages.open(browser, site)
        pages.custom_run(RESTORE)
        assert "required" in pages.refused()
        pages.custom_run(SEARCH)
        pages.fill_first("digits.yaml")
        pages.add("no assignment")
        assert "no assignment" in pages.refused()
    for deployment, parameters, reason in WRONG:
        with pytest.raises(Refused, match=reason) as refused:
            site.start_run(deployment, parameters)
        assert refused.value.code in (409, 422)
    assert started(site) == before
    missing = site.start_run(RESTORE, {"path": str(site.storage / "nothing")})
    finished = Crash(site, site.lab("missing"), "missing", missing, site.folder)
    finished.until(lambda: site.state(missing) == "FAILED", "the run of an experiment that is not there")
    assert "nothing" in site.flow_run(missing)["state"]["message"]
    assert not (site.storage / "nothing").exists()


def started(site: Site) -> list[str]:
    """Return the runs of searches and restores, but for what heals meanwhile."""
    runs = [run for deployment in (SEARCH, RESTORE) for run in site.runs_of(deployment)]
    return [str(run["id"]) for run in runs if "silent" not in str(run["parameters"])]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (RESTORE, {}, "path"),
    (RESTORE, {"path": ""}, "path"),
    (RESTORE, {"path": "x", "new_trials": "perhaps"}, "new_trials"),
    (RESTORE, {"path": "x", "policy": {"errored": "sometimes"}}, "sometimes"),
    (RESTORE, {"path": "x", "changes": {"space": {}}}, "space"),
    (RESTORE, {"path": "x", "storage_options": {"secret": "s"}}, "secret"),
    (SEARCH, {}, "spec"),
    (SEARCH, {"spec": 7}, "spec"),
    (SEARCH, {"spec": "digits.yaml", "overrides": ["no assignment"]}, "overrides"),
]


@ON_SQLITE
def test_silence_is_a_crash_that_is_healed(healing: Healing) -> None:
    """Worker and process died together: nobody but the automation can tell that the flow run does not run any more."""
    healing.silent.ends_well(claims=1)
    healing.silent.told(claims=1)
    assert healing.others.states() == ["CRASHED", "RUNNING"]


@ON_SQLITE
def test_a_watch_restores_where_automations_are_off(site: Site) -> None:
    site.deploy("--no-automations")
    crash = Crash.begin(site, "by-watch")
    crash.kill()
    crash.until(lambda: site.state(crash.run) == "CRASHED", "its worker says so")
    assert crash.states() == ["CRASHED"]
    site.start_run(WATCH, {})
    crash.ends_well(claims=1)
    crash.told(claims=1)
