"""The command that lets others start restores and searches over HTTP: webhook."""

from __future__ import annotations

import argparse
import sys

from holdfast.cli.common import Commands, command, print_json


def add_receiving(commands: Commands) -> None:
    webhook = command(commands, "webhook", _webhook, "take signed webhooks, and start restores and searches for them")
    webhook.add_argument("config", metavar="CONFIG", help="what hooks there are, as a YAML file")
    webhook.add_argument("--host", default="127.0.0.1", help="the address to listen at (127.0.0.1)")
    webhook.add_argument("--port", type=_port, default=4280, help="the port to listen at (4280); 0: a free one")
    ways = webhook.add_mutually_exclusive_group()
    ways.add_argument("--check", action="store_true", help="only check the configuration and its secrets; nothing is served")
    ways.add_argument(
        "--cloud",
        metavar="HOOK",
        nargs="?",
        const="",
        help="print the webhook template and the automation that do the same in Prefect Cloud, for one hook or all",
    )


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)


def _webhook(options: argparse.Namespace) -> int:
    from holdfast.flows.serving import adopt
    from holdfast.settings import hush_prefect

    hush_prefect()
    adopt()
    _check_libraries()
    from holdfast.deployments.webhook.config import WebhookConfig

    config = WebhookConfig.from_file(options.config)
    if options.cloud is not None:
        return _cloud(options, config)
    if options.check:
        from holdfast.deployments.webhook.checking import check

        found = check(config)
        if options.json:
            print_json(found)
        else:
            sys.stdout.writelines(f"{hook['path']}: {hook['runs']}, signed by {hook['signature']}\n" for hook in found["hooks"])
        return 0
    from holdfast.deployments.webhook.serving import log_to_stderr, serve

    log_to_stderr()

    def say(address: str) -> None:
        if options.json:
            print_json({"url": address})
        else:
            print(f"taking webhooks at {address}/hooks/NAME; Ctrl-C ends it", flush=True)
        sys.stdout.flush()

    serve(config, options.host, options.port, say)
    return 0


def _check_libraries() -> None:
    from importlib.util import find_spec

    from holdfast.core.errors import MissingLibrary

    missing = [name for name in ("fastapi", "uvicorn", "jinja2") if find_spec(name) is None]
    if missing:
        raise MissingLibrary(f"holdfast webhook needs {', '.join(missing)}; install holdfast[webhook]")


def _cloud(options: argparse.Namespace, config: object) -> int:
    from holdfast.deployments.webhook.cloud import cloud_of

    found = cloud_of(config, options.cloud or None)  # type: ignore[arg-type]  # typed there; this module imports late
    if options.json:
        print_json(found)
        return 0
    import yaml

    for name, parts in found.items():
        print(f"# Prefect Cloud, Webhooks, the template of {name}:\n{parts['webhook_template']}\n")
        print("# The automation: prefect automation create --from-file FILE.yaml")
        print(yaml.safe_dump(parts["automation"], sort_keys=False))
    return 0
