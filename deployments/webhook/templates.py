"""What a foreign body means: templates of the configuration, in a sandbox, with a bounded output.

A template sees ``body``, ``event`` (of GitHub) and ``hook``, and can only read: nothing is called but Jinja's own filters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from holdfast.core.errors import SpecError
from holdfast.deployments.webhook.problems import Problem

LONGEST = 4096
"""Characters that a template, or what it makes, may have."""

FILTERS = frozenset(
    {"capitalize", "d", "default", "first", "int", "float", "last", "length", "lower", "string", "trim", "upper", "tojson"}
)
"""The filters that a template may use: none of them makes much out of little, or calls anything."""

TESTS = frozenset(
    {"defined", "undefined", "none", "string", "number", "boolean", "true", "false", "mapping", "sequence", "in", "eq", "ne",
     "lt", "gt", "le", "ge", "equalto", "integer", "float"}
)  # fmt: skip

NAMES = frozenset({"body", "event", "hook"})
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "none", "")


@lru_cache(maxsize=1)
def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # What could run long, or make a body into much more: loops, macros, blocks, arithmetic that repeats, calls of any kind.
    allowed = (
        nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Filter,
        nodes.Test, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr, nodes.Concat, nodes.If,
        nodes.List, nodes.Tuple, nodes.Keyword, nodes.Slice,
    )  # fmt: skip

    class Sandbox(ImmutableSandboxedEnvironment):
        """Only what is in the lists above, and only items of JSON values: no attribute of a Python object."""

        def getattr(self, obj: Any, attribute: str) -> Any:
            return self.getitem(obj, attribute)

        def getitem(self, obj: Any, argument: Any) -> Any:
            if isinstance(obj, Mapping) and isinstance(argument, str):
                return obj[argument] if argument in obj else self.undefined(obj=obj, name=argument)
            if isinstance(obj, list | str) and isinstance(argument, int | slice):
                try:
                    return obj[argument]
                except (IndexError, ValueError):
                    return self.undefined(obj=obj, name=str(argument))
            return self.undefined(obj=obj, name=str(argument)[:50])

        def is_safe_callable(self, obj: Any) -> bool:
            return False

        def refusal(self, source: str) -> str | None:
            """Say what a template has that it may not have."""
            tree = self.parse(source)
            for node in tree.find_all(nodes.Node):
                if not isinstance(node, allowed):
                    return f"it uses {type(node).__name__}"
                if isinstance(node, nodes.Filter) and node.name not in FILTERS:
                    return f"filter {node.name}; allowed: {', '.join(sorted(FILTERS))}"
                if isinstance(node, nodes.Test) and node.name not in TESTS:
                    return f"test {node.name}; allowed: {', '.join(sorted(TESTS))}"
                named = node.attr if isinstance(node, nodes.Getattr) else node.value if isinstance(node, nodes.Const) else ""
                if str(named).startswith("__"):
                    return f"{named}"
                if isinstance(node, nodes.Name) and node.name not in NAMES:
                    return f"name {node.name}; allowed: {', '.join(sorted(NAMES))}"
            return None

    found = Sandbox(undefined=jinja2.StrictUndefined, autoescape=False, cache_size=0, auto_reload=False)
    found.globals.clear()
    found.filters = {name: found.filters[name] for name in FILTERS}
    found.tests = {name: found.tests[name] for name in TESTS}
    return found


class Template:
    """One template, checked when it is made; SpecError, naming ``source``, for one that cannot be used."""

    def __init__(self, text: str, source: str) -> None:
        import jinja2

        if len(text) > LONGEST:
            raise SpecError(f"{source} is a template of {len(text)} characters; {LONGEST} are allowed")
        try:
            environment = _environment()
            refusal = environment.refusal(text)
            if refusal is None:
                self._template = environment.from_string(text)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise SpecError(f"{source} is no template: {error}") from None
        if refusal is not None:
            raise SpecError(f"{source} is a template that may not do so: {refusal}")
        self.source = source

    def text(self, values: Mapping[str, Any]) -> str:
        """Return what it makes of a delivery; a Problem (422) when that lacks what it reads, or is too long."""
        import jinja2

        parts, length = [], 0
        try:
            for part in self._template.generate(**values):
                length += len(part)
                if length > LONGEST:
                    raise Problem(422, "mapping", f"{self.source} makes more than {LONGEST} characters of the body")
                parts.append(part)
        except jinja2.UndefinedError:
            raise Problem(422, "mapping", f"the body lacks what {self.source} reads") from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError, AttributeError, LookupError):
            raise Problem(422, "mapping", f"the body is not of the kind that {self.source} reads") from None
        return "".join(parts).strip()

    def truth(self, values: Mapping[str, Any]) -> bool:
        """Return whether it says true; a Problem (422) when it says neither true nor false."""
        text = self.text(values).lower()
        if text not in _TRUE + _FALSE:
            raise Problem(422, "mapping", f"{self.source} says neither true nor false of the body")
        return text in _TRUE
