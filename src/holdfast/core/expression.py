"""Expressions over named values, such as ``lr * batch < 1``: parsed by Python's grammar, walked by our own code, never run.

Allowed are numbers, text, true, false, null and pi, names, ``+ - * / // % **``, comparisons (chains, too), ``and``, ``or``,
``not``, ``x in (a, b)`` and the functions of :data:`FUNCTIONS`. They mean what they mean in Python. A name of identifiers
with dots between them stands as it is (``model.svm.C``), every other one in backquotes: ```learning-rate` < 1``. A name that is
given a value shadows the constant of that name.

What cannot be computed is unknown: a division by zero, text times a number, a name without a value, NaN. A condition with an
unknown part is met when the rest decides it (``x == 0 or 1 / x > 3``), and else it is not.
"""

from __future__ import annotations

import ast
import keyword
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from holdfast.core.errors import SpecError

LONGEST = 1000
"""Characters of an expression at most."""
DEEPEST = 100
"""Levels of nesting at most: a deeper one could end the interpreter's stack."""
MOST_BITS = 8192
"""Whole numbers beyond it are not computed with; powers beyond half of it are computed as floats."""

Value = Callable[[Mapping[str, Any]], Any]
_UNKNOWN = (ArithmeticError, TypeError, ValueError, KeyError)


def _round(number: Any, digits: Any = 0) -> Any:
    if not isinstance(digits, int) or abs(digits) > 400:  # it would compute 10**digits
        raise ValueError(f"{digits!r} is no number of digits")
    return round(number, digits) if digits else round(number)


def _extreme(function: Callable[..., Any]) -> Callable[..., Any]:
    def choose(*arguments: Any) -> Any:
        members = arguments[0] if len(arguments) == 1 else arguments
        if any(member != member for member in members):
            raise ValueError("NaN has no order")
        return function(members)

    return choose


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": _extreme(min),
    "max": _extreme(max),
    "round": _round,
    "sqrt": math.sqrt,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "exp": math.exp,
}
"""What may be called, with positional arguments."""
_ARGUMENTS = {"min": (1, LONGEST), "max": (1, LONGEST), "round": (1, 2), "log": (1, 2)}

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda value, members: value in members,
    ast.NotIn: lambda value, members: value not in members,
}
CONSTANTS = {"true": True, "false": False, "null": None, "pi": math.pi}
"""Names that have a value unless a parameter or a metric is called so."""

