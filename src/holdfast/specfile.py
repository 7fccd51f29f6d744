"""The spec as a file: YAML, overrides from the command line, and paths that are relative to the file."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import PrivateAttr

from holdfast.callables import Function, spec_name
from holdfast.core import spec as core
from holdfast.core.errors import SpecError
from holdfast.core.spec import known_keys
from holdfast.core.spelling import nearest
from holdfast.references import is_reference

__all__ = ["ExperimentSpec", "apply_overrides", "without_options"]


class ExperimentSpec(core.ExperimentSpec):
    """One search, described in full; see :class:`holdfast.core.spec.ExperimentSpec` for the keys.

    Made in Python, its trainable may be the callable itself.
    """

    _function: Function | None = PrivateAttr(default=None)

    def __init__(self, **data: Any) -> None:
        function = data.get("trainable")
        if callable(function):
            data = {**data, "trainable": spec_name(function)}
        super().__init__(**data)
        self._function = function if callable(function) else None

    @property
    def function(self) -> Function | None:
        """The callable that the spec was made with, or None."""
        return self._function

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Self:
        """Read the YAML file ``path``, with ``overrides`` such as ``search.seed=1`` applied.

        A relative ``storage``, and a ``trainable`` or an ``engine`` that is a relative file, are taken from the file's folder.
        Raises SpecError, naming file, line, key and remedy.
        """
        return cls.from_text(_read(Path(path)), source=str(path), folder=Path(path).parent, overrides=overrides)

    @classmethod
    def from_text(
        cls,
        text: str,
        *,
        source: str = "spec",
        folder: str | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
    ) -> Self:
        """Read a spec from YAML; ``folder`` is what its relative paths are taken from (None: they stay as they are)."""
        node, data = _load(text, source)
        if data is None:
            raise SpecError(f"{source} is empty; it needs at least name, trainable, objectives and space")
        if not isinstance(data, dict):
            raise SpecError(f"{source} holds a {_kind(data)}; it must be a mapping of keys such as name: and trainable:")
        changed = apply_overrides(data, overrides, source)
        if folder is not None:
            _make_absolute(changed, Path(os.path.abspath(folder)))
        return cls.parse(changed, source=_locator(node, source, overrides))


def without_password(text: str) -> str:
    """Return the text of a spec's file as it may be kept: with ``***`` for the password of its database."""
    node, data = _load(text, "spec")
    database = data.get("database") if isinstance(data, dict) else None
    if not isinstance(database, str) or is_reference(database) or not isinstance(node, yaml.MappingNode):
        return text
    from holdfast.storage.database.engine import shown

    public = shown(database)
    if public == database:
        return text
    for key, value in reversed(node.value):
        if key.value == "database":
            start, end = value.start_mark.index, value.end_mark.index
            line = "\n" if text[start:end].endswith("\n") else ""  # a block ends with its line
            text = f"{text[:start]}{json.dumps(public, ensure_ascii=False)}{line}{text[end:]}"
    return text.replace(database, public)  # in a comment, perhaps


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str], source: str = "spec") -> dict[str, Any]:
    """Return ``data`` with each ``key.key=value`` set; ``data`` itself stays as it is.

    A value that begins with ``[``, ``{`` or a quote is YAML, any other one a YAML scalar. Raises SpecError for a
    malformed override and for a key that no spec has, naming the nearest one.
    """
    result = dict(data)
    for override in overrides:
        key, value = _split(override, source)
        _check_key(key, result, override, source)
        here = result
        for place, part in enumerate(key[:-1]):
            below = here.get(part)
            if below is not None and not isinstance(below, Mapping):
                parent = ".".join(key[: place + 1])
                raise SpecError(f"{source}: --set {override}: {parent} is no mapping, so it has no key {key[place + 1]!r}")
            here[part] = dict(below or {})
            here = here[part]
        here[key[-1]] = value
    return result


