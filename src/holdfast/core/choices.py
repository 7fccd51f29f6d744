"""Nested choices: ``type: choice`` brings along the parameters of each of its options; a space holds them flat.

``model: {type: choice, options: {svm: {C: {...}}, forest: {}}}`` is the categorical parameter ``model`` and ``model.svm.C``,
which is active while ``model`` is ``svm``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.core.expression import Expression, written
from holdfast.core.values import Scalar

DEEPEST = 20
"""Levels of choices in choices at most."""
_KEYS = ("default", "options", "type", "when")


def expanded(space: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return ``space`` without choices: each is a categorical parameter, and its options' parameters stand after it.

    A ``when`` inside an option names its neighbours by their short names; what is none of them is looked for further out.
    Raises ValueError.
    """
    flat: dict[Any, Any] = {}
    _expand(space, flat, prefix="", inside=None, scopes=())
    return flat


def nested(config: Mapping[str, Scalar]) -> dict[str, Any]:
    """Return ``config`` with the parameters of chosen options inside them: ``{"model": {"svm": {"C": 0.5}}, "lr": 0.1}``.

    A choice whose option has no active parameter stays as it is: ``{"model": "none"}``.
    """
    inside: dict[str, dict[str, Scalar]] = {}
    for name, value in config.items():
        prefix = f"{name}.{value}."
        inside[name] = {other[len(prefix) :]: found for other, found in config.items() if other.startswith(prefix)}
    taken = {f"{name}.{config[name]}.{other}" for name, below in inside.items() for other in below}
    return {
        name: {value: nested(inside[name])} if inside[name] else value for name, value in config.items() if name not in taken
    }


_Scope = tuple[str, Mapping[Any, Any]]


def _expand(
    space: Mapping[Any, Any],
    flat: dict[Any, Any],
    *,
    prefix: str,
    inside: tuple[str, str] | None,
    scopes: Sequence[_Scope],
) -> None:
    """Add the parameters of ``space`` to ``flat``; ``inside`` names the choice that it belongs to and its option."""
    if len(scopes) > DEEPEST:
        raise ValueError(f"{prefix[:60]}...: choices are nested more than {DEEPEST} levels deep; write it flatter")
    for short, given in space.items():
        if inside is not None and not isinstance(short, str):
            raise ValueError(f"{prefix}{short}: the name {short!r} is no string; put quotes around it")
        name = f"{prefix}{short}" if inside is not None else short
        if name in flat:
            raise ValueError(f"{name} is there twice: on its own, and by the choice that its name begins with; rename one")
        parameter = given if inside is None else _conditional(given, inside, scopes)
        if isinstance(parameter, Mapping) and parameter.get("type") == "choice":
            _expand_choice(name, parameter, flat, scopes)
        else:
            flat[name] = parameter


def _expand_choice(name: str, choice: Mapping[str, Any], flat: dict[Any, Any], scopes: Sequence[_Scope]) -> None:
    unknown = [key for key in choice if key not in _KEYS]
    if unknown:
        raise ValueError(f"{name}: unknown key {unknown[0]!r} of a choice (allowed: {', '.join(_KEYS)})")
    options = choice.get("options")
    if not isinstance(options, Mapping) or not options:
        raise ValueError(f"{name}: options must name each option with its parameters, such as {{svm: {{C: ...}}, none: {{}}}}")
    if not isinstance(name, str):
        raise ValueError(f"the name {name!r} of a choice is no string; put quotes around it")
    flat[name] = {**{key: value for key, value in choice.items() if key != "options"}, "type": "categorical"}
    flat[name]["choices"] = list(options)
    for option, below in options.items():
        if not isinstance(option, str):
            raise ValueError(f"{name}: the option {option!r} is no string; put quotes around it")
        if below is None:
            continue
        if not isinstance(below, Mapping):
            raise ValueError(f"{name}: option {option} must be a mapping of parameters by name, or empty, not {below!r}")
        for short, parameter in below.items():
            if not isinstance(parameter, Mapping) and not hasattr(parameter, "type"):
                raise ValueError(
                    f"{name}: option {option}: {short} is {parameter!r}; an option holds parameters by name, such as "
                    f"{{C: {{type: float, low: 0, high: 1}}}}"
                )
        prefix = f"{name}.{option}."
        _expand(below, flat, prefix=prefix, inside=(name, option), scopes=(*scopes, (prefix, below)))


def _conditional(parameter: Any, inside: tuple[str, str], scopes: Sequence[_Scope]) -> Any:
    """Return ``parameter`` with the condition that the option it belongs to is chosen."""
    if not isinstance(parameter, Mapping):  # made in Python
        parameter = parameter.model_dump(exclude_defaults=True) | {"type": parameter.type}
    choice, option = inside
    when = parameter.get("when")
    if when is None:
        return {**parameter, "when": {choice: option}}
    if isinstance(when, Mapping):
        found = {_resolved(other, scopes): wanted for other, wanted in when.items()}
        if choice in found:
            raise ValueError(
                f"{choice}: option {option}: a when names {choice!r}, which it stands under anyway; leave that out"
            )
        return {**parameter, "when": {choice: option, **found}}
    if isinstance(when, str):
        known = [name for _, names in scopes for name in names]
        text = Expression(when, known).renamed(lambda other: _resolved(other, scopes))
        return {**parameter, "when": f"{written(choice)} == {option!r} and ({text})"}
    return parameter  # the parameter says what is wrong with it


def _resolved(short: str, scopes: Sequence[_Scope]) -> str:
    """Return the whole name of what a ``when`` calls ``short``: a neighbour, one further out, or what is called so."""
    for prefix, names in reversed(scopes):
        if any(short == name or short.startswith(f"{name}.") for name in names):
            return prefix + short
    return short
