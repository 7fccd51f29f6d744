"""A search on a Dask cluster of two hosts, during which a host is cut off, a worker dies, and the driver."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from s3_server import S3
from support_hosts import Network, Process, wanted
from support_postgres import Postgres
from support_story import WORKERS, story_of, told

pytestmark = [
    pytest.mark.timeout(1800),  # it waits for many things, and for leases to run out twice
    pytest.mark.xdist_group("dask-hosts"),
    pytest.mark.skipif(find_spec("distributed") is None, reason="the package distributed is missing"),
]


DASK = Path(sys.executable).with_name("dask")
JOINED = "Registered to:"


def worker(net: Network, name: str) -> Process:
    words = ("--nworkers", 1, "--nthreads", 2, "--no-dashboard", "--memory-limit", 0)
    return net[name].run(DASK, "worker", f"tcp://{net['head'].address}:8786", *words)


def cluster(net: Network) -> str:
    head = net["head"]
    head.run(DASK, "scheduler", "--host", head.address, "--port", 8786, "--no-dashboard").until("Scheduler at:")
    for one in [worker(net, name) for name in WORKERS]:
        one.until(JOINED)
    return f"tcp://{head.address}:8786"


def test_a_search_on_dask_survives_its_hosts(tmp_path: Path, postgres: Postgres, s3: S3, prefect_url: str) -> None:
    wanted()
    with story_of("dask", tmp_path, postgres, s3, prefect_url, cluster) as story:

        def revive() -> None:
            """Start the worker anew, as a service manager would: one that cannot reach its scheduler for 30 s ends."""
            worker(story.net, "right").until(JOINED)

        told(story, revive=revive)
