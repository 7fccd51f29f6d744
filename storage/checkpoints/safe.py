"""The safe serializer: nested plain values, bytes and numpy arrays as JSON and raw buffers, exactly, without pickle.

What JSON has not is an object with one key that begins with ``$``; a dict that has such a key itself, or keys that are
no strings, is written as ``{"$dict": [[key, value], ...]}``. The order of keys is kept, because training code iterates.
Arrays and bytes stand as numbered buffers beside the structure, in the order in which they are met.
"""

from __future__ import annotations

import base64
import sys
from typing import Any, Protocol

from holdfast.core.errors import NotStorable
from holdfast.core.values import Json

MAX_DEPTH = 100  # within the interpreter's limit when loading too, wherever the caller stands
_KINDS = "biufcmMSUV"  # of numpy's dtypes: those whose bytes are their value
_NON_FINITE = {"nan", "inf", "-inf"}
_BIG = 1 << 4096  # longer ints exceed the interpreter's limit for decimal digits


class Buffers(Protocol):
    """Gives the buffers back, each once, in the order in which they were written."""

    def take(self, index: int) -> bytes:
        """Return buffer ``index``; ValueError when it is not the next."""
        ...

    def fill(self, index: int, view: memoryview) -> None:
        """Copy buffer ``index`` into ``view``; ValueError when it is not the next, or of another size."""
        ...


def class_name(value: object) -> str:
    """Return the qualified name of ``value``'s class, by its public module where that has it."""
    kind = type(value)
    parts = kind.__module__.split(".")
    public = ".".join(parts[: next((at for at, part in enumerate(parts) if part.startswith("_")), len(parts))])
    module = public if getattr(sys.modules.get(public), kind.__qualname__, None) is kind else kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


class Encoder:
    """Turn a state into JSON values and buffers; NotStorable, naming the path inside the state, for what has no form."""

    def __init__(self) -> None:
        self.buffers: list[bytes | memoryview] = []
        self._path: list[object] = []  # keys and indexes; written out only for a message

    def encode(self, value: object) -> Json:
        kind = type(value)
        if kind is float:
            return value if value - value == 0 else {"$float": str(value)}  # type: ignore[operator]  # a float
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if -_BIG < value < _BIG else {"$int": hex(value)}  # type: ignore[operator,arg-type]  # an int
        if isinstance(value, str) and kind is str:
            return _text(value)
        if len(self._path) > MAX_DEPTH:
            raise self._refusal("is nested too deeply, or holds itself")
        if isinstance(value, dict) and kind is dict:
            return self._dict(value)
        if isinstance(value, (list, tuple)) and kind in (list, tuple):
            items = self._items(value)
            return items if kind is list else {"$tuple": items}
        if isinstance(value, bytes) and kind is bytes:
            return {"$bytes": self._buffer(value)}
        if isinstance(value, complex) and kind is complex:
            return {"$complex": [self.encode(value.real), self.encode(value.imag)]}
        if kind.__module__.partition(".")[0] == "numpy":
            return self._numpy(value)
        raise self._refusal(class_name(value))

    def _items(self, values: list[Any] | tuple[Any, ...]) -> list[Json]:
        items: list[Json] = []
        for index, value in enumerate(values):
            if type(value) is float and value - value == 0:  # long lists of numbers are common
                items.append(value)
                continue
            self._path.append(index)
            items.append(self.encode(value))
            self._path.pop()
        return items

    def _dict(self, values: dict[Any, Any]) -> Json:
        pairs: list[list[Json]] = []
        raw = True
        for key, value in values.items():
            self._path.append(key)
            raw = raw and type(key) is str and not key.startswith("$")
            name = self.encode(key)
            raw = raw and type(name) is str
            pairs.append([name, self.encode(value)])
            self._path.pop()
        return dict(pairs) if raw else {"$dict": pairs}

    def _buffer(self, data: bytes | memoryview) -> int:
        self.buffers.append(data)
        return len(self.buffers) - 1

    def _numpy(self, value: Any) -> Json:
        import numpy as np

        if isinstance(value, np.str_ | np.bytes_):  # by way of an array they would lose trailing zeros
            plain = str(value) if isinstance(value, np.str_) else bytes(value)
            return {"$scalar": [value.dtype.kind, self.encode(plain)]}
        if not isinstance(value, np.generic) and type(value) not in (np.ndarray, np.memmap):
            raise self._refusal(class_name(value))  # a masked array has more than its values
        dtype = value.dtype
        if dtype.kind not in _KINDS or dtype.names or np.dtype(dtype.str) != dtype:
            raise self._refusal(f"numpy {'array' if value.ndim else 'value'} of dtype {dtype}")
        if isinstance(value, np.generic):
            return {"$scalar": [dtype.str, base64.b64encode(value.tobytes()).decode()]}
        array = np.asarray(value)
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        return {"$array": [self._buffer(_flat(array, order)), dtype.str, list(array.shape), order]}

    def _refusal(self, what: str) -> NotStorable:
        path = "state" + "".join(map(_subscript, self._path))
        path = path if len(path) <= 200 else path[:200] + "..."
        return NotStorable(
            f"{path}: {what}; the safe serializer stores None, bool, int, float, complex, str, bytes, list, tuple, dict, and"
            " numpy arrays and scalars of plain dtypes. With checkpoints.serializer: cloudpickle it can be stored"
        )


