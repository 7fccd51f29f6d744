"""What SIGTERM meant is asked of Prefect until it answers, on a real server that puts requests off."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_API_URL, temporary_settings

from holdfast.flows import prefect_runs
from holdfast.flows.prefect_runs import CANCELLED, wish_behind


def call(url: str, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(f"{url}{path}", data, {"Content-Type": "application/json"}, method=method), timeout=60) as answer:
        return json.load(answer)


@contextmanager
def busy(url: str, times: int) -> Iterator[tuple[str, list[str]]]:
    """Give the address of an API that answers like the one at ``url``, but for its first questions about a flow run: 503."""
    refused: list[str] = []

    class Between(BaseHTTPRequestHandler):
        def _carry(self) -> None:
            if self.path.startswith("/flow_runs/") and len(refused) < times:
                refused.append(self.path)
                self._answer(503, b"{}")
                return
            length = int(self.headers.get("Content-Length", 0))
            kept = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "accept-encoding")}
            asked = Request(f"{url}{self.path}", self.rfile.read(length) or None, kept, method=self.command)
            try:
                with urlopen(asked, timeout=60) as answer:
                    self._answer(answer.status, answer.read())
            except HTTPError as error:
                self._answer(error.code, error.read())

        do_GET = do_POST = _carry  # the names that http.server asks for

        def _answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Between)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", refused
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("times", [0, 3])
def test_a_busy_server_is_asked_again_whether_a_person_cancelled(
    prefect_url: str, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    flow = call(prefect_url, "POST", "/flows/", {"name": "wished"})["id"]
    run = call(prefect_url, "POST", "/flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", run)
    monkeypatch.setattr(prefect_runs, "BUSY_SECONDS", 60.0)  # the client rests for two seconds after each refusal
    with busy(prefect_url, times) as (url, refused), temporary_settings({PREFECT_API_URL: url}):
        assert wish_behind(TerminationSignal(signal.SIGTERM)) is None
        assert len(refused) == times
        del refused[:]
        call(prefect_url, "POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}, "force": True})
        assert wish_behind(TerminationSignal(signal.SIGTERM)) == CANCELLED
        assert len(refused) == times
        assert wish_behind(KeyboardInterrupt()) is None
