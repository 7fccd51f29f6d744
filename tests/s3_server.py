"""An S3 server for tests: moto's, made atomic (it takes one request at a time), with faults on demand.

Run as a program it prints its port and ends with its standard input. Buckets whose name begins with ``refuses-`` answer
conditional writes with 400, as Ceph 16 does; those that begin with ``ignores-`` do not look at conditions.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

KEY, SECRET = "testkey", "testsecret"


@dataclass
class S3:
    """An S3 server: its endpoint, and how to reach it."""

    endpoint: str
    environment: dict[str, str] = field(default_factory=dict)
    own: bool = True
    """whether it is ours, and knows faults"""
    process: subprocess.Popen[str] | None = None
    made: int = 0

    @classmethod
    def start(cls) -> S3:
        """Start one on a free port, or use the one that HOLDFAST_TEST_S3_ENDPOINT names."""
        given = os.environ.get("HOLDFAST_TEST_S3_ENDPOINT")
        process = None
        if not given:
            process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            given = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        key, secret = (
            (os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")) if not process else (None, None)
        )
        environment = {
            "AWS_ENDPOINT_URL": given,
            "AWS_ACCESS_KEY_ID": key or KEY,
            "AWS_SECRET_ACCESS_KEY": secret or SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        return cls(given, environment, process is not None, process)

    @property
    def options(self) -> dict[str, Any]:
        """What ``storage_options`` have to say."""
        return {
            "key": self.environment["AWS_ACCESS_KEY_ID"],
            "secret": self.environment["AWS_SECRET_ACCESS_KEY"],
            "endpoint_url": self.endpoint,
        }

    def bucket(self, kind: str = "test") -> str:
        """Make a bucket and return its URL."""
        self.made += 1
        name = f"{kind}-{os.getpid()}-{self.made}"
        self._maker.mkdir(name, region_name="")
        return f"s3://{name}"

    @functools.cached_property
    def _maker(self) -> Any:
        """A client of our own: making one takes longer than all that a bucket is used for."""
        import s3fs

        return s3fs.S3FileSystem(**self.options, skip_instance_cache=True)

    def fault(self, kind: str, *, method: str = "PUT", part: str = "", count: int = 1) -> None:
        """Let the next ``count`` requests of a method whose path and query hold ``part`` go wrong.

        ``kind`` is an HTTP status that answers without doing anything, ``slow``: the 503 that asks for fewer requests,
        ``lost``: done, but answered with 503, ``broken``: not done, and the connection is closed without an answer,
        ``short``: done, but the answer breaks off in the middle of its body, ``hang``: no answer until ``clear``, which takes
        back what was ordered.
        """
        body = json.dumps({"kind": kind, "method": method, "part": part, "count": count}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/_faults", body)).close()

    def ordered(self) -> int:
        """Return how many faults were ordered and did not happen yet."""
        with urllib.request.urlopen(f"{self.endpoint}/_faults") as answer:
            return int(answer.read())

    def requests(self, method: str, part: str) -> int:
        """Return how many requests of a method there were whose path and query hold ``part``."""
        return sum(seen == method and part in path for seen, path in self.seen())

    def seen(self) -> list[tuple[str, str]]:
        """Return method, and path with query, of every request that there was."""
        with urllib.request.urlopen(f"{self.endpoint}/_seen") as answer:
            return [(method, path) for method, path in json.load(answer)]

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()


Start = Callable[..., Any]


class Server:
    """Moto's application behind one lock, with faults."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._faults: list[dict[str, Any]] = []
        self._seen: list[tuple[str, str]] = []
        self._cleared = threading.Event()

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        target = f"{path}?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else path
        with self._lock:
            if path == "/_faults" and method == "GET":
                return _answer(start, "200 OK", str(sum(fault["count"] for fault in self._faults)).encode())
            if path == "/_faults":
                fault = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                self._cleared.set() if fault["kind"] == "clear" else self._cleared.clear()
                self._faults = [] if fault["kind"] == "clear" else [*self._faults, fault]
                return _answer(start, "204 No Content")
            if path == "/_seen":
                return _answer(start, "200 OK", json.dumps(self._seen).encode())
            self._seen.append((method, target))
            if _drop_conditions(environ, path):
                return _answer(start, "400 Bad Request", _error("InvalidArgument"))
            fault = next((f for f in self._faults if f["count"] and f["method"] == method and f["part"] in target), None)
            if fault is None:
                return list(self._app(environ, start))
            fault["count"] -= 1
            if fault["kind"] == "lost":
                list(self._app(environ, lambda *_: lambda _: None))
                return _answer(start, "503 Service Unavailable", _error("ServiceUnavailable"))
            if fault["kind"] == "short":
                return _cut_off(environ, start, list(self._app(environ, start)))
            if fault["kind"] == "broken":
                _read(environ)
                return _cut_off(environ, start, [])
            if fault["kind"] == "slow":
                return _answer(start, "503 Slow Down", _error("SlowDown"))
            if fault["kind"] != "hang":
                code = {"403": "AccessDenied", "429": "TooManyRequests"}.get(fault["kind"], "InternalError")
                return _answer(start, f"{fault['kind']} Fault", _error(code))
        _read(environ)
        self._cleared.wait()
        return _cut_off(environ, start, [])


def _read(environ: dict[str, Any]) -> None:
    """Read a request to its end: who is still sending notices no closed connection, for up to a minute."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def _drop_conditions(environ: dict[str, Any], path: str) -> bool:
    """Take conditions away where the bucket ignores them; tell whether it refuses the request for them."""
    names = [name for name in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH") if name in environ]
    if environ["REQUEST_METHOD"] != "PUT" or not names:
        return False
    if path.startswith("/ignores-"):
        for name in names:
            del environ[name]
    return path.startswith("/refuses-")


def _cut_off(environ: dict[str, Any], start: Start, body: list[bytes]) -> Iterable[bytes]:
    """Yield half of a body, then close the connection."""
    whole = b"".join(body)
    if whole:
        yield whole[: len(whole) // 2]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as ordered</Message></Error>".encode()


def _answer(start: Start, status: str, body: bytes = b"") -> list[bytes]:
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def main() -> None:
    import logging

    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").disabled = True
    server = make_server("127.0.0.1", 0, Server(), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