def _subscript(key: object) -> str:
    if isinstance(key, str):
        return f'["{key}"]'
    if isinstance(key, bytes) or key is None or (isinstance(key, int) and -_BIG < key < _BIG):
        return f"[{key!r}]"
    return f"[{class_name(key)}]"  # a repr may be the user's code


def _text(value: str) -> Json:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, of which JSON makes pairs
        return {"$str": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode()}
    return value


def _flat(array: Any, order: str) -> memoryview:
    """Return the memory of ``array`` without a copy, unless it is neither C nor Fortran contiguous."""
    import numpy as np

    if array.nbytes == 0:
        return memoryview(bytearray())
    flat = np.ascontiguousarray(array.T if order == "F" else array).reshape(-1)
    return memoryview(flat.view(np.uint8))  # type: ignore[arg-type]  # it is a buffer; numpy says so from 3.12 on


class Decoder:
    """Turn back what :class:`Encoder` made. ValueError, TypeError or KeyError for anything else; runs no code of it."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def decode(self, value: Json) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            tag = next(iter(value))
            if tag.startswith("$"):
                return self._tagged(tag, value[tag])
        return {key: self.decode(item) for key, item in value.items()}

    def _tagged(self, tag: str, content: Any) -> Any:
        match tag:
            case "$float" if content in _NON_FINITE:
                return float(content)
            case "$int":
                return int(content, 16)
            case "$str":
                return base64.b64decode(content, validate=True).decode("utf-8", "surrogatepass")
            case "$bytes":
                return self._buffers.take(content)
            case "$tuple":
                return tuple(self.decode(item) for item in content)
            case "$dict":
                return {self.decode(key): self.decode(item) for key, item in content}
            case "$complex":
                real, imag = content
                return complex(self.decode(real), self.decode(imag))
            case "$scalar":
                return self._scalar(*content)
            case "$array":
                return self._array(*content)
        raise ValueError(f"unknown form {tag!r}")

    def _scalar(self, name: str, content: Any) -> Any:
        import numpy as np

        if name in ("U", "S"):
            return np.str_(self.decode(content)) if name == "U" else np.bytes_(self.decode(content))
        dtype = _plain_dtype(name)
        return np.frombuffer(base64.b64decode(content, validate=True), dtype=dtype, count=1)[0]

    def _array(self, index: int, name: str, shape: list[int], order: str) -> Any:
        import numpy as np

        dtype = _plain_dtype(name)
        if order not in ("C", "F") or any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"array of shape {shape!r} and order {order!r}")
        array = np.ndarray(tuple(shape), dtype=dtype, order="F" if order == "F" else "C")
        self._buffers.fill(index, _flat(array, order))
        return array


def _plain_dtype(name: str) -> Any:
    """Return the dtype; ValueError unless its bytes are its value (an object dtype's would be pointers)."""
    import numpy as np

    dtype = np.dtype(name)
    if dtype.kind not in _KINDS or dtype.names or dtype.hasobject or dtype.str != name:
        raise ValueError(f"dtype {name!r}")
    return dtype
