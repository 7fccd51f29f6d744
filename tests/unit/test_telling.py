"""What is said of a search in Prefect is bounded, harmless, and never waited for."""

from __future__ import annotations

import json
import logging
import random
import shlex
import subprocess
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prefect.events.clients import AssertingEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from holdfast.core.spec import ExperimentSpec
from holdfast.core.trial import Attempt, ErrorInfo, Outcome, Trial, TrialStatus
from holdfast.flows import prefect_runs, telling
from holdfast.flows.artifacts import LEADERS, Shown, Tally, leaderboard, percent, rendered, summary
from holdfast.flows.prefect_runs import impatient_client
from holdfast.flows.telling import BURST, Bucket, Teller, public
from holdfast.report.observer import RunLog
from holdfast.report.ranking import Ranking
from holdfast.report.texts import code_block, command_block, marked_down, one_line
from holdfast.result import SearchResult

S = TrialStatus
SPEC: dict[str, Any] = {
    "name": "digits",
    "trainable": "train.py:train",
    "objectives": {"loss": "min"},
    "space": {"x": {"type": "float", "low": 0, "high": 1}},
    "search": {"engine": "random", "num_trials": 10},
}
NASTY = "|a|`b`\n# c\r\n<script>alert(1)</script> [x](javascript:y) \x1b[31m \udc80 \u202e ```" + "z" * 1_000_000


def spec_of(**changes: Any) -> ExperimentSpec:
    return ExperimentSpec.parse({**SPEC, **changes})


def trial_of(number: int, status: TrialStatus = S.COMPLETED, *, attempt: int = 1, error: str = "", **changes: Any) -> Trial:
    outcome = {S.COMPLETED: Outcome.COMPLETED, S.FAILED: Outcome.FAILED}.get(status)
    info = ErrorInfo(kind="RuntimeError", message=error) if error else None
    told = Attempt(id=number, number=attempt, outcome=outcome, claimed=status is not S.PENDING, error=info)
    base = {"config": {"x": 0.5}, "config_id": 1, "seed": 0, "seq": number, "attempts": attempt, "step": 1}
    return Trial(number=number, status=status, attempt=told, **{**base, **changes})


def shown_of(spec: ExperimentSpec, **changes: Any) -> Shown:
    command = f"holdfast restore /runs/{spec.name}"
    shown = Shown(name=spec.name, path="/runs/digits", command=command, spec=spec, total=10, epoch=1, restored=False)
    return replace(shown, **changes)


def result_of(spec: ExperimentSpec, trials: list[Trial], reason: str = "done") -> SearchResult:
    return SearchResult(name=spec.name, path="/runs/digits", trials=trials, best=None, reason=reason, spec=spec)