def space_in(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a space from a YAML file: the file's own parameters, or the ``space`` of a spec; SpecError when there is none."""
    data = _load(_read(Path(path)), str(path))[1]
    space = data.get("space") if isinstance(data, dict) else None
    if isinstance(space, dict) and not isinstance(space.get("type"), str):  # with a type it is a parameter of that name
        data = space
    if not isinstance(data, dict):
        raise SpecError(f"{path} holds a {_kind(data)}; it must be a space (parameters by name), or a spec with one")
    return data


def references_in(given: Sequence[str]) -> dict[str, Any] | None:
    """Return references from KEY=VALUE pairs and YAML files of such, the later ones over the earlier; None for nothing."""
    found: dict[str, Any] = {}
    for one in given:
        if "=" in one:
            data = apply_overrides({}, [f"references.{one}"], "--references")["references"]
        else:
            data = _load(_read(Path(one)), one)[1]
        if not isinstance(data, dict):
            raise SpecError(f"{one} holds a {_kind(data)}; references are a mapping of names to values")
        found |= data
    return found if given else None


def mapping_in(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Callable[[Sequence[int | str]], str]]:
    """Return what another YAML file says, read as strictly as a spec, and a function that says where a key stands."""
    node, data = _load(_read(Path(path)), str(path))
    if not isinstance(data, dict):
        raise SpecError(f"{path} holds a {_kind(data)}; it must be a mapping of keys")
    return data, _locator(node, str(path), ())


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise SpecError(f"{path}: there is no such file{_similar(path)}") from None
    except IsADirectoryError:
        inside = _specs_in(path)
        hint = f", such as {path / inside[0]}" if inside else ""
        raise SpecError(f"{path} is a folder; name the spec file in it{hint}") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _specs_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        return []


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f", and no folder {path.parent}"
    candidates = _specs_in(path.parent)
    near = difflib.get_close_matches(path.name, candidates, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?"
    return f"; specs in that folder: {', '.join(candidates[:5]) or 'none'}"


class _Loader(yaml.SafeLoader):
    """Plain YAML 1.2 scalars: 1e-4 is a number, only true and false are booleans, dates are strings; no key twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # the base class has it so

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                line = first.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands here again (first in line {line}); keep one", key.start_mark
                )
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = node.value
        sign, digits = (-1 if text.startswith("-") else 1), text.lstrip("+-")
        return sign * int(digits, {"0o": 8, "0x": 16}.get(digits[:2], 10))


for _tag, _pattern, _starts in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_starts))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _load(text: str, source: str) -> tuple[yaml.Node | None, Any]:
    """Return the document of ``text`` as a node, which knows its lines, and as plain values."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError(f"{source}, line {line}: character {error.character!r} is not allowed in YAML; remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        context = f" ({error.context})" if error.context else ""
        raise SpecError(f"{source}{place}: not valid YAML: {error.problem}{context}") from None
    except (RecursionError, ValueError) as error:
        raise SpecError(f"{source}: not readable as YAML: {error}") from None


def _kind(value: object) -> str:
    return {list: "list", str: "string", bool: "truth value", int: "number", float: "number"}.get(
        type(value), type(value).__name__
    )


def _locator(root: yaml.Node | None, source: str, overrides: Sequence[str]) -> Callable[[Sequence[int | str]], str]:
    """Return a function that says where a key was given: the override that set it, else file and line."""
    given = [(override.partition("=")[0].strip().split("."), override) for override in overrides]

    def locate(location: Sequence[int | str]) -> str:
        parts = [str(part) for part in location]
        for key, override in reversed(given):
            if parts and (parts[: len(key)] == key or key[: len(parts)] == parts):
                return f"{source} with --set {override}"
        line = _line_of(root, parts)
        return source if line is None else f"{source}, line {line}"

    return locate


def _line_of(node: yaml.Node | None, parts: Sequence[str]) -> int | None:
    """Return the line of the deepest key of ``parts`` that the document has, or None when it has not even the first."""
    line = None
    for part in parts:
        found: tuple[yaml.Node, yaml.Node] | None = None
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            found = found or _in_choice(node, part)
        elif isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
            found = (node.value[int(part)],) * 2
        if found is None:
            return line
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _in_choice(space: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Return the key and value of ``model.svm.C`` where it was written: in an option of the choice ``model``."""
    for key, choice in space.value:
        if not name.startswith(f"{key.value}.") or not isinstance(choice, yaml.MappingNode):
            continue
        options = next((value for other, value in choice.value if other.value == "options"), None)
        for option, below in options.value if isinstance(options, yaml.MappingNode) else ():
            rest = name.removeprefix(f"{key.value}.{option.value}.")
            if rest == name or not isinstance(below, yaml.MappingNode):
                continue
            found = next(((other, value) for other, value in below.value if other.value == rest), None)
            if found := found or _in_choice(below, rest):
                return found
    return None


def without_options(text: str, spec: core.ExperimentSpec) -> str:
    """Return the text of a spec's file without its storage options, which are stored nowhere."""
    kept, skipping = [], False
    for line in text.splitlines(keepends=True):
        if re.match(r"""["']?storage_options["']?\s*:""", line):
            skipping = True
        elif not skipping or line[:1] not in " \t\r\n#-":
            skipping = False
            kept.append(line)
    left = "".join(kept)
    for value in _texts(spec.storage_options):  # in a file of another shape
        left = left.replace(value, "***") if len(value) > 3 else left
    return left


def _texts(value: object) -> Iterator[str]:
    """Yield every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for below in value.values():
            yield from _texts(below)
    elif isinstance(value, list):
        for below in value:
            yield from _texts(below)


def _make_absolute(data: dict[str, Any], folder: Path) -> None:
    storage = data.get("storage", core.ExperimentSpec.model_fields["storage"].default)
    if isinstance(storage, str) and storage.strip() and "://" not in storage and not is_reference(storage):
        data["storage"] = _absolute(storage, folder)
    trainable = data.get("trainable")
    if isinstance(trainable, str):
        target, colon, attribute = trainable.rpartition(":")
        if target.endswith(".py"):
            data["trainable"] = _absolute(target, folder) + colon + attribute
    search = data.get("search")
    engine = search.get("engine") if isinstance(search, dict) else None
    if isinstance(search, dict) and isinstance(engine, str):
        target, colon, attribute = engine.rpartition(":")
        if target.endswith(".py"):
            data["search"] = {**search, "engine": _absolute(target, folder) + colon + attribute}


def _absolute(path: str, folder: Path) -> str:
    return os.path.normpath(folder / os.path.expanduser(path))


def _split(override: str, source: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise SpecError(f"--set {override}: expected key=value, such as --set search.seed=1")
    return parts, _value(text.strip(), override, source)


def _value(text: str, override: str, source: str) -> Any:
    if text[:1] in ("[", "{", '"', "'"):
        return _load(text, f"{source}: --set {override}")[1]
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]  # missing in the stubs
    return loader.construct_object(yaml.ScalarNode(tag, text), deep=True)


def _check_key(key: Sequence[str], data: Mapping[str, Any], override: str, source: str) -> None:
    """Refuse a key that no spec has; what lies below objectives, space and references is named by the user."""
    location: list[str] = []
    for place, part in enumerate(key):
        known = known_keys(core.ExperimentSpec, location)
        if known and part not in known:
            near = nearest(part, known)
            prefix = "".join(f"{parent}." for parent in key[:place])
            hint = f"; did you mean {prefix + near!r}?" if near else ""
            raise SpecError(
                f"{source}: --set {override}: unknown key {'.'.join(key[: place + 1])!r}{hint} (allowed: {', '.join(known)})"
            )
        location.append(part)
        if len(location) == 2 and location[0] == "space":
            space = data.get("space")
            parameter = space.get(part) if isinstance(space, Mapping) else None
            location.append(str(parameter.get("type")) if isinstance(parameter, Mapping) else "")
