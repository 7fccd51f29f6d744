"""The safe serializer: nested plain values, bytes, numpy arrays and tensors as JSON and raw buffers, without pickle.

What JSON has not is an object with one key that begins with ``$``; a dict that has such a key itself, or keys that are
no strings, is written as ``{"$dict": [[key, value], ...]}``. The order of keys is kept, because training code iterates.
Arrays and bytes stand as numbered buffers beside the structure, in the order in which they are met; tensors of PyTorch
stand by name in a file of their own. Everything but tensors comes back exactly; a tensor comes back with its values, dtype
and shape, on the CPU and requiring no gradient.
"""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol

from holdfast.core.errors import NotStorable
from holdfast.core.values import Json

if TYPE_CHECKING:
    from holdfast.storage.checkpoints.tensors import TensorReader, TensorWriter

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
        """Copy buffer ``index`` into ``view``, now or at the end; ValueError when it is not the next, or of another size."""
        ...

    def map(self, index: int, size: int) -> memoryview | None:
        """Return buffer ``index`` where it stands in mapped memory, to be kept; None where it has to be copied."""
        ...


class Piece:
    """A buffer of ``size`` bytes: there already, or copied when it is asked for."""

    __slots__ = ("_memory", "size")

    def __init__(self, size: int, memory: bytes | memoryview | Callable[[], memoryview]) -> None:
        self.size = size
        self._memory = memory

    def memory(self) -> bytes | memoryview:
        """Return the bytes."""
        return self._memory() if callable(self._memory) else self._memory


class _Attribute(str):
    """The name of an attribute, within a path."""

    __slots__ = ()


def class_name(value: object) -> str:
    """Return the qualified name of ``value``'s class, by its public module where that has it."""
    kind = type(value)
    parts = kind.__module__.split(".")
    public = ".".join(parts[: next((at for at, part in enumerate(parts) if part.startswith("_")), len(parts))])
    module = public if getattr(sys.modules.get(public), kind.__qualname__, None) is kind else kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


