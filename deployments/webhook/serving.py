"""Serving the receiver with uvicorn: slow senders are cut off, what is no HTTP gets a problem, too."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from holdfast.core.errors import EngineError
from holdfast.deployments.webhook.app import create_app
from holdfast.deployments.webhook.config import WebhookConfig
from holdfast.deployments.webhook.problems import PROBLEM_JSON, Problem
from holdfast.deployments.webhook.starting import load

LONGEST_HEADERS = 16 << 10
"""Bytes of a request's headers."""


def patient_protocol(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with a limit to the time that headers may take; it has none of its own."""

    class Protocol(H11Protocol):
        _headers_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._headers_due = self.loop.call_later(seconds, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            self._at_ease()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._at_ease()
            elif self._headers_due is None and not self.transport.is_closing():
                self._headers_due = self.loop.call_later(seconds, self._too_slow)  # the next request of the same connection

        def _at_ease(self) -> None:
            if self._headers_due is not None:
                self._headers_due.cancel()
                self._headers_due = None

        def _too_slow(self) -> None:
            self._headers_due = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(Problem(400, "no-http", "the request is no HTTP/1.1 that can be read").body()).encode()
            headers = [(b"content-type", PROBLEM_JSON.encode()), (b"connection", b"close")]
            headers.append((b"content-length", str(len(body)).encode()))
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.SEND_BODY):
                    self.transport.write(self.conn.send(event))
            self.transport.close()

    return Protocol


def serve(config: WebhookConfig, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; ``say`` gets the address once deliveries are taken. EngineError for a port in use."""
    limits = config.limits
    app = create_app(config)
    settings: dict[str, Any] = {"http": patient_protocol(limits.header_seconds), "ws": "none", "lifespan": "off"}
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(config.trusted_proxies),
            forwarded_allow_ips=list(config.trusted_proxies),
            limit_concurrency=limits.connections,
            h11_max_incomplete_event_size=LONGEST_HEADERS,
            timeout_graceful_shutdown=20,
            **settings,
        )
    )
    load()
    listener = _listener(host, port)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    try:
        say(f"http://{shown}:{address[1]}")
        server.run(sockets=[listener])
    finally:
        listener.close()
        app.state.receiver.close()


def _listener(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(256)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        words = f"{host}:{port} cannot be listened at ({error.strerror}); choose another --port, or 0 for a free one"
        raise EngineError(words) from None
    return listener


def log_to_stderr() -> None:
    """Write one line for each delivery, and warnings of the server, to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("holdfast.webhook").setLevel(logging.INFO)
