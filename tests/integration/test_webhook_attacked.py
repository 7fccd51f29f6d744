"""The receiver under attack: whatever is sent without a valid signature starts nothing, and it goes on working."""

from __future__ import annotations

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.generation import GenerationMode
from support_webhook import ROTATED, Scene, client_of, make_experiment, reply, signed

pytestmark = pytest.mark.xdist_group("webhook")

BODY = b'{"experiment": "attacked"}'
MANY, AT_ONCE = 2000, 20


@pytest.fixture
def target(scene: Scene) -> Path:
    path = scene.folder / "runs" / "attacked"
    return path if path.exists() else scene.experiment("attacked")


def forged(number: int) -> tuple[str, bytes, dict[str, str]]:
    """Return hook, body and headers of an attempt that must fail, of one of many kinds."""
    fair = signed("standard", BODY)
    github = signed("github", BODY)
    signature = fair["webhook-signature"]
    kinds: list[tuple[str, bytes, dict[str, str]]] = [
        ("plain", BODY, {"Content-Type": "application/json"}),
        ("plain", BODY, {**fair, "webhook-signature": signature[:-8]}),
        ("plain", BODY, {**fair, "webhook-signature": ""}),
        ("plain", BODY, {**fair, "webhook-signature": "v1,"}),
        ("plain", BODY, {**fair, "webhook-signature": "v1a" + signature[2:]}),
        ("plain", BODY, {**fair, "webhook-signature": " ".join(f"v1,{n}" for n in range(16)) + f" {signature}"}),
        ("plain", BODY, {**fair, "webhook-id": "another"}),
        ("plain", BODY, {**fair, "webhook-timestamp": str(int(time.time()) + 7)}),
        ("plain", BODY, {**fair, "webhook-timestamp": "NaN"}),
        ("plain", BODY + b" ", fair),
        ("plain", BODY, signed("standard", BODY, late=301)),
        ("plain", BODY, signed("standard", BODY, late=-302)),
        ("plain", BODY, signed("standard", BODY, secret="whsec_" + "A" * 44)),
        ("plain", BODY, github),
        ("strong", BODY, signed("standard", BODY, secret=ROTATED)),
        ("github", BODY, fair),
        ("github", BODY, {**github, "X-Hub-Signature-256": github["X-Hub-Signature-256"][:-1]}),
        ("github", BODY, {**github, "X-Hub-Signature-256": github["X-Hub-Signature-256"].replace("sha256", "sha1")}),
        ("github", BODY, {key: value for key, value in github.items() if key != "X-GitHub-Delivery"}),
        ("unknown", BODY, fair),
        ("plain", b"[" * 50_000, {"Content-Type": "application/json"}),
        ("plain", bytes(99_999), {**fair}),
    ]
    return kinds[number % len(kinds)]


def test_thousands_of_forged_deliveries_start_nothing(scene: Scene, target: Path) -> None:
    before = len(scene.prefect.runs(scene.restore))
    size = scene.receiver.memory()

    def attack(lane: int) -> set[int]:
        found = set()
        with closing(scene.receiver.connect(f"127.0.1.{lane + 1}")) as connection:
            for number in range(lane, MANY, AT_ONCE):
                hook, body, headers = forged(number // AT_ONCE + lane)
                connection.request("POST", f"/hooks/{hook}", body, headers)
                found.add(reply(connection).status)
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        statuses = set().union(*pool.map(attack, range(AT_ONCE)))
    assert statuses == {401, 404}
    assert len(scene.prefect.runs(scene.restore)) == before
    assert scene.receiver.memory() - size < 64 << 20
    assert scene.receiver.deliver("plain", {"experiment": "attacked"}, source="127.0.0.3").status == 202
    assert len(scene.started(target)) == 1


def test_large_and_endless_bodies_are_cut_off(scene: Scene) -> None:
    """Each ends with 413 after what is allowed, and none of it stays in memory."""
    size = scene.receiver.memory()
    head = b"POST /hooks/plain HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    block = b"1" * (1 << 20)
    answers = [
        scene.receiver.raw(head + b"Content-Length: 104857600\r\n\r\n", *[block] * 100),
        scene.receiver.raw(head + b"Transfer-Encoding: chunked\r\n\r\n", *[b"100000\r\n" + block + b"\r\n"] * 100),
        scene.receiver.raw(head + b"Content-Length: 99999999999999999999999999\r\n\r\n", block),
        scene.receiver.raw(head + b"Content-Length: 100001\r\nExpect: 100-continue\r\n\r\n"),
    ]
    assert [answer.split(b" ", 2)[1] for answer in answers] == [b"413", b"413", b"400", b"413"]
    assert scene.receiver.memory() - size < 32 << 20


def test_slow_senders_are_cut_off(scene: Scene) -> None:
    """Of headers and of bodies; and others are served meanwhile."""
    head = b"POST /hooks/plain HTTP/1.1\r\nHost: x\r\n"
    with ThreadPoolExecutor(3) as pool:
        slow = [
            pool.submit(scene.receiver.raw, head),
            pool.submit(scene.receiver.raw, b""),
            pool.submit(scene.receiver.raw, head + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"),
        ]
        assert scene.receiver.call("/healthz", None, method="GET").status == 200
        found = [one.result() for one in slow]
    assert found[:2] == [b"", b""]
    assert found[2].startswith(b"HTTP/1.1 408 ")


def test_requests_that_mean_two_things_are_refused(scene: Scene, target: Path) -> None:
    before = len(scene.prefect.runs(scene.restore))
    fair = "".join(f"{key}: {value}\r\n" for key, value in signed("standard", BODY).items()).encode()
    head = b"POST /hooks/plain HTTP/1.1\r\nHost: x\r\n"
    length = b"Content-Length: %d\r\n" % len(BODY)
    end = b"Connection: close\r\n\r\n"
    for extra in (
        b"webhook-id: another\r\n" + length,
        b"webhook-signature: v1,xxx\r\n" + length,
        length + b"Content-Length: 3\r\n",
        length + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        length + b"X-Long: " + b"a" * 300_000 + b"\r\n",
        b" folded: yes\r\nwebhook id: 1\r\n" + length,
    ):
        answer = scene.receiver.raw(head + fair + extra + end + BODY)
        status, _, rest = answer.partition(b"\r\n")
        assert status.split(b" ")[1] == b"400", answer
        assert json.loads(rest.partition(b"\r\n\r\n")[2])["status"] == 400
    assert b"HTTP/1.1 400" in scene.receiver.raw(b"\x16\x03\x01\x02\x00 no HTTP at all\r\n\r\n")
    assert len(scene.prefect.runs(scene.restore)) == before


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' * 33 + b"1" + b"}" * 33,
        b"[" * 49_000,
        b'{"experiment": "attacked", "experiment": "other"}',
        b'{"experiment": NaN}',
        b'{"experiment": 1e999}',
        b'{"experiment": ' + b"9" * 20 + b"}",
        b'{"experiment": ' + b"9" * 5000 + b"}",
        b'{"experiment": "\\ud800"}',
        b'{"experiment": "\xff"}',
        b'\xef\xbb\xbf{"experiment": "attacked"}',
        b"",
    ],
)
def test_what_is_no_strict_json_is_refused_even_when_it_is_signed(scene: Scene, body: bytes) -> None:
    assert scene.receiver.deliver("plain", body).kind == "not-json"


