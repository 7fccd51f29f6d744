"""Expressions over named values, such as ``lr * batch < 1``: parsed by Python's grammar, walked by our own code, never run.

Allowed are numbers, strings, true and false, names, ``+ - * / // % **``, comparisons (chains, too), ``and``, ``or``, ``not``,
``x in (a, b)`` and the functions of :data:`FUNCTIONS`. A name that is no identifier (``model.svm.C``, say) is written as it is
when its parts are identifiers.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from holdfast.core.errors import SpecError

LONGEST = 1000
"""Characters of an expression at most."""
LARGEST_EXPONENT = 1000.0
"""``**`` beyond it is refused: it would compute for ever."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "sqrt": math.sqrt,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "exp": math.exp,
}
"""What may be called, with positional arguments."""

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
_CONSTANTS = {"true": True, "false": False, "null": None, "pi": math.pi}


class Expression:
    """A condition on named values; SpecError, with what is allowed, when ``text`` is none."""

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > LONGEST:
            raise SpecError(f"an expression has at most {LONGEST} characters, this one {len(text)}")
        try:
            self._root = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise SpecError(f"{text!r} is no expression: {reason}; write a condition such as lr * batch < 1") from None
        self.names: frozenset[str] = frozenset(self._checked(self._root))
        if not isinstance(self._root, (ast.Compare, ast.BoolOp)) and not _is_not(self._root):
            raise SpecError(f"{text!r} is no condition: compare something, as in lr * batch < 1")

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.names)

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Tell whether ``values`` has every name: a condition on an inactive parameter says nothing."""
        return all(name in values for name in self.names)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Tell whether the condition is met; False where it cannot be computed (a division by zero, text times text)."""
        return self.violation(values) <= 0.0

    def violation(self, values: Mapping[str, Any]) -> float:
        """Return how far ``values`` are from meeting the condition: 0 or less when they meet it, infinite when that is unknown.

        A comparison of numbers gives the difference of its sides; ``and`` the largest of its parts, ``or`` the smallest.
        A strict comparison of equal sides, and whatever has no distance (text, ``not``, ``in``), gives 1 when it is not met.
        """
        try:
            found = self._violation(self._root, values)
        except (ArithmeticError, TypeError, ValueError, KeyError):
            return math.inf
        return math.inf if math.isnan(found) else found

    def _checked(self, node: ast.expr) -> set[str]:
        """Return the names in ``node``; SpecError for what an expression may not have."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return set()
            case ast.Name() | ast.Attribute():
                name = self._name(node)
                return set() if name in _CONSTANTS else {name}
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC or isinstance(op, ast.Pow):
                return self._checked(left) | self._checked(right)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
                return self._checked(operand)
            case ast.BoolOp(values=parts):
                return set[str]().union(*map(self._checked, parts))
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
                return set[str]().union(*map(self._checked, [left, *others]))
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return set[str]().union(*map(self._checked, parts))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                return set[str]().union(*map(self._checked, arguments))
            case _:
                raise SpecError(
                    f"{self.text!r}: {ast.unparse(node)!r} is not allowed in an expression; allowed: numbers, text, names, "
                    f"+ - * / // % **, comparisons, and, or, not, in, {', '.join(FUNCTIONS)}"
                )

    def _name(self, node: ast.Name | ast.Attribute) -> str:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node.value, ast.Name | ast.Attribute):
            return f"{self._name(node.value)}.{node.attr}"
        raise SpecError(f"{self.text!r}: {ast.unparse(node)!r} names nothing; write a parameter or a metric")

    def _value(self, node: ast.expr, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name() | ast.Attribute():
                name = self._name(node)
                return _CONSTANTS[name] if name in _CONSTANTS else values[name]
            case ast.BinOp(left=left, op=op, right=right):
                return _computed(op, self._value(left, values), self._value(right, values))
            case ast.UnaryOp(op=ast.Not()) | ast.BoolOp() | ast.Compare():
                return self._violation(node, values) <= 0.0
            case ast.UnaryOp(op=op, operand=operand):
                value = self._value(operand, values)
                return -value if isinstance(op, ast.USub) else +value
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return [self._value(part, values) for part in parts]
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return FUNCTIONS[name](*(self._value(argument, values) for argument in arguments))
        raise AssertionError(f"{ast.dump(node)} passed the check")

    def _violation(self, node: ast.expr, values: Mapping[str, Any]) -> float:
        match node:
            case ast.BoolOp(op=ast.And(), values=parts):
                return max(self._violation(part, values) for part in parts)
            case ast.BoolOp(values=parts):
                return min(self._violation(part, values) for part in parts)
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [self._value(side, values) for side in (left, *others)]
                return max(_distance(op, sides[place], sides[place + 1]) for place, op in enumerate(ops))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return 1.0 if self._value(operand, values) else 0.0
            case _:
                return 0.0 if self._value(node, values) else 1.0


def _is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _computed(op: ast.operator, left: Any, right: Any) -> Any:
    for side in (left, right):
        if not isinstance(side, (int, float)):  # text times a number would build text of any length
            raise TypeError(f"{side!r} is no number")
    if isinstance(op, ast.Pow):
        if abs(right) > LARGEST_EXPONENT or abs(left) > 1e300:
            raise OverflowError("the power is too large")
        result = float(left) ** float(right)
        if isinstance(result, complex):
            raise ValueError("no real number")
        return result
    return _ARITHMETIC[type(op)](left, right)


def _distance(op: ast.cmpop, left: Any, right: Any) -> float:
    if _COMPARISONS[type(op)](left, right):
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        return min(_gap(op, left, right), 0.0) if numbers else 0.0
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        gap = _gap(op, left, right)
        return gap if gap > 0.0 or math.isnan(gap) else 1.0
    return 1.0


def _gap(op: ast.cmpop, left: float, right: float) -> float:
    match op:
        case ast.Lt() | ast.LtE():
            return float(left) - float(right)
        case ast.Gt() | ast.GtE():
            return float(right) - float(left)
        case ast.Eq():
            return abs(float(left) - float(right))
        case _:
            return 0.0