_ALLOWED = (
    "allowed: numbers, text in quotes, true, false, null, pi, names, + - * / // % **, comparisons, and, or, not, in, "
    + ", ".join(FUNCTIONS)
)
_PIECES = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|`(?P<quoted>[^`\n]*)`|(?P<word>[^\W\d][\w\u0300-\u036f]*)""")


class Expression:
    """A condition on named values; SpecError, with what is allowed, when ``text`` is none.

    ``known`` are names that may be given values: the constants of that name are shadowed even where they have none.
    """

    def __init__(self, text: str, known: Collection[str] = ()) -> None:
        self.text = text
        self._known = frozenset(known) & CONSTANTS.keys()
        if len(text) > LONGEST:
            raise SpecError(f"an expression has at most {LONGEST} characters, this one {len(text)}")
        self._quoted: dict[str, str] = {}
        self._mark = "_q"
        while self._mark in text:
            self._mark += "_"
        self.root = self._parsed(text)
        self.names: frozenset[str] = frozenset(self._checked(self.root))
        """whatever needs a value"""
        if not isinstance(self.root, (ast.Compare, ast.BoolOp)) and not _is_not(self.root):
            raise SpecError(f"{text!r} is no condition: compare something, as in lr * batch < 1")
        self._measure = self._distance_of(self.root)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and other.text == self.text and other.names == self.names

    def __hash__(self) -> int:
        return hash(self.text)

    def __reduce__(self) -> tuple[type[Expression], tuple[str, frozenset[str]]]:
        return Expression, (self.text, self._known)

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Tell whether ``values`` has every name: a condition on an inactive parameter says nothing."""
        return values.keys() >= self.names

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Tell whether the condition is met; False where that is unknown (a division by zero, text times text, NaN)."""
        return self._measure(values) <= 0.0

    def violation(self, values: Mapping[str, Any]) -> float:
        """Return how far ``values`` are from meeting the condition: 0 or less when they meet it, infinite when that is unknown.

        A comparison of numbers gives the difference of its sides; ``and`` the largest of its parts, ``or`` the smallest.
        A strict comparison of equal sides, and whatever has no distance (text, ``not``, ``in``), gives 1 when it is not met.
        """
        found = self._measure(values)
        return math.inf if math.isnan(found) else found

    def renamed(self, rename: Callable[[str], str]) -> str:
        """Return the expression's text with other names."""
        names: dict[str, str] = {}
        root = _Renaming(self, rename, names).visit(self._parsed(self.text))
        text = ast.unparse(root)
        return re.sub(rf"{self._mark}r\d+_", lambda found: written(names[found.group()]), text)

    def name_of(self, node: ast.expr) -> str | None:
        """Return the parameter or metric that ``node`` names, or None."""
        if not isinstance(node, ast.Name | ast.Attribute):
            return None
        name = self._name(node)
        return None if name in CONSTANTS and name not in self._known else name

    def shown(self, node: ast.expr) -> str:
        """Return the text of a part, with the names as they were written."""
        return self._unmarked(ast.unparse(node))

    def _parsed(self, text: str) -> ast.expr:
        try:
            root = ast.parse(_PIECES.sub(self._marked, text).strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = self._unmarked(getattr(error, "msg", None) or str(error))
            words = [word for word in re.findall(r"\w+", text) if keyword.iskeyword(word) and word not in _WORDS]
            hint = f"; a name that is a word of Python needs backquotes: `{words[0]}`" if words else ""
            raise SpecError(
                f"{text!r} is no expression: {reason}; write a condition such as lr * batch < 1, and a name with other "
                f"characters in it as `learning-rate`{hint}"
            ) from None
        todo: list[tuple[ast.AST, int]] = [(root, 1)]
        while todo:
            node, depth = todo.pop()
            if depth > DEEPEST:
                start = text[:40] + "..."
                raise SpecError(f"{start!r} is nested more than {DEEPEST} levels deep; write it in several conditions")
            todo += [(below, depth + 1) for below in ast.iter_child_nodes(node)]
        return root

    def _marked(self, found: re.Match[str]) -> str:
        """Return what stands for a name that Python's grammar cannot hold, or would write in another way."""
        name = found["quoted"]
        if name is None:
            word = found["word"]
            if word is None:
                is_raw = found.string[: found.start()][-1:] in ("r", "R")
                return found.group() if is_raw else _ESCAPES.sub(_escaped, found.group())
            if unicodedata.normalize("NFKC", word) == word:
                return word
            name = word
        mark = next((mark for mark, other in self._quoted.items() if other == name), f"{self._mark}{len(self._quoted)}_")
        self._quoted[mark] = name
        return f" {mark} "

    def _unmarked(self, text: str) -> str:
        return re.sub(rf"{self._mark}\d+_", lambda found: f"`{self._quoted.get(found.group(), '')}`", text)

    def _checked(self, node: ast.expr) -> Iterator[str]:
        """Yield the names in ``node``; SpecError for what an expression may not have."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return
            case ast.Name() | ast.Attribute():
                if (name := self.name_of(node)) is not None:
                    yield name
                return
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC or isinstance(op, ast.Pow):
                parts = [left, right]
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
                parts = [operand]
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                pass
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
                parts = [left, *others]
            case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in FUNCTIONS:
                self._check_arguments(node, name, parts)
            case _:
                raise SpecError(f"{self.text!r}: {self.shown(node)!r} is not allowed in an expression; {_ALLOWED}")
        for part in parts:
            yield from self._checked(part)

    def _check_arguments(self, node: ast.expr, name: str, arguments: list[ast.expr]) -> None:
        least, most = _ARGUMENTS.get(name, (1, 1))
        if not least <= len(arguments) <= most:
            count = f"{least} or {most} arguments" if most == 2 else "one argument" if most == 1 else "arguments"
            raise SpecError(f"{self.text!r}: {self.shown(node)!r}: {name} takes {count}, not {len(arguments) or 'none'}")
        if most == LONGEST and len(arguments) == 1 and not isinstance(arguments[0], ast.Tuple | ast.List):
            raise SpecError(f"{self.text!r}: {self.shown(node)!r}: {name} of one value; give it two or more")

    def _name(self, node: ast.Name | ast.Attribute) -> str:
        part = node.id if isinstance(node, ast.Name) else node.attr
        if part.startswith("__"):
            raise SpecError(f"{self.text!r}: {part!r} is not allowed in an expression; a name of yours needs backquotes")
        part = self._quoted.get(part, part)
        if isinstance(node, ast.Name):
            return part
        if isinstance(node.value, ast.Name | ast.Attribute):
            return f"{self._name(node.value)}.{part}"
        raise SpecError(f"{self.text!r}: {self.shown(node)!r} names nothing; write a parameter or a metric")

    def _value_of(self, node: ast.expr) -> Value:
        """Return a function that computes ``node`` from the values; it raises one of ``_UNKNOWN`` where it cannot."""
        match node:
            case ast.Constant(value=value):
                return lambda values: value
            case ast.Name() | ast.Attribute():
                name = self._name(node)
                if self.name_of(node) is not None:
                    return lambda values: values[name]
                return lambda values: values[name] if name in values else CONSTANTS[name]
            case ast.BinOp(left=left, op=op, right=right):
                first, second, kind = self._value_of(left), self._value_of(right), type(op)
                return lambda values: _computed(kind, first(values), second(values))
            case ast.BoolOp(op=op, values=parts):
                return _first_that([self._value_of(part) for part in parts], isinstance(op, ast.Or))
            case ast.Compare() | ast.UnaryOp(op=ast.Not()):
                return _met(self._distance_of(node))
            case ast.UnaryOp(op=op, operand=operand):
                inner = self._value_of(operand)
                sign: Callable[[Any], Any] = operator.neg if isinstance(op, ast.USub) else operator.pos
                return lambda values: sign(inner(values))
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                members = [self._value_of(part) for part in parts]
                return lambda values: [member(values) for member in members]
            case ast.Call(func=ast.Name(id=name), args=arguments):
                given, function = [self._value_of(argument) for argument in arguments], FUNCTIONS[name]
                return lambda values: function(*(argument(values) for argument in given))
        raise AssertionError(f"{ast.dump(node)} passed the check")

    def _distance_of(self, node: ast.expr) -> Callable[[Mapping[str, Any]], float]:
        """Return a function that computes the violation of ``node``, NaN where it is unknown; it raises nothing."""
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self._distance_of(part) for part in values]
                return _all_of(parts) if isinstance(op, ast.And) else _any_of(parts)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _compared(type(op), self._value_of(left), self._value_of(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [self._value_of(side) for side in (left, *others)]
                return _all_of([_compared(type(op), sides[place], sides[place + 1]) for place, op in enumerate(ops)])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _negated(self._distance_of(operand))
            case _:
                return _truth(self._value_of(node))


_ESCAPES = re.compile(r"\\(.)", re.DOTALL)


def _escaped(found: re.Match[str]) -> str:
    """Return an escape of Python's as it is; what is none means a backslash, of which Python would warn."""
    return found.group() if found[1] in "\\'\"abfnrtvxuUN01234567" else "\\" + found.group()


_WORDS = {"and", "or", "not", "in", "True", "False", "None"}


class _Renaming(ast.NodeTransformer):
    def __init__(self, expression: Expression, rename: Callable[[str], str], names: dict[str, str]) -> None:
        self._expression, self._rename, self._names = expression, rename, names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._renamed(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return self._renamed(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        node.args = [self.visit(argument) for argument in node.args]  # the function keeps its name
        return node

    def _renamed(self, node: ast.Name | ast.Attribute) -> ast.expr:
        name = self._expression.name_of(node)
        mark = f"{self._expression._mark}r{len(self._names)}_"
        self._names[mark] = self._expression._name(node) if name is None else self._rename(name)
        return ast.Name(mark)


def written(name: str) -> str:
    """Return ``name`` as it stands in an expression; SpecError when it cannot (a backquote in it)."""
    parts = name.split(".")
    if all(_is_plain(part) for part in parts):
        return name
    if "`" in name or "\n" in name:
        raise SpecError(f"{name!r} cannot be named in an expression: it holds a backquote or a line break; rename it")
    return f"`{name}`"


