"""Checking a configuration without serving: secrets, templates and the place where deliveries are remembered."""

from __future__ import annotations

from typing import Any

from holdfast.deployments.webhook.config import WebhookConfig
from holdfast.deployments.webhook.keys import Keys
from holdfast.deployments.webhook.places import BLOCK
from holdfast.deployments.webhook.requests import Form
from holdfast.deployments.webhook.templates import Template


def check(config: WebhookConfig) -> dict[str, Any]:
    """Return what would be served; SpecError for a secret that is missing or unfit. Blocks are not read, nothing is written."""

    async def unread(name: str) -> str:
        raise AssertionError(f"{BLOCK}{name} is read by a receiver that serves")

    hooks = []
    for name, hook in config.hooks.items():
        Keys(hook, unread)
        Form(hook, {key: Template(text, f"hooks.{name}.{key}") for key, text in hook.templates()})
        hooks.append({"path": f"/hooks/{name}", "runs": hook.target, "signature": hook.signature})
    return {"hooks": hooks, "roots": [root.location for root in config.roots], "specs": list(config.specs)}
