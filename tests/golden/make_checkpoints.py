"""Write the golden checkpoints of the present format: ``python tests/golden/make_checkpoints.py`` makes ``checkpoints/N``.

Run it once for each version of the format, with the program that wrote that version (and PyTorch installed from format 2 on),
and keep the folder for good: the tests load what every version left behind. A folder that exists is never written again.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.storage.checkpoints import local
from holdfast.storage.checkpoints.manifest import FORMAT, Manifest
from holdfast.storage.checkpoints.serializers import ingest_directory, write_state

FOLDER = Path(__file__).parent / "checkpoints"
TRIAL, ATTEMPT = 7, 2
METRICS = {"loss": 0.125, "worst": float("inf"), "name": "süß 蜂蜜", "nested": {"list": [1, None, True]}}
INFO = {"epoch": 3, "note": "süß"}
RUN_CONFIG = {"lr": 0.25, "layers": [1, 2]}
FILES = {"model.bin": bytes(range(256)), "sub/empty": b"", "sub/file": b"x"}


def plain() -> dict[Any, Any]:
    """Return a small state with every kind of value that format 1 knows."""
    return {
        "none": None,
        "numbers": [True, 3, -(2**70), 10**1300, 0.1, -0.0, float("inf"), 1 + 2j],
        "texts": ["süß", "\udcff", "$dict", b"\x00\xff"],
        "tuple": (1, (2, [3])),
        3: {"$dict": 1, None: 2, (1, "a"): 3, False: 4},
        "scalars": [np.float32(0.1), np.uint8(7), np.str_("a"), np.bytes_(b"b\0"), np.datetime64("2026-01-01")],
        "arrays": [
            np.arange(6, dtype="<f8").reshape(2, 3),
            np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
            np.array(["a", "üü"]),
            np.array(3.5),
            np.zeros((0, 3)),
            np.array([1.5, np.nan], dtype=np.float16),
        ],
    }


def large() -> dict[str, Any]:
    """Return a state whose buffers stand in a file of their own."""
    return {
        "weights": (np.arange(9000) % 7).astype("<f8").reshape(90, 100),
        "odd": np.arange(1001, dtype=np.uint8),
        "bytes": b"\x01" * 65,
        "order": np.asfortranarray((np.arange(1200) % 5).astype("<f4").reshape(30, 40)),
        "small": [np.bool_(True), 1.5],
    }


def dicts() -> dict[str, Any]:
    """Return what format 2 added for states without tensors."""
    ordered: OrderedDict[Any, Any] = OrderedDict([("b", np.arange(3.0)), ("a", 1), (0, None)])
    vars(ordered)["_metadata"] = OrderedDict([("", {"version": 1})])
    return {"ordered": ordered, "counter": Counter({1: 2, "x": 1})}


def tensors(torch: Any) -> dict[str, Any]:
    """Return what format 2 added for states with tensors."""
    return {
        "model": OrderedDict([("weight", (torch.arange(600.0) % 11).reshape(20, 30)), ("steps", torch.tensor(3))]),
        "small": [torch.tensor([1.5, -2.0], dtype=torch.bfloat16), torch.tensor([True, False]), torch.zeros(0, 2)],
        "complex": torch.tensor([1 + 2j], dtype=torch.complex128),
        "array": np.arange(4),
    }


def main() -> None:
    """Write the golden checkpoints of this program's format."""
    root = FOLDER / str(FORMAT)
    if root.exists():
        sys.exit(f"{root} exists: a golden folder is never written again")
    local.secrets.token_hex = lambda _: "9c01d2ab"  # type: ignore[attr-defined,assignment]  # the same names each time
    store = local.LocalCheckpoints(root)
    for step, (kind, state) in enumerate(contents()):
        staged = store.stage(TRIAL, ATTEMPT, step)
        entries = ingest_directory(state, staged) if kind == "directory" else write_state(state, staged, serializer=kind)
        more = {"info": INFO, "run_config": RUN_CONFIG} if "info" in {field.name for field in fields(Manifest)} else {}
        manifest = Manifest(
            experiment="6e3ff0a2-0c51-4f57-a8fd-4d4bb1a9ab1c",
            trial=TRIAL,
            attempt=ATTEMPT,
            step=step,
            writer="host:1",
            created="2026-01-01T00:00:00+00:00",
            serializer=kind,
            metrics=METRICS,
            files=tuple(entries),
            beside={"reports": [[step, {"loss": 0.125}]]},
            **more,  # type: ignore[arg-type]
        )
        print(store.publish(staged, manifest))


def contents() -> Iterator[tuple[Any, Any]]:
    """Yield the serializer and the state of each step."""
    yield "safe", plain()
    yield "safe", large()
    with tempfile.TemporaryDirectory() as name:
        for file, data in FILES.items():
            (Path(name) / file).parent.mkdir(exist_ok=True)
            (Path(name) / file).write_bytes(data)
        yield "directory", Path(name)
    yield "cloudpickle", {"pair": (1, {2})}
    if FORMAT > 1:
        import torch

        yield "safe", dicts()
        yield "safe", tensors(torch)


if __name__ == "__main__":
    main()