@dataclass
class Api:
    """An API of artifacts that counts, and may lose what it has, or keep everybody waiting."""

    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    received: int = 0
    bodies: dict[str, Any] = field(default_factory=dict)
    held: threading.Event = field(default_factory=threading.Event)

    def take(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        self.held.wait()
        if not path.startswith("/api/artifacts/"):
            return 404, b""
        self.asked.append((method, path))
        self.received += len(body)
        told = json.loads(body)
        if method == "PATCH":
            name = path.rpartition("/")[2]
            if name not in self.bodies:
                return 404, b""
            self.bodies[name] |= told
            return 204, b""
        made = {"id": str(uuid.uuid4()), "created": None, "updated": None, **told}
        self.bodies[made["id"]] = made
        return 201, json.dumps(made).encode()


@contextmanager
def api() -> Iterator[Api]:
    found = Api()
    found.held.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, data = found.take(self.command, self.path, body)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = _answer

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found.url = f"http://127.0.0.1:{server.server_port}/api"
        try:
            with temporary_settings({PREFECT_API_URL: found.url}):
                yield found
        finally:
            found.held.set()
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def events() -> Iterator[list[Any]]:
    """Where the events that Prefect's own queue was given come, once it is drained."""
    EventsWorker.drain_all()  # a queue that a test before left open has a client of its own
    AssertingEventsClient.reset()
    EventsWorker.set_client_override(AssertingEventsClient)
    found: list[Any] = []
    yield found
    EventsWorker.set_client_override(None)
    EventsWorker.drain_all()
    AssertingEventsClient.reset()


def drained(events: list[Any]) -> list[Any]:
    EventsWorker.drain_all()
    for client in AssertingEventsClient.all:
        events += [event for event in client.events if event.event.startswith("holdfast.")]
    return events


def test_ten_thousand_trials_are_told_of_in_a_bounded_number_of_words(events: list[Any]) -> None:
    """One an hour's search of ten thousand trials: requests, bytes and events depend on the time that passes."""
    spec = spec_of(search={"engine": "random", "num_trials": 10_000})
    now = [0.0]
    with api() as server, impatient_client() as client:
        teller = Teller(shown_of(spec, total=10_000), str(uuid.uuid4()), clock=lambda: now[0])
        for number in range(10_000):
            now[0] = number * 0.36
            teller.trial(trial_of(number, S.PENDING))
            teller.trial(trial_of(number, S.RUNNING))
            teller.trial(trial_of(number, S.COMPLETED, metrics={"loss": float(10_000 - number)}))
            if number % 3 == 0:
                teller.step(client)
        teller.step(client, last=True)
        boards = {body["type"]: body for body in server.bodies.values()}
        counts = Counter(method for method, _ in server.asked)
    assert counts["POST"] == 3
    assert counts["PATCH"] <= 3 * 3600 / telling.PAUSE_SECONDS / 4, "they become rarer"
    assert server.received < 10_000_000
    assert boards["progress"]["data"] == 100.0
    assert [row["trial"] for row in json.loads(boards["table"]["data"])] == list(range(9_999, 9_999 - LEADERS, -1))
    assert "10000 COMPLETED" in boards["markdown"]["data"]
    told = [event for event in drained(events) if event.event.startswith("holdfast.trial.")]
    assert len(told) <= BURST + 3600 + 1
    assert sum(len(event.model_dump_json()) for event in told) < 5_000_000
    omitted = sum(event.payload.get("omitted", 0) for event in told)
    assert omitted + len(told) - any(event.event.endswith("omitted") for event in told) == 20_000, "each is told or counted"


def test_a_fast_search_says_no_more_than_a_slow_one(events: list[Any]) -> None:
    spec, now = spec_of(), [0.0]
    with api() as server, impatient_client() as client:
        teller = Teller(shown_of(spec), str(uuid.uuid4()), clock=lambda: now[0])
        for number in range(3_000):
            teller.trial(trial_of(number, S.PENDING))
            teller.trial(trial_of(number, S.COMPLETED, metrics={"loss": 1.0}))
            if number % 100 == 0:
                teller.step(client)
        assert len(server.asked) == 3, "made, and not yet due again"
        teller.step(client, last=True)
        assert len(server.asked) == 6
    told = [event for event in drained(events) if event.event.startswith("holdfast.trial.")]
    assert len(told) == BURST + 1
    assert told[-1].event == "holdfast.trial.omitted"
    assert told[-1].payload == {"omitted": 6_000 - BURST}


def test_trials_that_had_ended_before_are_not_told_again(events: list[Any]) -> None:
    with api(), impatient_client() as client:
        teller = Teller(shown_of(spec_of(), restored=True, lost=4), str(uuid.uuid4()))
        for stored in (trial_of(0), trial_of(1, S.FAILED, error="x"), trial_of(2, S.SKIPPED)):
            teller.trial(stored)
        teller.trial(trial_of(3, S.PENDING, attempt=2))
        teller.trial(trial_of(3, S.RUNNING, attempt=2))
        teller.trial(trial_of(3, S.FAILED, attempt=2, error=NASTY, metrics={"loss": float("nan"), "other": 1}))
        teller.step(client)
    told = drained(events)
    assert [event.event for event in told] == ["holdfast.trial.started", "holdfast.trial.failed"]
    assert told[0].payload == {"trial": 3, "attempt": 2}
    assert told[1].payload["metrics"] == {"loss": "NaN"}
    assert len(json.dumps(told[1].payload, allow_nan=False)) < 1000


def test_what_somebody_deleted_is_made_anew_and_what_did_not_change_is_not_sent() -> None:
    spec, now = spec_of(), [0.0]
    with api() as server, impatient_client() as client:
        teller = Teller(shown_of(spec), str(uuid.uuid4()), clock=lambda: now[0])
        teller.step(client)
        now[0] = 100.0
        teller.step(client)
        assert [method for method, _ in server.asked] == ["POST"] * 3
        server.bodies.clear()
        teller.trial(trial_of(0, metrics={"loss": 2.0}))
        now[0] = 200.0
        teller.step(client)
        assert [method for method, _ in server.asked[3:]] == ["PATCH", "POST"] * 3
        assert {body["type"] for body in server.bodies.values()} == {"progress", "table", "markdown"}


def test_an_api_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, events: list[Any]) -> None:
    """Its requests take as long as this test's own patience; the end of the search does not."""
    monkeypatch.setattr(prefect_runs, "ANSWER_SECONDS", 600.0)
    monkeypatch.setattr(telling, "AWAY_SECONDS", 0.2)
    spec = spec_of()
    with api() as server:
        server.held.clear()
        teller = Teller(shown_of(spec), str(uuid.uuid4()))
        teller.begin()
        teller.trial(trial_of(0, S.PENDING))
        teller.ended(result_of(spec, [], "interrupted: SIGTERM"))
        teller.ended(result_of(spec, [], "interrupted: SIGTERM"))
        assert server.asked == []
        server.held.set()
        teller._thread.join(60)
    assert {event.event for event in drained(events)} <= {f"holdfast.experiment.{word}" for word in ("started", "interrupted")}


