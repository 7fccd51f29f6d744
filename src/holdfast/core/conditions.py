"""What can be said of a condition on parameters before there is any config: its names, its types, the values it asks for."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

from holdfast.core.expression import CONSTANTS, Expression
from holdfast.core.parameters import CategoricalParameter, ConstantParameter, FloatParameter, IntParameter, Parameter
from holdfast.core.spelling import hint
from holdfast.core.values import Scalar

Kinds = frozenset[str]
_NUMBER, _TEXT, _NULL = frozenset({"a number"}), frozenset({"text"}), frozenset({"null"})
_ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def problem_of(expression: Expression, parameters: Mapping[str, Parameter]) -> str | None:
    """Return why ``expression`` can be no condition on ``parameters``, or None: only what is certain counts."""
    if not expression.names:
        return f"{expression.text!r} names no parameter, so it is always the same; allowed: {', '.join(parameters) or 'none'}"
    for name in sorted(expression.names):
        if name not in parameters:
            allowed = ", ".join(parameters) or "none"
            return f"{expression.text!r} names {name!r}{hint(name, parameters)}, which is no parameter; allowed: {allowed}"
    types = _Types(expression, parameters)
    for node in reversed([*ast.walk(expression.root)]):  # parts before what is made of them
        if reason := types.reason(node):
            return f"{expression.text!r}: {reason}"
    return None


class _Types:
    """What the parts of an expression can be."""

    def __init__(self, expression: Expression, parameters: Mapping[str, Parameter]) -> None:
        self._expression, self._parameters = expression, parameters

    def reason(self, node: ast.AST) -> str | None:
        """Return what is certainly wrong with ``node`` itself, whatever its parts are."""
        match node:
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                found = (self._pair(op, sides[place], sides[place + 1]) for place, op in enumerate(ops))
                return next(filter(None, found), None)
            case ast.BinOp(left=left, right=right):
                return self._no_number([left, right])
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                return self._no_number([operand])
            case ast.Call(func=ast.Name(id=name), args=arguments) if name not in ("min", "max"):
                return self._no_number(arguments)
        return None

    def kinds(self, node: ast.expr) -> Kinds:
        """Return what values of ``node`` can be."""
        name = self._expression.name_of(node)
        match node:
            case ast.Constant(value=value):
                return _kind(value)
            case ast.Name(id=constant) if name is None:
                return _kind(CONSTANTS[constant])
            case ast.Name() | ast.Attribute() if name is not None:
                parameter = self._parameters[name]
                return _union(_kind(value) for value in values) if (values := _values(parameter)) is not None else _NUMBER
            case ast.BoolOp(values=parts):
                return _union(map(self.kinds, parts))
            case ast.Call(func=ast.Name(id="min" | "max"), args=arguments):
                return _union(map(self.kinds, _members(arguments[0]) or arguments if len(arguments) == 1 else arguments))
            case ast.Tuple() | ast.List():
                return frozenset({"a list"})
        return _NUMBER

    def _pair(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> str | None:
        if isinstance(op, ast.In | ast.NotIn):
            return self._membership(left, right)
        ours, theirs = self.kinds(left), self.kinds(right)
        both = ours & theirs
        if isinstance(op, _ORDERS):
            both &= _NUMBER | _TEXT
        if not both:
            return f"{self._is(left)} and {self._is(right)}, which cannot be compared"
        if isinstance(op, ast.Eq | ast.NotEq):
            return self._value(left, right) or self._value(right, left)
        return None

    def _membership(self, left: ast.expr, right: ast.expr) -> str | None:
        members = _members(right)
        if members is not None:
            if not self.kinds(left) & _union(map(self.kinds, members)):
                return f"{self._is(left)}, which is never in {self._expression.shown(right)}"
            return next(filter(None, (self._value(left, member) for member in members)), None)
        if not self.kinds(right) & _TEXT:
            return f"{self._is(right)}, which holds nothing; write a list such as {self._expression.shown(left)} in (1, 2)"
        return None if self.kinds(left) & _TEXT else f"{self._is(left)}, which is never in text"

    def _value(self, named: ast.expr, other: ast.expr) -> str | None:
        """Return why the parameter ``named`` can never have the value of the constant ``other``."""
        name = self._expression.name_of(named)
        value = _constant(other, self._expression)
        if name is None or value is _NO_CONSTANT:
            return None
        parameter = self._parameters[name]
        values = _values(parameter)
        if values is not None:
            if any(value == choice for choice in values):
                return None
            near = hint(str(value), map(str, values))
            return f"{name} is never {value!r}{near}; its values: {', '.join(map(repr, values))}"
        assert isinstance(parameter, FloatParameter | IntParameter)
        if isinstance(value, (int, float)) and not parameter.low <= value <= parameter.high:
            return f"{name} is never {value!r}, which is outside [{parameter.low}, {parameter.high}]"
        return None

    def _no_number(self, parts: Iterable[ast.expr]) -> str | None:
        for part in parts:
            if not self.kinds(part) & _NUMBER:
                return f"{self._is(part)}, which cannot be computed with"
        return None

    def _is(self, node: ast.expr) -> str:
        return f"{self._expression.shown(node)} is {' or '.join(sorted(self.kinds(node)))}"


_NO_CONSTANT = object()


def _constant(node: ast.expr, expression: Expression) -> object:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=name) if expression.name_of(node) is None:
            return CONSTANTS[name]
    return _NO_CONSTANT


def _members(node: ast.expr) -> list[ast.expr] | None:
    return node.elts if isinstance(node, ast.Tuple | ast.List) else None


def _values(parameter: Parameter) -> tuple[Scalar, ...] | None:
    """Return every value of ``parameter``, or None for a number with bounds."""
    match parameter:
        case CategoricalParameter(choices=choices):
            return choices
        case ConstantParameter(value=value):
            return (value,)
    return None


def _kind(value: object) -> Kinds:
    return _TEXT if isinstance(value, str) else _NULL if value is None else _NUMBER


def _union(kinds: Iterable[Kinds]) -> Kinds:
    return frozenset[str]().union(*kinds)
