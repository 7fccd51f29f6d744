"""What blocks do not take, and what is said when they cannot be looked up: without what may be a secret."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import ValidationError

from holdfast import references
from holdfast.core.errors import EngineError
from holdfast.deployments.webhook.config import Hook
from holdfast.deployments.webhook.keys import FAILED, Keys
from holdfast.deployments.webhook.problems import Problem
from holdfast.deployments.webhook.starting import Api
from holdfast.flows.blocks import HoldfastDatabase, HoldfastSpec, HoldfastStorage

SPEC = {"name": "x", "trainable": "a:b", "objectives": {"l": "min"}, "space": {}, "search": {"num_trials": 1}}


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        (HoldfastStorage, {"location": "runs"}, "neither an absolute path"),
        (HoldfastStorage, {"location": "block:other"}, "refers to a block"),
        (HoldfastStorage, {"location": "/data", "key": "canary"}, "is for object stores"),
        (HoldfastStorage, {"location": "s3://a:canary@bucket"}, "secret_options"),
        (HoldfastStorage, {"location": "s3://bucket", "options": {"token": "canary"}}, "everybody would see"),
        (HoldfastStorage, {"location": "abfs://bucket", "secret": "canary"}, "is for s3://"),
        (HoldfastDatabase, {"url": "postgresql://u:canary@h/d"}, "everybody would see"),
        (HoldfastDatabase, {"url": "sqlite:///relative.db"}, "four slashes"),
        (HoldfastDatabase, {"url": "mysql://u@h/d"}, ""),
        (HoldfastDatabase, {"url": "postgresql+psycopg://h/d", "password": "canary"}, "names no user"),
        (HoldfastSpec, {"spec": {**SPEC, "database": "postgresql://u:canary@h/d"}}, "everybody would see"),
        (HoldfastSpec, {"spec": {**SPEC, "storage_options": {"secret": "canary"}}}, "everybody would see"),
        (HoldfastSpec, {"spec": {**SPEC, "serach": 1}}, "search"),
    ],
)
def test_what_a_block_does_not_take(kind: Any, data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**data)
    said = str([one["msg"] for one in caught.value.errors()])
    assert words in said
    assert "canary" not in said


def test_what_a_block_shows() -> None:
    database = HoldfastDatabase(url="postgresql://u@h/d", password="p@ss:/w")
    assert database.full_url() == "postgresql+psycopg://u:p%40ss%3A%2Fw@h/d"
    assert "p@ss" not in str(database)
    storage = HoldfastStorage(location="s3://b", key="k", secret="s", endpoint="http://h", region="r", options={"anon": False})
    assert "secret=SecretStr('**********')" in str(storage)
    for kind, slug in ((HoldfastStorage, "storage"), (HoldfastDatabase, "database"), (HoldfastSpec, "spec")):
        assert kind.get_block_type_slug() == f"holdfast-{slug}"
        assert kind.get_description()
        assert kind.get_code_example()


@contextmanager
def answering(status: int, kind: str, body: bytes) -> Iterator[str]:
    """Serve one answer to everything, as a proxy does whose server is away; return the URL."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://user:canary@127.0.0.1:{server.server_port}/api"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, "text/html", b"<html>please log in</html>"),
        (200, "application/json", b'{"data": {"value": "canary"}}'),
        (200, "application/json", b"[1]"),
        (302, "text/html", b""),
        (500, "text/html", b"canary"),
        (200, "application/json", b"\xff"),
    ],
)
def test_whoever_answers_for_prefect_is_told_apart(
    status: int, kind: str, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A login page, or nonsense, is an API that does not answer; what it says may be a secret, and is not said again."""
    with answering(status, kind, body) as url, temporary_settings({PREFECT_API_URL: url}):
        with pytest.raises(EngineError, match="does not answer") as caught:
            references.place("block:lab")
        assert "canary" not in str(caught.value)
        api = Api(5.0)
        for ask in (lambda: api.secret("x"), lambda: api.run_of("k"), lambda: api.deployment("restore/restore")):
            with pytest.raises(Problem) as refused:
                anyio.run(ask)
            assert (refused.value.status, refused.value.kind) == (503, "prefect")
            assert "canary" not in f"{refused.value.__cause__}"
    assert "canary" not in caplog.text


def test_a_secret_that_cannot_be_had_is_not_asked_for_by_everybody() -> None:
    now, asked = [0.0], list[str]()

    async def read(name: str) -> str:
        asked.append(name)
        if len(asked) < 3:
            raise Problem(503, "prefect", "away")
        return "c2VjcmV0c2VjcmV0c2VjcmV0"

    keys = Keys(Hook.model_validate({"signature": "standard", "secrets": {"block": "b"}}), read, lambda: now[0])
    for at, calls in ((0.0, 1), (FAILED / 2, 1), (FAILED + 1, 2), (FAILED + 2, 2)):
        now[0] = at
        with pytest.raises(Problem):
            anyio.run(keys.now)
        assert len(asked) == calls
    now[0] = 3 * FAILED
    assert anyio.run(keys.now) == [b"secretsecretsecret"]
