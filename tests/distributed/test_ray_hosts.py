"""A search on a Ray cluster of two hosts, during which a host is cut off, a worker dies, and the driver."""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from s3_server import S3
from support_hosts import Network, Process, wanted
from support_postgres import Postgres
from support_story import WORKERS, story_of, told

pytestmark = [
    pytest.mark.timeout(1800),  # it waits for many things, and for leases to run out twice
    pytest.mark.xdist_group("ray-hosts"),
    pytest.mark.skipif(find_spec("ray") is None, reason="the package ray is missing"),
]

RAY = Path(sys.executable).with_name("ray")
BYTES = 80 << 20
STARTED = "Ray runtime started"


def start(net: Network, name: str, *words: object) -> Process:
    """Start Ray's processes of a host; the command itself stays, and ends with them."""
    host = net[name]
    common = (f"--node-ip-address={host.address}", f"--object-store-memory={BYTES}", "--disable-usage-stats", "--block")
    return host.run(RAY, "start", *words, *common)


def cluster(net: Network, folder: str) -> str:
    head = net["head"].address
    for host in net.hosts.values():
        host.environment["RAY_TMPDIR"] = folder
    words = ("--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", "--ray-client-server-port=10001")
    start(net, "head", *words).until(STARTED)
    for node in [start(net, name, f"--address={head}:6379", "--num-cpus=2") for name in WORKERS]:
        node.until(STARTED)
    return f"ray://{head}:10001"


def test_a_search_on_ray_survives_its_hosts(tmp_path: Path, postgres: Postgres, s3: S3, prefect_url: str) -> None:
    wanted()
    # A folder of its own: Ray notes there which cluster is the machine's. The paths of its sockets have to be short.
    with (
        tempfile.TemporaryDirectory(prefix="hf-ray-", ignore_cleanup_errors=True) as folder,
        story_of("ray", tmp_path, postgres, s3, prefect_url, lambda net: cluster(net, folder)) as story,
    ):

        def revive() -> None:
            """Start a node anew: Ray gives a host up that it does not hear, and its processes end when they learn of it."""
            start(story.net, "right", f"--address={story.net['head'].address}:6379", "--num-cpus=2").until(STARTED)

        try:
            told(story, revive=revive)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{clients_said(Path(folder))}") from None


def clients_said(folder: Path) -> str:
    """Return what the processes wrote that Ray's head starts for clients: it tells them only the names of its files."""
    files = sorted(folder.glob("**/session_2*/logs/ray_client_server*"))
    return "\n".join(f"{file}:\n{file.read_text(errors='replace')[-2000:]}" for file in files)