def test_no_name_leads_out_of_the_roots(scene: Scene, target: Path) -> None:
    before = len(scene.prefect.runs(scene.restore))
    (scene.folder / "outside").mkdir(exist_ok=True)
    secret = scene.folder / "outside" / "hidden"
    if not secret.exists():
        make_experiment(scene.folder / "outside", "hidden")
        (scene.folder / "runs" / "link").symlink_to(secret)
        (scene.folder / "runs" / "up").symlink_to(scene.folder)
    root = scene.folder / "runs"
    for name in (
        "../outside/hidden", str(secret), f"{root}/../outside/hidden", "link", "up/outside/hidden", "up/../attacked",
        "./attacked", "attacked/", "/attacked", "attacked\0", "attacked\n", "..", ".", "~", "~root", f"file://{target}",
        f"s3://bucket/{target}", "simplecache::file:///etc", "block:lab/attacked",
        "\uff0e\uff0e/outside/hidden", "%2e%2e/outside",
        "attacked\u202e", "a" * 1024, "a/" * 500 + "a", "-attacked", "attacked\\..\\..", str(root), f"{root}//attacked",
    ):  # fmt: skip
        answer = scene.receiver.deliver("plain", {"experiment": name})
        assert answer.kind == "no-such-experiment", name
    for extra in ({"trainable": "/tmp/evil.py:f"}, {"database": "sqlite:////tmp/x.db"}, {"storage_options": {}}, {"path": "/"},
                  {"changes": {"search.engine": "/tmp/evil.py:f"}}, {"changes": {"search.num_trials": 51}}, {"force": True},
                  {"policy": {"errored": "evil"}}, {"resume_errored": True, "restart_errored": True}):  # fmt: skip
        assert scene.receiver.deliver("plain", {"experiment": "attacked", **extra}).status == 422
    assert len(scene.prefect.runs(scene.restore)) == before


@pytest.mark.parametrize("signs", [False, True])
def test_schemathesis_finds_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, signs: bool, target: Path
) -> None:
    """Against the receiver's own description: as anybody, and as somebody who holds a secret and so gets beyond the 401."""
    hooks = {name: hook for name, hook in scene.receiver.config["hooks"].items() if name in ("plain", "looks")}
    limits = {"per_client": {"times": 10**6}, "per_hook": {"times": 10**6}}
    memory = {"database": f"sqlite:///{tmp_path / 'hooks.db'}"}
    roots = [str(scene.folder / "runs")]
    config = {"roots": roots, "specs": [str(scene.folder / "specs")], "hooks": hooks, "limits": limits, "memory": memory}
    before = len(scene.prefect.runs(scene.restore))
    with client_of(config, monkeypatch, api=scene.prefect.url) as client:
        schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
        for found in schema.get_all_operations():
            operation = found.ok()
            if operation.path == "/healthz":
                operation.Case().call_and_validate()  # it takes nothing: there is nothing to generate
                continue
            statuses: list[int] = []
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

                @seed(7)
                @settings(
                    max_examples=10,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def attack(case: schemathesis.Case) -> None:
                    if signs and case.method == "POST":
                        case.headers = _signed_case(case)
                    response = case.call()
                    statuses.append(response.status_code)  # noqa: B023  # run before the next one
                    case.validate_response(response)

                attack()
            if signs and operation.path.startswith("/hooks/"):
                assert set(statuses) & {202, 404, 409, 422}, statuses
    if not signs:
        assert len(scene.prefect.runs(scene.restore)) == before


def _signed_case(case: schemathesis.Case) -> dict[str, str]:
    """Return the case's headers with those of a sender who signs what is sent."""
    prepared = case.as_transport_kwargs()
    body = prepared.get("data") or b""
    if "json" in prepared:
        body = json.dumps(prepared["json"]).encode()
    elif isinstance(body, str):
        body = body.encode()
    return {**dict(case.headers or {}), **signed("standard", body, id=uuid.uuid4().hex)}
