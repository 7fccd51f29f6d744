"""Tensors of PyTorch: stored without pickle, readable by the safetensors library, and back with their values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.core.errors import CheckpointCorrupt, MissingLibrary, NotStorable
from holdfast.storage.checkpoints.files import Sink
from holdfast.storage.checkpoints.manifest import FileEntry, Manifest
from holdfast.storage.checkpoints.serializers import prepare, read_state, write_state

FILE = "tensors.safetensors"


def manifest(entries: list[FileEntry]) -> Manifest:
    return Manifest(
        experiment="e", trial=0, attempt=1, step=0, writer="w", created="c", serializer="safe", files=tuple(entries)
    )


def through(state: object, folder: Path, *, mmap: bool = False) -> Any:
    folder = folder / f"{len(os.listdir(folder)):05d}"
    folder.mkdir()
    return read_state(folder, manifest(write_state(state, folder, serializer="safe")), mmap=mmap)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


FLOATS = ["float64", "float32", "float16", "bfloat16", "complex64", "complex128", "complex32"]
SMALL = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "bool"]
INTEGERS = ["int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"]
DTYPES = FLOATS + SMALL + INTEGERS


def bits(torch: Any, tensor: Any) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def random(torch: Any, dtype: str, *shape: int) -> Any:
    """Return a tensor of random bits: signalling NaNs and denormals too."""
    kind = getattr(torch, dtype)
    if dtype == "bool":
        return torch.randint(0, 2, shape).to(torch.bool)
    data = torch.randint(0, 256, (*shape, kind.itemsize), dtype=torch.uint8)
    return data.view(kind).reshape(shape)


def same(torch: Any, one: Any, two: Any) -> bool:
    return (type(two), one.dtype, one.shape, bits(torch, one)) == (torch.Tensor, two.dtype, two.shape, bits(torch, two))


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_to_the_bit(torch: Any, dtype: str, mmap: bool, tmp_path: Path) -> None:
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    tensors = [random(torch, dtype, *shape) for shape in ((3, 5), (1,), (), (0, 4), (700, 100))]
    state = {"first": random(torch, "uint8", 3), "many": tensors, "array": np.arange(20_000)}
    back = through(state, tmp_path, mmap=mmap)
    for one, two in zip(tensors, back["many"], strict=True):
        assert same(torch, one, two)
        two.zero_()  # it may be changed
    assert same(torch, state["first"], back["first"])


def test_the_safetensors_library_reads_the_file(torch: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    known = [name for name in DTYPES if name not in ("complex128", "complex32", "float8_e4m3fnuz", "float8_e5m2fnuz")]
    state = {"model": OrderedDict((f"{name}.weight", random(torch, name, 3, 7)) for name in known), "opt": {0: torch.ones(2)}}
    write_state(state, tmp_path, serializer="safe")
    found = library.load_file(tmp_path / FILE)
    assert sorted(found) == sorted([*(f"model.{name}.weight" for name in known), "opt.0"])
    for name in known:
        assert same(torch, state["model"][f"{name}.weight"], found[f"model.{name}.weight"])
    with pytest.importorskip("safetensors").safe_open(tmp_path / FILE, framework="numpy") as opened:
        assert opened.get_tensor("model.int64.weight").shape == (3, 7)


def test_every_tensor_is_aligned(torch: Any, tmp_path: Path) -> None:
    state = [torch.ones(3, dtype=torch.int8), torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float16)]
    write_state(state, tmp_path, serializer="safe")
    data = (tmp_path / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 64 == 0
    assert [header[name]["data_offsets"] for name in ("1", "2", "0")] == [[0, 24], [24, 30], [30, 33]]


def test_a_training_goes_on_from_its_state(torch: Any, tmp_path: Path) -> None:
    def build() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(300, 90), torch.nn.BatchNorm1d(90), torch.nn.ReLU(), torch.nn.Linear(90, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])

    def steps(made: tuple[Any, Any, Any], first: int, last: int) -> None:
        model, optimizer, schedule = made
        for step in range(first, last):
            torch.manual_seed(100 + step)
            optimizer.zero_grad()
            model(torch.randn(16, 300)).square().mean().backward()
            optimizer.step()
            schedule.step()

    def state(made: tuple[Any, Any, Any]) -> Any:
        names = ("model", "optimizer", "schedule")
        return {name: part.state_dict() for name, part in zip(names, made, strict=True)} | {"rng": torch.get_rng_state()}

    whole, half = build(), build()
    steps(whole, 0, 6)
    steps(half, 0, 3)
    saved = state(half)
    back = through(saved, tmp_path)
    assert type(back["model"]) is OrderedDict
    assert list(back["model"]) == list(saved["model"])
    assert back["model"]._metadata == saved["model"]._metadata
    assert type(back["model"]._metadata) is OrderedDict
    assert type(back["schedule"]["milestones"]) is Counter
    assert back["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    assert list(back["optimizer"]["state"]) == [0, 1, 2, 3, 4, 5]
    resumed = build()
    for part, name in zip(resumed, ("model", "optimizer", "schedule"), strict=True):
        part.load_state_dict(back[name])
    torch.set_rng_state(back["rng"])
    steps(resumed, 3, 6)
    for name, tensor in whole[0].state_dict().items():
        assert same(torch, tensor, resumed[0].state_dict()[name])


def test_views_are_stored_as_they_look(torch: Any, tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = [
        base.T,
        base[:, 1],
        base[1:3, ::2],
        base.expand(2, 4, 6),
        base[0, 0],
        torch.view_as_complex(base.view(4, 3, 2)).conj(),
    ]
    for view, back in zip(views, through(views, tmp_path), strict=True):
        assert same(torch, view.resolve_conj(), back)
        assert back.is_contiguous()


def test_a_tensor_that_stands_twice_is_stored_once(torch: Any, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(100, 100))
    back = through({"embed": weight, "head": weight, "alike": weight.detach().clone()}, tmp_path)
    assert back["embed"] is back["head"]
    assert back["alike"].data_ptr() != back["head"].data_ptr()
    assert (tmp_path / "00000" / FILE).stat().st_size < 2 * 40_000 + 1000
    assert type(back["embed"]) is torch.Tensor
    assert not back["embed"].requires_grad


def test_names_never_clash(torch: Any, tmp_path: Path) -> None:
    state = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "__metadata__": torch.tensor(3), "\udcff": torch.tensor(4)}
    state |= {"?": torch.tensor(5), (1,): torch.tensor(6), "": torch.tensor(7), "x" * 9999: torch.tensor(8)}
    assert through(state, tmp_path) == state
    assert through(torch.tensor(9), tmp_path) == torch.tensor(9)


def test_a_copy_is_not_changed_any_more(torch: Any, tmp_path: Path) -> None:
    state = {
        "t": torch.ones(1000),
        "v": torch.ones(10, 10).T,
        "a": np.ones(20_000),
        "f": np.ones((300, 90)).T,
        "s": np.ones(99)[::2],
    }
    prepared = prepare(state, serializer="safe", copy=True)
    for value in state.values():
        value[:] = 5
    for value in read_state(tmp_path, manifest(prepared.write(tmp_path))).values():  # type: ignore[attr-defined]
        assert (value == 1).all()


def test_what_has_no_place_in_the_format_is_named(torch: Any, tmp_path: Path) -> None:
    class Own(torch.Tensor):  # type: ignore[misc]
        pass

    cases = [
        ({"m": {"w": torch.ones(2).to_sparse()}}, r'^state\["m"\]\["w"\]: torch tensor of dtype .* layout torch.sparse_coo'),
        ([torch.ones(2, device="meta")], r"^state\[0\]: torch tensor .* on meta"),
        ([torch.ones(2).as_subclass(Own)], r"^state\[0\]: .*Own \(numpy.asarray of it may be\); the safe"),
        (
            {"net": torch.nn.Linear(1, 1)},
            r'^state\["net"\]: torch.nn.modules.linear.Linear \(its state_dict\(\) may be\); the safe',
        ),
        ([torch.Size([1])], r"^state\[0\]: torch.Size;"),
        ({"d": torch.float32}, r'^state\["d"\]: torch.dtype;'),
        ({"g": torch.Generator()}, r'^state\["g"\]: torch.*Generator;'),
        ([torch.zeros(2, dtype=torch.uint8).view(torch.bits8)], r"^state\[0\]: torch tensor of dtype torch.bits8"),
    ]
    for state, message in cases:
        with pytest.raises(NotStorable, match=message):
            write_state(state, tmp_path, serializer="safe")
        assert list(tmp_path.iterdir()) == []


def test_no_flipped_bit_and_no_cut_gets_past(torch: Any, tmp_path: Path) -> None:
    entries = write_state({"a": torch.arange(5), "b": torch.ones(3, dtype=torch.bfloat16)}, tmp_path, serializer="safe")
    data = (tmp_path / FILE).read_bytes()
    for mmap in (False, True):
        for bit in range(len(data) * 8):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            (tmp_path / FILE).write_bytes(changed)
            with pytest.raises(CheckpointCorrupt, match=FILE):
                read_state(tmp_path, manifest(entries), mmap=mmap)
        for end in range(0, len(data), 7):
            (tmp_path / FILE).write_bytes(data[:end])
            with pytest.raises(CheckpointCorrupt, match=FILE):
                read_state(tmp_path, manifest(entries), mmap=mmap)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1 << 60, 1 << 60, 2, 0], "data_offsets": [0, 8]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32"}},
        {"a": None},
        [],
        {},
    ],
)
def test_nonsense_with_valid_digests_is_refused(torch: Any, header: object, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    with Sink(tmp_path, FILE) as tensors:
        tensors.write(len(text).to_bytes(8, "little") + text + bytes(8))
    with Sink(tmp_path, "state.json") as state:
        state.write(b'{"format":2,"state":{"$tensor":["a"]},"inline":[]}')
    for mmap in (False, True):
        with pytest.raises(CheckpointCorrupt, match=FILE):
            read_state(tmp_path, manifest([state.entry(), tensors.entry()]), mmap=mmap)


@pytest.mark.parametrize("content", [["b"], ["a", "complex128"], ["a", "float64"], [], "a", ["a", "complex128", 1]])
def test_a_state_that_names_no_tensor_is_refused(torch: Any, content: object, tmp_path: Path) -> None:
    entries = write_state([torch.ones(2)], tmp_path, serializer="safe")
    (tmp_path / "state.json").unlink()
    with Sink(tmp_path, "state.json") as state:
        state.write(json.dumps({"format": 2, "state": {"$tensor": content}, "inline": []}).encode())
    with pytest.raises(CheckpointCorrupt, match=r"state\.json"):
        read_state(tmp_path, manifest([state.entry(), *entries[1:]]))


def test_without_torch_the_error_says_what_to_install(tmp_path: Path) -> None:
    """Nothing is damaged, so no older checkpoint may be taken instead: the error is not one of damage."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    with Sink(tmp_path, FILE) as tensors:
        tensors.write(len(header).to_bytes(8, "little") + header + bytes(8))
    with Sink(tmp_path, "state.json") as state:
        state.write(b'{"format":2,"state":{"$tensor":["a"]},"inline":[]}')
    code = (
        "import sys; from pathlib import Path; sys.modules['torch'] = None\n"
        "from holdfast.core.errors import Corrupt\n"
        "from holdfast.storage.checkpoints.manifest import FileEntry, Manifest\n"
        "from holdfast.storage.checkpoints.serializers import read_state, verify_files\n"
        f"made = Manifest(experiment='e', trial=0, attempt=1, step=0, writer='w', created='c', serializer='safe', files=("
        f"FileEntry(**{vars(state.entry())}), FileEntry(**{vars(tensors.entry())})))\n"
        f"verify_files(Path({str(tmp_path)!r}), made)\n"
        "try:\n"
        f"    read_state(Path({str(tmp_path)!r}), made)\n"
        "except Corrupt: raise\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(MissingLibrary.__name__)
    assert "pip install torch" in done.stdout


def test_torch_is_not_imported_unless_a_tensor_is_there(torch: Any, tmp_path: Path) -> None:
    entries = write_state({"o": OrderedDict(a=np.ones(20_000))}, tmp_path, serializer="safe")
    code = (
        "import sys; from pathlib import Path\n"
        "from holdfast.storage.checkpoints.manifest import FileEntry, Manifest\n"
        "from holdfast.storage.checkpoints.serializers import read_state\n"
        f"files = tuple(FileEntry(**entry) for entry in {[vars(entry) for entry in entries]})\n"
        "made = Manifest(experiment='e', trial=0, attempt=1, step=0, writer='w', created='c', serializer='safe', files=files)\n"
        f"read_state(Path({str(tmp_path)!r}), made)\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
