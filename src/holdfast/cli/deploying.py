"""The command that puts everything on Prefect: deploy."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from holdfast.cli.common import Commands, command, database_option, print_json, terminal

if TYPE_CHECKING:
    from holdfast.deployments.deploy import Change


def add_deploying(commands: Commands) -> None:
    deploy = command(
        commands,
        "deploy",
        _deploy,
        "make or update the deployments search, restore, watch, collect and trial, their work pool, blocks and automations",
    )
    deploy.add_argument(
        "--storage",
        metavar="S",
        action="append",
        help="what watch and collect look after: a folder (made if need be), a URL or block:NAME; may be repeated (./runs)",
    )
    database_option(deploy)
    deploy.add_argument(
        "--pool", default="holdfast", metavar="NAME", help="the work pool; made, of type process, if there is none (holdfast)"
    )
    deploy.add_argument("--workdir", metavar="DIR", help="the folder that runs work in (this one); not for pools of containers")
    deploy.add_argument(
        "--no-automations",
        action="store_true",
        help="let the schedule of watch find what was cut off, every five minutes; automations of ours are removed",
    )
    deploy.add_argument(
        "--silence",
        type=float,
        metavar="SECONDS",
        help="without a heartbeat for so long, a run counts as dead (600; a run beats every 180)",
    )
    deploy.add_argument(
        "--spec", metavar="FILE", action="append", default=[], help="save a spec as block:NAME, after the file; may be repeated"
    )
    deploy.add_argument("--print-yaml", action="store_true", help="only print the deployments as prefect.yaml")


def _deploy(options: argparse.Namespace) -> int:
    from holdfast.deployments.catalogue import SILENCE_SECONDS, STORAGES, prefect_yaml

    if options.print_yaml:
        sys.stdout.write(prefect_yaml())
        return 0
    from holdfast.flows.serving import adopt
    from holdfast.settings import hush_prefect

    hush_prefect()
    adopt()
    from prefect.settings import get_current_settings

    from holdfast.deployments.deploy import Wanted, deploy

    wanted = Wanted(
        storages=tuple(options.storage or STORAGES),
        database=options.database,
        pool=options.pool,
        workdir=options.workdir,
        automations=not options.no_automations,
        silence=SILENCE_SECONDS if options.silence is None else options.silence,
        specs=tuple(options.spec),
    )
    changes = deploy(wanted, lambda text: print(f"holdfast: {text}", file=sys.stderr))
    worker = f"prefect worker start --pool {shlex.quote(wanted.pool)}"
    ui = get_current_settings().ui_url
    if options.json:
        print_json({"changes": [asdict(change) for change in changes], "worker": worker, "ui": ui})
        return 0
    terminal().print(_table(changes))
    print(f"start a worker where searches are to run: {worker}")
    if ui:
        print(f"then open {ui}/deployments")
    return 0


def _table(changes: list[Change]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("what", "name", "", "changed"):
        table.add_column(title, overflow="fold")
    for change in changes:
        table.add_row(*(Text(cell) for cell in (change.kind, change.name, change.what, change.detail)))
    return table
