"""The commands of one machine, and for others: up, job-template."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from holdfast.cli.common import Commands, command


def add_serving(commands: Commands) -> None:
    up = command(
        commands,
        "up",
        _up,
        "start what one machine needs: Prefect's server, deployments, a worker, a webhook receiver; Ctrl-C ends it all",
        as_json=False,
    )
    up.add_argument("--storage", metavar="S", action="append", default=[], help="where experiments are; may be repeated")
    up.add_argument(
        "--database", metavar="URL", help="of the experiments; with a password it is better left to HOLDFAST_DATABASE_URL"
    )
    up.add_argument("--host", default="127.0.0.1", help="address that the server listens on (127.0.0.1)")
    up.add_argument("--port", type=_port, default=4200, help="of Prefect's server and UI (4200); 0: any that is free")
    up.add_argument("--webhook", metavar="CONFIG.yaml", type=Path, help="receive webhooks as this file says")
    up.add_argument("--webhook-port", metavar="PORT", type=_port, default=4280, help="of the webhook receiver (4280)")
    up.add_argument("--no-worker", action="store_true", help="workers run elsewhere")
    up.add_argument("--no-automations", action="store_true", help="heal by a schedule alone")
    template = command(
        commands,
        "job-template",
        _job_template,
        "print a base job template for a work pool: prefect work-pool create NAME --type TYPE --base-job-template FILE",
        as_json=False,
    )
    template.add_argument(
        "type", metavar="TYPE", choices=("process", "docker", "kubernetes"), help="process, docker or kubernetes"
    )
    template.add_argument("--path", action="store_true", help="print where the file is")


def _port(text: str) -> int:
    """Read a port."""
    if not (text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port; name a number from 1 to 65535")
    return int(text)


def _up(options: argparse.Namespace) -> int:
    from holdfast.deployments.machine import Up
    from holdfast.deployments.up import up

    wanted = Up(
        storages=tuple(options.storage),
        database=options.database,
        host=options.host,
        port=options.port,
        webhook=options.webhook,
        webhook_port=options.webhook_port,
        worker=not options.no_worker,
        automations=not options.no_automations,
    )
    return up(wanted, _say)


def _say(text: str) -> None:
    print(f"holdfast: {text}" if not text.startswith(" ") else text, flush=True)


def _job_template(options: argparse.Namespace) -> int:
    from holdfast.deployments.templates import template_file

    file = template_file(options.type)
    sys.stdout.write(f"{file}\n" if options.path else file.read_text())
    return 0
