"""The same through Prefect Cloud: the template of a Cloud webhook, and the automation that it sets off."""

from __future__ import annotations

import json
from typing import Any

from holdfast.core.errors import SpecError
from holdfast.deployments.webhook.config import Hook, WebhookConfig
from holdfast.deployments.webhook.requests import names_of

EVENT = "holdfast.webhook."
"""What follows: the hook's name."""

_TEXTS = ("experiment", "spec")


def cloud_of(config: WebhookConfig, name: str | None) -> dict[str, Any]:
    """Return, by hook, the template of its Cloud webhook and its automation; SpecError for a hook that is not configured.

    Cloud does not check signatures: the URL of a Cloud webhook is the secret. So an experiment is named by one part of a path
    there, which is put below the first root, and what would lead out of it is left out of the name.
    """
    if name is not None and name not in config.hooks:
        raise SpecError(f"there is no hook {name!r}; configured: {', '.join(config.hooks)}")
    return {
        key: {"webhook_template": _template(key, hook), "automation": _automation(key, hook, config)}
        for key, hook in config.hooks.items()
        if name in (None, key)
    }


def _template(name: str, hook: Hook) -> str:
    """Return the Jinja template of the webhook, which makes an event of what comes in."""
    event = json.dumps(f"{EVENT}{name}")
    # A delivery that the condition leaves out becomes an event that no automation waits for.
    named, prelude = event, ""
    if hook.when is not None:
        prelude = (
            f"{{% set hook = {json.dumps(name)} %}}{{% set event = headers.get('x-github-event', '') %}}"
            f"{{% set when %}}{hook.when}{{% endset %}}\n"
        )
        named = event[:-1] + "{% if when | trim | lower not in ('true', '1', 'yes') %}.ignored{% endif %}\""
    lines = [f'  "{key}": {_expression(key, hook)}' for key in _parameters(hook)]
    payload = ",\n  ".join(lines)
    return (
        f'{prelude}{{\n  "event": {named},\n'
        f'  "resource": {{"prefect.resource.id": {event}, "prefect.resource.name": "{name}"}},\n'
        f'  "payload": {{\n  {payload}\n  }}\n}}'
    )


def _parameters(hook: Hook) -> list[str]:
    """Return the parameters that pass through an event: those that are mapped, else the experiment or spec alone."""
    mapped = [key for key in hook.parameters or {} if key in names_of(hook) and "." not in key]
    return mapped or ["experiment" if hook.runs == "restore" else "spec"]


def _expression(key: str, hook: Hook) -> str:
    text = str((hook.parameters or {}).get(key, f"{{{{ body.{key} }}}}"))
    if key in _TEXTS:
        kept = "replace('/', '') | replace('\\\\', '')" if key == "experiment" else "string"
        return f"{{% set value %}}{text}{{% endset %}}{{{{ value | trim | {kept} | tojson }}}}"
    return f"{{% set value %}}{text}{{% endset %}}{{{{ (value | trim | lower in ('true', '1', 'yes')) | tojson }}}}"


def _automation(name: str, hook: Hook, config: WebhookConfig) -> dict[str, Any]:
    """Return the automation, as ``prefect automation create --from-file`` takes it."""
    parameters: dict[str, Any] = {}
    for key in _parameters(hook):
        payload = f"event.payload.{key}"
        if key == "experiment":
            # The flow gets a path: the first root, and one name below it.
            root = json.dumps(config.roots[0].location.rstrip("/") + "/")
            parameters["path"] = _json(f"({root} ~ {payload}) | tojson")
        else:
            parameters[key] = _json(f"{payload} | tojson")
    if hook.runs == "restore":
        parameters |= {key: value for key, value in hook.defaults.items() if "." not in key and key not in parameters}
        if config.roots[0].storage_options:
            parameters["storage_options"] = config.roots[0].storage_options
        if config.roots[0].database:
            parameters["database"] = config.roots[0].database
    return {
        "name": f"holdfast webhook {name}",
        "description": f"Runs {hook.target} for what the webhook {name} takes.",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Reactive",
            "threshold": 1,
            "within": 0,
            "expect": [f"{EVENT}{name}"],
            "match": {"prefect.resource.id": f"{EVENT}{name}"},
        },
        "actions": [
            {
                "type": "run-deployment",
                "source": "selected",
                "deployment_id": f"the ID that `prefect deployment inspect {hook.target}` shows",
                "parameters": parameters,
            }
        ],
    }


def _json(expression: str) -> dict[str, Any]:
    """Return a parameter that keeps its type: a template's result is text otherwise."""
    return {"__prefect_kind": "json", "value": {"__prefect_kind": "jinja", "template": f"{{{{ {expression} }}}}"}}
