"""Tensors of PyTorch as one file in the safetensors format, and back, without pickle and without that library.

PyTorch is imported here by nobody who saves: a state with tensors in it has done that. The format is: 8 bytes, the length
of the header as a little-endian number; the header, JSON of ``{name: {dtype, shape, data_offsets}}``; and the tensors'
bytes without gaps, at those offsets behind the header. Wide dtypes come first, so that every tensor is aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.core.errors import MissingLibrary
from holdfast.storage.checkpoints.files import Sink, Source
from holdfast.storage.checkpoints.manifest import FileEntry

TENSORS = "tensors.safetensors"
ALIGN = 64  # of the first tensor
_LONGEST_NAME = 500
_LONGEST_HEADER = 100 << 20  # the library reads no longer one

_DTYPES = {  # by their names in the format: bytes of an element, name in torch
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
    "C64": (8, "complex64"),
    "F32": (4, "float32"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
}
_NAMES = {f"torch.{name}": code for code, (_, name) in _DTYPES.items()}
_PAIRS = {"torch.complex128": "F64", "torch.complex32": "F16"}  # the format lacks them: stored as pairs of these
_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter"}


class Unfit(Exception):
    """A tensor that the format has no place for; the text names what it is."""


class TensorWriter:
    """The tensors of one state: what is met is named, and all of it is written at the end."""

    def __init__(self, *, copy: bool) -> None:
        self._copy = copy
        self._names: dict[Any, str] = {}
        self._taken = {"__metadata__"}
        self._tensors: list[tuple[str, str, list[int], int, Callable[[], memoryview]]] = []

    def add(self, tensor: Any, path: list[object]) -> list[str]:
        """Take ``tensor`` in; return the name that it gets, and its dtype where the format has none such.

        The same view of the same memory is stored once. Raises Unfit.
        """
        kind = type(tensor)
        if f"{kind.__module__}.{kind.__qualname__}" not in _CLASSES:
            raise Unfit(f"{kind.__module__}.{kind.__qualname__}")
        dtype, layout = str(tensor.dtype), str(tensor.layout)
        code = _NAMES.get(dtype) or _PAIRS.get(dtype)
        if layout != "torch.strided" or code is None or tensor.device.type == "meta":
            raise Unfit(f"torch tensor of dtype {dtype}, layout {layout}, on {tensor.device}")
        note = [dtype.removeprefix("torch.")] if dtype in _PAIRS else []
        try:
            plain, seen = self._plain(tensor, paired=bool(note))
        except (RuntimeError, NotImplementedError) as error:  # torch wraps tensors in many ways
            raise Unfit(f"torch tensor whose values cannot be read ({error})") from error
        if seen is None or seen not in self._names:
            name = self._name(path)
            shape = [*tensor.shape, 2] if note else list(tensor.shape)
            size = math.prod(shape) * _DTYPES[code][0]
            if self._copy:
                memory = _copied(_bytes_of(plain), size)
                self._tensors.append((name, code, shape, size, lambda: memory))
            else:
                self._tensors.append((name, code, shape, size, lambda: _bytes_of(plain)))
            if seen is None:
                return [name, *note]
            self._names[seen] = name
        return [self._names[seen], *note]

    def _plain(self, tensor: Any, *, paired: bool) -> tuple[Any, Any]:
        """Return the tensor without its history, and what tells this view from others, or None for one without memory."""
        plain = tensor.detach()
        bits = (plain.is_conj(), plain.is_neg())
        seen = (str(plain.device), plain.data_ptr(), str(plain.dtype), tuple(plain.shape), plain.stride(), bits)
        plain = plain.resolve_conj().resolve_neg()
        if paired:
            import torch

            plain = torch.view_as_real(plain)
        return plain, seen if plain.numel() else None

    def _name(self, path: list[object]) -> str:
        """Return a name like ``model.0.weight`` that no other tensor of the state has."""
        parts = [str(key) if type(key) in (str, int, bool, float, type(None)) else type(key).__name__ for key in path]
        base = ".".join(parts)[:_LONGEST_NAME].encode("utf-8", "replace").decode() or "tensor"
        name, count = base, 1
        while name in self._taken:
            count += 1
            name = f"{base}~{count}"
        self._taken.add(name)
        return name

    def write(self, folder: Path) -> FileEntry:
        """Write the file, tensor after tensor; one on another device, or not contiguous, is copied when its turn comes."""
        ordered = sorted(self._tensors, key=lambda item: -_DTYPES[item[1]][0])
        header: dict[str, Any] = {}
        end = 0
        for name, code, shape, size, _ in ordered:
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)
        with Sink(folder, TENSORS) as sink:
            sink.write(len(text).to_bytes(8, "little") + text)
            for *_, memory in ordered:
                sink.write(memory())
        return sink.entry()


class TensorReader:
    """The tensors of a checkpoint, by name. ValueError when the file is no such file, MissingLibrary without PyTorch."""

    def __init__(self, source: Source, *, mapped: bool) -> None:
        self._torch = _import(source)
        self._tensors: dict[str, Any] = {}
        memory = source.map() if mapped else None
        self._read(source, memory)

    def take(self, name: str, dtype: str | None = None) -> Any:
        """Return the tensor ``name``, as ``dtype`` where the format has none such. ValueError when there is none."""
        if name not in self._tensors:
            raise ValueError(f"there is no tensor {name!r}")
        if dtype is None:
            return self._tensors[name]
        pairs = self._tensors[name]
        if f"torch.{dtype}" not in _PAIRS or not pairs.is_floating_point() or pairs.shape[-1:] != (2,):
            raise ValueError(f"tensor {name!r} of dtype {dtype!r}")
        return self._torch.view_as_complex(pairs)

    def _read(self, source: Source, memory: memoryview | None) -> None:
        def part(start: int, count: int) -> memoryview:
            if memory is not None:
                return memory[start : start + count]
            data = memoryview(bytearray(count))
            source.readinto(data)
            return data

        if source.size < 8:
            raise ValueError("it is too short")
        length = int.from_bytes(part(0, 8), "little")
        if length > min(source.size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header is said to have {length} bytes")
        header = json.loads(bytes(part(8, length)))
        header.pop("__metadata__", None)
        start, views = 8 + length, []
        for name, described in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            code, shape, (begin, end) = described["dtype"], described["shape"], described["data_offsets"]
            if code not in _DTYPES or any(type(count) is not int or count < 0 for count in shape):
                raise ValueError(f"tensor {name!r} has the dtype {code!r} and the shape {shape!r}")
            if 8 + length + begin != start or end - begin != math.prod(shape) * _DTYPES[code][0] or end > source.size:
                raise ValueError(f"tensor {name!r} does not stand where it is said to stand")
            start += end - begin
            view = memory[8 + length + begin : start] if memory is not None else None
            self._tensors[name], view = self._tensor(code, shape, end - begin, view)
            views.append(view)
        if start != source.size:
            raise ValueError(f"its tensors end at byte {start}, it has {source.size}")
        if memory is None:
            source.readinto(*views)

    def _tensor(self, code: str, shape: list[int], size: int, view: memoryview | None) -> tuple[Any, memoryview]:
        """Return a tensor, over ``view`` where it is given, and the memory that it is to be filled through."""
        torch, name = self._torch, _DTYPES[code][1]
        dtype = getattr(torch, name, None)
        if dtype is None:
            raise MissingLibrary(
                f"this checkpoint holds tensors of dtype {name}, which PyTorch {torch.__version__} lacks: update it"
            )
        if not size:
            return torch.empty(shape, dtype=dtype), memoryview(bytearray())
        if view is None:
            plain = torch.from_numpy(_fresh(size))
            view = memoryview(plain.numpy())
        else:
            plain = torch.frombuffer(view, dtype=torch.uint8)
        return plain.view(dtype).reshape(shape), view


def _import(source: Source) -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingLibrary(
            f"{source.path} holds tensors, and PyTorch cannot be imported here ({error}): install it with `pip install torch`"
        ) from error
    return torch


def _bytes_of(plain: Any) -> memoryview:
    """Return the values in order, on the CPU; without a copy where they stand so already."""
    import torch

    flat = plain.cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(bytearray())
    return memoryview(flat.view(torch.uint8).numpy())


def _fresh(size: int) -> Any:
    import numpy as np

    return np.empty(size, np.uint8)


def _copied(view: memoryview, size: int) -> memoryview:
    import numpy as np

    fresh = _fresh(size)
    if size:
        np.copyto(fresh, np.frombuffer(view, np.uint8))
    return memoryview(fresh)
