"""The OpenAPI description of a receiver: each hook with the bodies that it takes and every answer that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.deployments.webhook.config import Hook, WebhookConfig
from holdfast.deployments.webhook.problems import PROBLEM_JSON, STATUSES
from holdfast.deployments.webhook.signatures import HEADERS

_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
_PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "RFC 9457",
    "properties": {
        "type": {"type": "string", "description": "urn:holdfast:webhook:KIND"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "holder": {"type": "string", "description": "who drives the experiment (409)"},
        "expires": {"type": "string", "description": "until when, unless it goes on (409)"},
        "flow_run_id": {"type": "string", "description": "what waits already (409)"},
        "url": {"type": ["string", "null"]},
        "limit": {"type": "integer", "description": "bytes (413)"},
        "errors": {"type": "array", "items": {"type": "object"}, "description": "what does not fit the schema (422)"},
    },
    "required": ["type", "title", "status", "detail"],
}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "status": {"type": "string", "enum": ["started", "ignored", "pong"]},
        "flow_run_id": {"type": "string", "format": "uuid"},
        "url": {"type": ["string", "null"], "description": "where Prefect's UI shows the flow run"},
    },
    "required": ["status"],
}


def describe(config: WebhookConfig, schemas: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the description; ``schemas`` are the native forms by hook."""
    from holdfast import __version__

    paths: dict[str, Any] = {
        f"/hooks/{name}": {"post": _hook(name, hook, schemas[name])} for name, hook in config.hooks.items()
    }
    healthy = {"type": "object", "properties": {"status": {"type": "string"}, "prefect": {"type": "boolean"}}}
    said = {"description": "it works", "content": {"application/json": {"schema": healthy}}}
    paths["/healthz"] = {
        "get": {"operationId": "healthz", "summary": "Whether the receiver, and Prefect, answer", "responses": {"200": said}}
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "holdfast webhook", "version": __version__, "description": "Starts restores and searches."},
        "paths": paths,
        "components": {"schemas": {"Problem": _PROBLEM, "Answer": _ANSWER}},
    }


def _hook(name: str, hook: Hook, schema: dict[str, Any]) -> dict[str, Any]:
    body = schema if hook.parameters is None else {"type": "object", "description": "what the sender sends"}
    refusals = {str(status): _refusal(status, words) for status, words in STATUSES.items()}
    answer = {"schema": {"$ref": "#/components/schemas/Answer"}}
    return {
        "operationId": name,
        "summary": f"Start {hook.target}",
        "parameters": [
            {"name": header, "in": "header", "required": True, "schema": {"type": "string", "minLength": 1}}
            for header in HEADERS[hook.signature][:3]
            if header is not None
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"202": {"description": "taken", "content": {"application/json": answer}}, **refusals},
    }


def _refusal(status: int, words: str) -> dict[str, Any]:
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": words, "content": content, **({"headers": _RETRY} if status in (429, 503) else {})}
