"""What a crash left open in Prefect is not looked for on a server that cannot know of it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prefect.settings import PREFECT_API_URL, temporary_settings

from holdfast.core.trial import Attempt, Outcome
from holdfast.flows.prefect_runs import Closing, DeadRuns
from holdfast.storage.database.reads import Drove


@contextmanager
def empty_server() -> Iterator[tuple[str, list[str]]]:
    """Serve an API that knows no runs; yield its address, and what it is asked."""
    asked: list[str] = []

    class Empty(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def do_GET(self) -> None:
            self.send_error(404)  # it has no CSRF tokens

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/api", asked
        finally:
            server.shutdown()
            thread.join()


def test_runs_of_another_server_are_asked_for_once() -> None:
    """The end of each restore on an embedded server would wait for them, since every one of those begins empty."""
    flow, task = str(uuid.uuid4()), str(uuid.uuid4())
    attempt = Attempt(id=1, number=1, outcome=Outcome.LOST, flow_run_id=flow, task_run_id=task)
    with empty_server() as (url, asked), temporary_settings({PREFECT_API_URL: url}):
        closing = Closing(DeadRuns("mine", drives=[Drove(flow, 1)], attempts=[attempt]))
        closing.start()
        closing.finish(30)
    assert asked == ["/api/task_runs/filter", "/api/flow_runs/filter"]