def _is_plain(part: str) -> bool:
    return part.isidentifier() and not keyword.iskeyword(part) and not part.startswith("__")


def _is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _first_that(parts: list[Value], truth: bool) -> Value:
    """Return Python's ``or`` (with ``truth``) or ``and`` of ``parts``, as a value."""

    def choose(values: Mapping[str, Any]) -> Any:
        value = None
        for part in parts:
            value = part(values)
            if bool(value) is truth:
                break
        return value

    return choose


def _met(distance: Callable[[Mapping[str, Any]], float]) -> Value:
    def value(values: Mapping[str, Any]) -> bool:
        found = distance(values)
        if math.isnan(found):
            raise ArithmeticError("unknown")
        return found <= 0.0

    return value


def _all_of(parts: list[Callable[[Mapping[str, Any]], float]]) -> Callable[[Mapping[str, Any]], float]:
    def distance(values: Mapping[str, Any]) -> float:
        largest, unknown = -math.inf, False
        for part in parts:
            found = part(values)
            if found != found:
                unknown = True
            elif found > largest:
                largest = found
        if unknown:
            return math.inf if largest > 0.0 else math.nan
        return largest

    return distance


def _any_of(parts: list[Callable[[Mapping[str, Any]], float]]) -> Callable[[Mapping[str, Any]], float]:
    def distance(values: Mapping[str, Any]) -> float:
        smallest, unknown = math.inf, False
        for part in parts:
            found = part(values)
            if found != found:
                unknown = True
            elif found < smallest:
                smallest = found
        return math.nan if unknown and smallest > 0.0 else smallest

    return distance