class Encoder:
    """Turn a state into JSON values, buffers and tensors; NotStorable, naming the path inside it, for what has no form.

    With ``copy`` they are copies.
    """

    def __init__(self, *, copy: bool = False) -> None:
        self.buffers: list[Piece] = []
        self.tensors: TensorWriter | None = None
        self._copy = copy
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
            return {"$bytes": self._buffer(Piece(len(value), value))}
        if isinstance(value, complex) and kind is complex:
            return {"$complex": [self.encode(value.real), self.encode(value.imag)]}
        if isinstance(value, dict) and kind in _DICTS:
            return {_DICTS[kind]: self._ordered(value)}
        library = kind.__module__.partition(".")[0]
        if library == "numpy":
            return self._numpy(value)
        if library == "torch" and hasattr(value, "data_ptr"):
            return self._tensor(value)
        raise self._refusal(class_name(value) + _advice(kind))

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

    def _ordered(self, values: dict[Any, Any]) -> Json:
        """Return the pairs, and the attributes where there are any: a module's state has its versions there."""
        found = self._dict(values)
        content: list[Any] = [list(map(list, found.items())) if "$dict" not in found else found["$dict"]]
        if attributes := vars(values):
            content.append({})
            for name, value in attributes.items():
                self._path.append(_Attribute(name))
                content[1][name] = self.encode(value)
                self._path.pop()
        return content

    def _tensor(self, value: Any) -> Json:
        from holdfast.storage.checkpoints.tensors import TensorWriter, Unfit

        if self.tensors is None:
            self.tensors = TensorWriter(copy=self._copy)
        try:
            return {"$tensor": self.tensors.add(value, self._path)}
        except Unfit as error:
            raise self._refusal(str(error)) from error

    def _dict(self, values: dict[Any, Any]) -> Any:
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

    def _buffer(self, piece: Piece) -> int:
        self.buffers.append(piece)
        return len(self.buffers) - 1

    def _numpy(self, value: Any) -> Json:
        import numpy as np

        if isinstance(value, np.str_ | np.bytes_):  # by way of an array, or of str(), they would lose trailing zeros
            plain = str.__str__(value) if isinstance(value, np.str_) else bytes.__getitem__(value, slice(None))
            return {"$scalar": [value.dtype.kind, self.encode(plain)]}
        if not isinstance(value, np.generic) and type(value) not in (np.ndarray, np.memmap):
            raise self._refusal(class_name(value))  # a masked array has more than its values
        dtype = value.dtype
        if dtype.kind not in _KINDS or dtype.names or np.dtype(dtype.str) != dtype:
            raise self._refusal(f"numpy {'array' if value.ndim else 'value'} of dtype {dtype}")
        if isinstance(value, np.generic):
            return {"$scalar": [dtype.str, base64.b64encode(value.tobytes()).decode()]}
        array = np.asarray(value)
        order: Literal["C", "F"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        if self._copy:
            array = np.array(array, order=order, copy=True)  # from numpy's memory, which is quicker to get than bytes()
        ready = array.flags.c_contiguous or array.flags.f_contiguous
        piece = Piece(array.nbytes, _flat(array, order) if ready else lambda: _flat(array, order))
        return {"$array": [self._buffer(piece), dtype.str, list(array.shape), order]}

    def _refusal(self, what: str) -> NotStorable:
        path = "state" + "".join(map(subscript, self._path))
        path = path if len(path) <= 200 else path[:200] + "..."
        return NotStorable(
            f"{path}: {what}; the safe serializer stores None, bool, int, float, complex, str, bytes, list, tuple, dict,"
            " OrderedDict, Counter, numpy arrays and scalars of plain dtypes, and tensors of PyTorch."
            " With checkpoints.serializer: cloudpickle it can be stored"
        )


_DICTS: dict[type, str] = {OrderedDict: "$ordered", Counter: "$counter"}


def _advice(kind: type) -> str:
    """Return what a value of this class can be stored as, where it says so itself."""
    if hasattr(kind, "state_dict"):
        return " (its state_dict() may be)"
    return " (numpy.asarray of it may be)" if hasattr(kind, "__array__") else ""


def subscript(key: object) -> str:
    """Return how a key, an index or an attribute is written behind the path of what holds it."""
    if isinstance(key, _Attribute):
        return f".{key}"
    if isinstance(key, str):
        return f'["{key}"]'
    if isinstance(key, bytes) or key is None or (isinstance(key, int) and -_BIG < key < _BIG):
        return f"[{key!r}]"
    return f"[{class_name(key)}]"  # a repr may be the user's code


def parts(value: object) -> Iterator[tuple[str, Any]]:
    """Yield what ``value`` holds, each with how it is written behind the path of ``value``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield subscript(key), item
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield subscript(index), item
    if not isinstance(value, type):  # a class is one thing
        for name, item in getattr(value, "__dict__", {}).items():
            yield subscript(_Attribute(name)), item


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

    def __init__(self, buffers: Buffers, tensors: TensorReader | None = None) -> None:
        self._buffers = buffers
        self._tensors = tensors

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
            case "$ordered":
                return self._ordered(OrderedDict(), *content)
            case "$counter":
                return self._ordered(Counter(), *content)
            case "$tensor" if self._tensors is not None:
                return self._tensors.take(*content)
            case "$complex":
                real, imag = content
                return complex(self.decode(real), self.decode(imag))
            case "$scalar":
                return self._scalar(*content)
            case "$array":
                return self._array(*content)
        raise ValueError(f"unknown form {tag!r}")

    def _ordered(self, result: Any, pairs: Any, attributes: Any = None) -> Any:
        for key, item in pairs:
            name = self.decode(key)  # first: buffers come back in the order in which they were met
            result[name] = self.decode(item)
        if attributes is not None:
            vars(result).update((name, self.decode(item)) for name, item in attributes.items())
        return result

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
        size = math.prod(shape) * dtype.itemsize
        if size and (mapped := self._buffers.map(index, size)) is not None:
            return np.ndarray(tuple(shape), dtype=dtype, buffer=mapped, order="F" if order == "F" else "C")
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
