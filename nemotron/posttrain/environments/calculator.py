"""Evaluates arithmetic that a model wrote, exactly, and never runs it as code."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 300
"""Characters of the longest expression."""
MAX_BITS = 4096
"""Bits of the largest numerator and denominator on the way."""
MAX_DIGITS = 12
"""Decimal places of a result that is not a whole number."""

ALLOWED = re.compile(
    r"(?:\s|[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?|\.[0-9]+|abs|min|max|[-+*/%(),])*"
)
"""What an expression is made of; Python's parser warns about much of the rest."""

BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., Fraction]] = {"abs": abs, "min": min, "max": max}


class BadExpression(ValueError):
    """A text is not arithmetic that is evaluated here; says why."""


def evaluate(text: str) -> Fraction:
    """Return the value of `+ - * / // % **`, brackets, `abs`, `min` and `max` over numbers.

    Raises:
        BadExpression: for anything else, a division by zero, and numbers that are too large.
    """
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        raise BadExpression(f"the expression must be a text of at most {MAX_LENGTH} characters")
    if ALLOWED.fullmatch(text) is None:
        raise BadExpression("an expression has numbers, + - * / // % **, brackets, abs, min, max")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, BadExpression):
            raise
        raise BadExpression("this is not an arithmetic expression") from None
    except ZeroDivisionError:
        raise BadExpression("division by zero") from None


def render(value: Fraction) -> str:
    """Return a number as a decimal, rounded where it does not end."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**MAX_DIGITS)
    sign, digits = "-" * (scaled < 0), str(abs(scaled)).rjust(MAX_DIGITS + 1, "0")
    decimals = digits[-MAX_DIGITS:].rstrip("0")
    return f"{sign}{digits[:-MAX_DIGITS]}.{decimals}".rstrip(".")


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(Fraction(repr(node.value)))  # 0.1 is a tenth
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in BINARY:
            return _bounded(BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = FUNCTIONS.get(node.func.id)
        arguments = [_value(argument) for argument in node.args]
        if function is not None and len(arguments) >= 1 + (function is not abs):
            if function is abs and len(arguments) > 1:
                raise BadExpression("abs takes one number")
            return function(*arguments)
    raise BadExpression(f"{ast.unparse(node)[:40]} is not supported")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise BadExpression("an exponent must be a whole number")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size * abs(exponent.numerator) > MAX_BITS:
        raise BadExpression("the result is too large")
    return Fraction(base**exponent.numerator)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise BadExpression("the result is too large")
    return value