def test_nothing_that_goes_wrong_reaches_the_search(monkeypatch: pytest.MonkeyPatch, events: list[Any]) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("rendering is broken")

    monkeypatch.setattr(telling, "rendered", broken)
    spec = spec_of()
    with api() as server:
        teller = Teller(shown_of(spec), str(uuid.uuid4()))
        teller.begin()
        teller.trial(None)  # type: ignore[arg-type]  # no trial at all
        teller.trial(trial_of(0, S.PENDING))
        teller.ended(result_of(spec, [trial_of(0)]))
        assert server.asked == []
    assert [event.event for event in drained(events)] == ["holdfast.experiment.started", "holdfast.experiment.completed"]


def test_whoever_lost_the_experiment_says_nothing_more(events: list[Any]) -> None:
    spec = spec_of()
    with api() as server:
        teller = Teller(shown_of(spec), str(uuid.uuid4()))
        teller.begin()
        teller.close()
        teller.ended(result_of(spec, []))
        teller._thread.join(60)
        assert server.asked == []
    assert "holdfast.experiment.completed" not in [event.event for event in drained(events)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objectives": {"loss": "min", "size": "max"}},
        {"search": {"engine": "random", "num_trials": 9, "repeats": 3, "aggregate": "worst"}},
        {"feasible": ["size < 0.7"]},
    ],
    ids=["one", "front", "repeats", "feasible"],
)
@pytest.mark.parametrize("seed", range(5))
def test_what_leads_is_what_the_report_says_whatever_changes(changes: dict[str, Any], seed: int) -> None:
    spec, draw = spec_of(**changes), random.Random(seed)
    tally, trials = Tally(spec), dict[int, Trial]()
    for _ in range(400):
        number = draw.randrange(60)
        status = draw.choice([S.PENDING, S.RUNNING, S.COMPLETED, S.COMPLETED, S.COMPLETED, S.PRUNED, S.FAILED])
        values = {"loss": draw.choice([draw.random(), 0.5, float("nan")]), "size": draw.random()}
        error = draw.choice(["a", "b"]) if status is S.FAILED else ""
        group = number - number % 3 if "repeats" in spec.search.model_fields_set else None
        trials[number] = trial_of(number, status, metrics=values, error=error, group=group, repeat=number % 3)
        tally.take(trials[number])
        if draw.random() < 0.2:
            tally.leaders()
    ranking = Ranking(list(trials.values()), spec)
    json_of = ranking.json()
    expected = {found["number"] for found in json_of["pareto"]} if "pareto" in json_of else None
    leaders = [leader.trial.number for leader in tally.leaders()]
    if expected is not None:
        assert set(leaders) == expected
    else:
        assert leaders == [candidate.trial.number for _, candidate in ranking._order[:LEADERS]]
    assert +tally.counts == Counter(trial.status for trial in trials.values())
    errors = {words: len(numbers) for words, numbers in tally.errors()}
    assert errors == Counter(f"RuntimeError: {trial.error.message}" for trial in trials.values() if trial.error)


