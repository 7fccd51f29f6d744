"""A search on a Dask cluster of two hosts, during which a host is cut off, a worker dies, and the driver."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from s3_server import S3
from support_hosts import Network, wanted
from support_postgres import Postgres
from support_story import WORKERS, story_of, told

pytestmark = [
    pytest.mark.timeout(600),  # it waits for leases to run out, twice
    pytest.mark.xdist_group("dask-hosts"),
    pytest.mark.skipif(find_spec("distributed") is None, reason="the package distributed is missing"),
]


def cluster(net: Network) -> str:
    address = f"tcp://{net['head'].address}:8786"
    code = "import sys; from dask.__main__ import main; sys.argv[0] = 'dask'; main()"
    command = (sys.executable, "-c", code)
    scheduler = net["head"].run(*command, "scheduler", "--host", net["head"].address, "--port", 8786, "--no-dashboard")
    scheduler.until("Scheduler at:")
    words = ("--nworkers", 1, "--nthreads", 2, "--no-dashboard", "--memory-limit", 0)
    started = [net[name].run(*command, "worker", address, "--name", name, *words) for name in WORKERS]
    for one in started:
        one.until("Registered to:")
    return address


def test_a_search_on_dask_survives_its_hosts(tmp_path: Path, postgres: Postgres, s3: S3, prefect_url: str) -> None:
    wanted()
    with story_of("dask", tmp_path, postgres, s3, prefect_url, cluster) as story:
        told(story, revive=lambda: None)
