"""The Prefect server that a run has of its own, where the settings name none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from support import PATIENCE, holdfast_environment

from holdfast.flows.server import EmbeddedServer, template_file
from holdfast.settings import settings

SAVED = """
from prefect.blocks.system import Secret
Secret(value="x").save("mine")
print(Secret.load("mine").get())
"""


def every(url: str, what: str) -> list[dict[str, Any]]:
    with urlopen(Request(f"{url}/{what}/filter", b"{}", {"Content-Type": "application/json"}), timeout=60) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


def test_the_first_one_makes_what_the_others_begin_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and block types, which Prefect makes at every start: what one run leaves is not there for the next one."""
    monkeypatch.setattr(settings(), "cache_folder", tmp_path / "cache")
    known: list[list[str]] = []
    for found in ("nothing", "a copy", "a spoilt one"):
        assert template_file().exists() is (found != "nothing")
        if found == "a spoilt one":
            template_file().write_bytes(b"")
        server = EmbeddedServer()
        server.begin()
        try:
            url = server.url()
            assert every(url, "block_documents") == []
            known.append(sorted(kind["slug"] for kind in every(url, "block_types")))
            environment = holdfast_environment(PREFECT_API_URL=url, PREFECT_HOME=str(tmp_path / "home"))
            done = subprocess.run(
                [sys.executable, "-c", SAVED], env=environment, capture_output=True, text=True, timeout=PATIENCE
            )
            assert done.stdout == "x\n", done.stderr
        finally:
            server.stop()
    assert known[0] == known[1] == known[2]
    assert {"local-file-system", "secret", "webhook"} <= set(known[0])
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [template_file().name]