def _negated(inner: Callable[[Mapping[str, Any]], float]) -> Callable[[Mapping[str, Any]], float]:
    def distance(values: Mapping[str, Any]) -> float:
        found = inner(values)
        return found if found != found else 1.0 if found <= 0.0 else 0.0

    return distance


def _truth(value: Value) -> Callable[[Mapping[str, Any]], float]:
    def distance(values: Mapping[str, Any]) -> float:
        try:
            found = value(values)
        except _UNKNOWN:
            return math.nan
        return math.nan if found != found else 0.0 if found else 1.0

    return distance


def _compared(kind: type[ast.cmpop], left: Value, right: Value) -> Callable[[Mapping[str, Any]], float]:
    compare, gap = _COMPARISONS[kind], _GAPS.get(kind)

    def distance(values: Mapping[str, Any]) -> float:
        try:
            first, second = left(values), right(values)
            if first != first or second != second:
                return math.nan
            met = compare(first, second)
        except _UNKNOWN:
            return math.nan
        if not isinstance(first, (int, float)) or not isinstance(second, (int, float)) or gap is None:
            return 0.0 if met else 1.0
        try:
            found = gap(float(first), float(second))
        except OverflowError:  # an int beyond the range of floats
            return -math.inf if met else math.inf
        if met:
            return found if found < 0.0 else 0.0
        return found if found > 0.0 else 1.0  # nothing between them: a strict comparison, or ints that are one float

    return distance


_GAPS: dict[type[ast.cmpop], Callable[[float, float], float]] = {
    ast.Lt: lambda left, right: left - right,
    ast.LtE: lambda left, right: left - right,
    ast.Gt: lambda left, right: right - left,
    ast.GtE: lambda left, right: right - left,
    ast.Eq: lambda left, right: abs(left - right),
}


def _computed(kind: type[ast.operator], left: Any, right: Any) -> Any:
    for side in (left, right):
        if not isinstance(side, (int, float)):  # text times a number would build text of any length
            raise TypeError(f"{side!r} is no number")
    whole = isinstance(left, int) and isinstance(right, int)
    if kind is ast.Pow:
        if whole and right >= 0 and left.bit_length() * right <= MOST_BITS // 2:
            return left**right
        result = float(left) ** float(right)
        if isinstance(result, complex):
            raise ValueError("no real number")
        return result
    if whole and left.bit_length() + right.bit_length() > MOST_BITS:
        raise OverflowError("the number is too large")
    return _ARITHMETIC[kind](left, right)