def test_foreign_text_is_shown_as_it_is_and_breaks_nothing() -> None:
    spec = spec_of(name="a|b`c<d>", objectives={"trial": "min", "lo|ss": "max"})
    tally = Tally(spec)
    tally.take(trial_of(0, metrics={"trial": 1, "lo|ss": 1e308, "x": NASTY}, config={"x": NASTY}))
    for number in range(1, 40):
        tally.take(trial_of(number, S.FAILED, error=f"{number % 13}{NASTY}"))
    shown = shown_of(spec, ended="failed", reason=NASTY, path="/runs/a|b`c<d>", command="holdfast restore '````'")
    text = summary(shown, tally)
    assert len(text) < 20_000
    assert text.isprintable() or set(filter(lambda letter: not letter.isprintable(), text)) == {"\n"}
    assert "<script>" not in text.replace("\\<", "")
    cells = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(cells) == {3, 4}, "no cell ends early"
    assert "`````\nholdfast restore '````' --restart-errored\n`````" in text
    assert "3 other errors" in text
    (row,) = leaderboard(spec, tally)
    assert row["trial"] == 0
    assert row["trial (objective)"] == "1"
    json.dumps(row, allow_nan=False).encode()
    for kind in ("progress", "leaderboard", "summary"):
        json.dumps(rendered(kind, shown, tally), allow_nan=False).encode()


@pytest.mark.parametrize("text", [NASTY, "", "|", "`" * 5000, "\udcff" * 3000, "\\"])
def test_a_line_is_one_line(text: str) -> None:
    for shown in (one_line(text), marked_down(text, 300), code_block(text).split("\n")[1]):
        assert shown == "" or shown.isprintable()
        assert len(shown) <= 4001
        shown.encode()
    fence, _, last = code_block(text).split("\n")
    assert fence == last
    assert fence not in code_block(text).split("\n")[1]


def test_the_log_of_a_run_has_one_printable_line_a_message(caplog: pytest.LogCaptureFixture) -> None:
    spec = spec_of()
    log = RunLog(logging.getLogger("run"))
    with caplog.at_level(logging.INFO, logger="run"):
        log.say(NASTY)
        log.trial(trial_of(0, S.RUNNING))
        log.trial(trial_of(0, S.FAILED, error=NASTY))
        log.trial(trial_of(1, S.RUNNING))
        log.trial(trial_of(1, metrics={"loss": float("nan"), NASTY: NASTY}))
        log.ended(result_of(spec, [], NASTY))
    assert len(caplog.messages) == 4
    for message in caplog.messages:
        assert message.isprintable()
        assert len(message) <= 2000
        message.encode()
    assert "RuntimeError: |a|`b`\\n# c" in caplog.messages[1]


