"""The receiver as an ASGI application: to be served by ``holdfast webhook``, or mounted into another application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from holdfast.deployments.webhook.config import WebhookConfig
from holdfast.deployments.webhook.description import describe
from holdfast.deployments.webhook.problems import PROBLEM_JSON, Problem
from holdfast.deployments.webhook.receiver import Receiver


def create_app(config: WebhookConfig) -> FastAPI:
    """Return an application with ``POST /hooks/NAME``, ``GET /healthz`` and ``GET /openapi.json``.

    Raises SpecError for a secret that is missing or unfit, DatabaseError when deliveries cannot be remembered.
    """
    receiver = Receiver(config)
    app = FastAPI(title="holdfast webhook", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.receiver = receiver

    @app.post("/hooks/{name}")
    async def deliver(name: str, request: Request) -> JSONResponse:
        client = request.client.host if request.client is not None else None
        answer = await receiver.take(name, request.headers.raw, request.stream(), client)
        return JSONResponse(answer.body, answer.status, answer.headers)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse(await receiver.health())

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers, media_type=PROBLEM_JSON)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = {404: "no-such-page", 405: "method"}.get(error.status_code, "refused")
        body = Problem(error.status_code, kind, str(error.detail)).body()
        return JSONResponse(body, error.status_code, dict(error.headers or {}), media_type=PROBLEM_JSON)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse(Problem(400, "gone", "the client has gone").body(), 400, media_type=PROBLEM_JSON)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        words = "something went wrong here; the receiver's log says what"
        return JSONResponse(Problem(500, "failed", words).body(), 500, media_type=PROBLEM_JSON)

    description: dict[str, Any] = describe(config, {name: hook.form.schema for name, hook in receiver.hooks.items()})
    app.openapi = lambda: description  # type: ignore[method-assign]  # how FastAPI is told of another one
    return app
