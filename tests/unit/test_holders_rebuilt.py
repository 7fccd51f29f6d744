"""Who drives, as it is told where the database is another one than its driver's: what the path says counts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from store_kit import create

import holdfast
from holdfast.cli import main
from holdfast.holding import holder
from holdfast.storage.folder import PathLease

FOREIGN = {"hostname": "elsewhere", "host": "elsewhere/boot", "pid": 4, "started": "then"}
GONE = {**holder(), "started": "long ago"}


@pytest.mark.parametrize(
    ("who", "seconds", "status", "words"),
    [
        (FOREIGN, 25.0, "running", "process 4 on elsewhere, epoch 3, for another "),
        (FOREIGN, -25.0, "interrupted", "nobody; the last drive was cut off: process 4 on elsewhere, epoch 3, fell silent"),
        (GONE, 25.0, "interrupted", "nobody; the last drive was cut off: process"),
        (None, 25.0, "interrupted", "nobody; the last drive was cut off\n"),
    ],
)
def test_a_database_that_was_rebuilt_does_not_hide_the_driver(
    tmp_path: Path, who: Any, seconds: float, status: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = create(tmp_path / "runs")
    now = time.time()
    lease = {"expires": now + seconds, "renewed": now, "database": "elsewhere", "uuid": opened.record.uuid, "token": "t"}
    with opened.folder.changing_lease() as file:
        file.write(PathLease(epoch=3, holder=who, **lease))  # type: ignore[arg-type]  # the values' types differ
    opened.close()
    path = opened.folder.path
    (tmp_path / "runs" / "holdfast.db").unlink()
    for _ in ("shown as the path tells it", "rebuilt"):
        assert main(["show", str(path)]) == 0
        assert words in capsys.readouterr().out
        assert main(["show", str(path), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["status"], shown["lease"]["driven"]) == (status, status == "running")
        with holdfast.open(path) as experiment:
            assert experiment.status == status
