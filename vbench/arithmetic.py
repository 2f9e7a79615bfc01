"""Evaluates a small arithmetic language over ``ast``, without ``eval``. Standard library only.

A claims ledger states what must hold of a document's own figures as an expression such as
``abs(61.98 / 24.09 - 2.57) < 0.005``. Admitted: integer and float literals, names bound by the caller,
``+ - * / ** %``, unary ``+ - not``, chained comparisons, ``and or``, and calls of ``abs min max round ceil floor``.
Everything else is an error that names the column.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

from vbench.errors import DataError

Number = int | float

#: Limits on ``**`` and on the length: they keep a typing mistake from costing minutes or gigabytes.
MAX_EXPONENT = 1024
MAX_BITS = 1 << 14  # of a whole-number power: powers of powers would grow without end
MAX_LENGTH = 1000

_BINARY: Mapping[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Number, Number], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
#: name -> (function, fewest arguments, most arguments)
_FUNCTIONS: Mapping[str, tuple[Callable[..., Number], int, int]] = {
    "abs": (abs, 1, 1),
    "min": (min, 2, 99),
    "max": (max, 2, 99),
    "round": (round, 1, 2),
    "ceil": (math.ceil, 1, 1),
    "floor": (math.floor, 1, 1),
}


def parse(expression: str) -> ast.expr:
    """The expression's tree.

    Raises:
        DataError: not one expression of this language's grammar; the message gives the column (from 1).
    """
    if len(expression) > MAX_LENGTH:
        raise DataError(f"expression of {len(expression)} characters is longer than {MAX_LENGTH}")
    source = expression.strip()
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = getattr(error, "offset", None) or len(source) + 1
        raise DataError(f"column {column}: {source!r} is not an arithmetic expression") from None
    _validate(tree, source)
    return tree


def names(expression: str) -> frozenset[str]:
    """Names the expression needs bound. Raises DataError as ``parse`` does."""
    tree = parse(expression)
    called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    return frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called)


def evaluate(expression: str, bindings: Mapping[str, float] | None = None) -> Number | bool:
    """The expression's value; ``bool`` where it is a comparison or a logical combination of them.

    Args:
        bindings: values of the names in it.

    Raises:
        DataError: not of this language, an unbound name, division by zero, overflow, or a truth value used as a
            number (or the reverse). The message gives the column (from 1) and the expression.
    """
    return _value(parse(expression), expression.strip(), bindings or {})


def _fail(node: ast.AST, source: str, rule: str) -> DataError:
    return DataError(f"column {getattr(node, 'col_offset', 0) + 1}: {rule} in {source!r}")


def _validate(node: ast.AST, source: str) -> None:
    """Raise DataError unless every node is of the language."""
    match node:
        case ast.Constant(value=value):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _fail(node, source, f"{value!r} is not a number")
        case ast.Name():
            if node.id in _FUNCTIONS:
                raise _fail(node, source, f"function {node.id!r} needs arguments")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not()):
            _validate(node.operand, source)
        case ast.BinOp():
            if type(node.op) not in _BINARY:
                raise _fail(node, source, f"operator {type(node.op).__name__} is not admitted")
            _validate(node.left, source)
            _validate(node.right, source)
        case ast.BoolOp():
            for part in node.values:
                _validate(part, source)
        case ast.Compare():
            for op in node.ops:
                if type(op) not in _COMPARE:
                    raise _fail(node, source, f"comparison {type(op).__name__} is not admitted")
            for part in (node.left, *node.comparators):
                _validate(part, source)
        case ast.Call(func=ast.Name(id=name)):
            if name not in _FUNCTIONS:
                raise _fail(node, source, f"unknown function {name!r} (known: {', '.join(sorted(_FUNCTIONS))})")
            _, fewest, most = _FUNCTIONS[name]
            if node.keywords or not fewest <= len(node.args) <= most:
                raise _fail(node, source, f"{name} takes {fewest} to {most} plain arguments")
            for argument in node.args:
                _validate(argument, source)
        case _:
            raise _fail(node, source, f"{type(node).__name__} is not admitted")


def _number(node: ast.AST, source: str, bindings: Mapping[str, float]) -> Number:
    value = _value(node, source, bindings)
    if isinstance(value, bool):
        raise _fail(node, source, "a truth value stands where a number is needed")
    return value


def _truth(node: ast.AST, source: str, bindings: Mapping[str, float]) -> bool:
    value = _value(node, source, bindings)
    if not isinstance(value, bool):
        raise _fail(node, source, "a number stands where a truth value is needed")
    return value


def _value(node: ast.AST, source: str, bindings: Mapping[str, float]) -> Number | bool:
    match node:
        case ast.Constant(value=int() | float() as constant):
            return constant
        case ast.Name():
            if node.id not in bindings:
                raise _fail(node, source, f"name {node.id!r} has no value")
            return bindings[node.id]
        case ast.UnaryOp():
            if isinstance(node.op, ast.Not):
                return not _truth(node.operand, source, bindings)
            operand = _number(node.operand, source, bindings)
            return -operand if isinstance(node.op, ast.USub) else operand
        case ast.BoolOp():
            # Every part is evaluated, so that a mistake in a later one is not hidden by the first.
            parts = [_truth(value, source, bindings) for value in node.values]
            return all(parts) if isinstance(node.op, ast.And) else any(parts)
        case ast.Compare():
            operands = [_number(part, source, bindings) for part in (node.left, *node.comparators)]
            return all(
                _COMPARE[type(op)](left, right)
                for op, left, right in zip(node.ops, operands, operands[1:], strict=False)
            )
        case ast.BinOp():
            left = _number(node.left, source, bindings)
            right = _number(node.right, source, bindings)
            if isinstance(node.op, ast.Pow) and abs(right) > MAX_EXPONENT:
                raise _fail(node, source, f"exponent {right} is beyond {MAX_EXPONENT}")
            if isinstance(node.op, ast.Pow) and isinstance(left, int) and left.bit_length() * abs(right) > MAX_BITS:
                raise _fail(node, source, "overflow")
            try:
                result = _BINARY[type(node.op)](left, right)
            except ZeroDivisionError:
                raise _fail(node, source, "division by zero") from None
            except OverflowError:
                raise _fail(node, source, "overflow") from None
            if isinstance(result, complex):
                raise _fail(node, source, "the power is not a real number")
            return result
        case ast.Call(func=ast.Name(id=name)):
            arguments = [_number(argument, source, bindings) for argument in node.args]
            if name == "round" and len(arguments) == 2 and not isinstance(arguments[1], int):
                raise _fail(node, source, "round takes a whole number of digits")
            try:
                return _FUNCTIONS[name][0](*arguments)
            except (ValueError, OverflowError):
                raise _fail(node, source, f"{name} of a value that is not finite") from None
        case _:  # _validate admits nothing else
            raise _fail(node, source, f"{type(node).__name__} is not admitted")