def test_the_leaderboard_has_a_column_for_each_of_few_parameters_and_no_markup() -> None:
    link = "![x](http://evil.example/x.png) <img src=x onerror=alert(1)> {{ 7 * 7 }} \U0001f600"
    spec = spec_of()
    few, many = Tally(spec), Tally(spec)
    few.take(trial_of(0, metrics={"loss": 1.0}, config={"x": 0.123456789, "act": link, "loss": 3, "trial": 4}))
    few.take(trial_of(1, metrics={"loss": 2.0}, config={"x": 1.0, "z" * 200 + "a": 1, "z" * 200 + "b": 2, "": 5}))
    first, second = leaderboard(spec, few)
    assert list(first) == list(second)
    assert first["x"] == "0.12346"
    assert (first["loss"], first["loss (parameter)"], first["trial"], first["trial (parameter)"]) == ("1", "3", 0, "4")
    assert [value for key, value in second.items() if key.startswith("z")] == ["1", "2"]
    assert second["parameter"] == "5"
    assert second["act"] == ""
    assert r"\!\[x\](http://evil.example/x.png) \<img src=x" in first["act"]
    assert "\U0001f600" in first["act"]
    many.take(trial_of(0, metrics={"loss": 1.0}, config={f"p{number}": link for number in range(9)}))
    (row,) = leaderboard(spec, many)
    assert list(row) == ["rank", "trial", "status", "loss", "step", "attempts", "config"]
    assert r"p0=\!\[x\]" in row["config"]
    assert len(json.dumps(row)) < 3000


def test_what_describes_an_artifact_is_no_markup() -> None:
    with api() as server, impatient_client() as client:
        Teller(shown_of(spec_of(name="!x <img src=x onerror=y()>")), str(uuid.uuid4())).step(client)
        assert {body["description"] for body in server.bodies.values()} == {
            rf"{kind} of \!x \<img src=x onerror=y()\>" for kind in ("progress", "leaderboard", "summary")
        }


def test_a_long_command_is_one_that_the_shell_takes() -> None:
    words = ["holdfast", "restore", "/data/" + "long" * 15 + '/it\'s "here" `x` $y', "--database", "sqlite:///" + "d" * 70]
    block = command_block(shlex.join(words))
    fence, *lines, last = block.split("\n")
    assert fence == last
    assert [line.lstrip().partition(" ")[0] for line in lines] == ["holdfast", "--database"]  # a path stays beside its command
    said = subprocess.run(
        ["sh", "-c", "\n".join(lines).replace("holdfast ", "printf '%s\\n' ", 1)], capture_output=True, text=True
    )
    assert said.stdout.splitlines() == words[1:]
    assert command_block("holdfast restore /runs/x") == "```\nholdfast restore /runs/x\n```"
    assert command_block("holdfast restore '" + "x" * 5000).count("\n") == 2


@pytest.mark.parametrize(("lost", "words"), [(0, "no work was lost"), (1, "1 step of work was"), (2, "2 steps of work were")])
def test_what_was_lost_is_said_in_words(lost: int, words: str) -> None:
    assert f"| restored | {words}" in summary(shown_of(spec_of(), restored=True, lost=lost), Tally(spec_of()))


def test_progress_is_a_percentage_of_what_is_to_run() -> None:
    spec = spec_of()
    tally = Tally(spec)
    assert percent(shown_of(spec), tally) == 0.0
    assert percent(shown_of(spec, total=None), tally) == 0.0
    for number in range(4):
        tally.take(trial_of(number, S.COMPLETED if number else S.RUNNING))
    assert percent(shown_of(spec), tally) == 30.0
    assert percent(shown_of(spec, total=None), tally) == 75.0
    assert percent(shown_of(spec, total=2), tally) == 75.0
    assert percent(shown_of(spec, ended="completed"), tally) == 100.0


def test_no_password_is_public() -> None:
    assert public("s3://key:secret@host/bucket") == "s3://***@host/bucket"
    assert public("/runs/a@b") == "/runs/a@b"
    assert public("/runs/\udc80\n") == "/runs/\\udc80\\n"


def test_a_bucket_gives_what_has_come_back() -> None:
    bucket = Bucket(2, 0.5, 0.0)
    assert [bucket.take(0.0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(now) for now in (1.0, 2.0, 1.0, 3.0, 4.0)] == [False, True, False, False, True]
    assert [bucket.take(1000.0) for _ in range(3)] == [True, True, False]
