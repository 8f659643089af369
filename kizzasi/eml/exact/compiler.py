"""Compile an expression to an exact EML tree, and check it. Every rule is an identity of eml."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from kizzasi.eml.exact.tree import ONE, E, Tree, evaluate, leaf, ln_argument, node
from kizzasi.errors import SpecError


def exp_of(x: Tree) -> Tree:
    """exp x = eml(x, 1). K + 2."""
    inner = ln_argument(x)
    return inner if inner is not None else node(x, ONE)


def ln_of(x: Tree) -> Tree:
    """ln x = eml(1, exp(eml(1, x))). K + 6."""
    if x.right is ONE and x.left is not None:
        return x.left
    return node(ONE, node(node(ONE, x), ONE))


def subtract(x: Tree, y: Tree) -> Tree:
    """x - y = eml(ln x, exp y). K = 11 on leaves."""
    return node(ln_of(x), exp_of(y))


def negate(x: Tree) -> Tree:
    """-x = (e - x) - e, which needs no ln 0, unlike 0 - x. K = 17 on a leaf."""
    return subtract(node(ONE, exp_of(x)), E)


def _log_product(x: Tree, y: Tree) -> Tree:
    """ln x + ln y = e - ln exp(eml(ln(e - ln x), y)). K = 15 on leaves."""
    return node(ONE, node(node(ln_of(node(ONE, x)), y), ONE))


def add(x: Tree, y: Tree) -> Tree:
    """x + y = ln(exp x) + ln(exp y). K = 19 on leaves."""
    return _log_product(exp_of(x), exp_of(y))


def multiply(x: Tree, y: Tree) -> Tree:
    """x y = exp(ln x + ln y). K = 17 on leaves, the shortest known."""
    return exp_of(_log_product(x, y))


def divide(x: Tree, y: Tree) -> Tree:
    """x / y = exp(eml(ln ln x, y)), since exp(ln ln x) - ln y = ln x - ln y. K = 17 on leaves."""
    return exp_of(node(ln_of(ln_of(x)), y))


def power(x: Tree, y: Tree) -> Tree:
    """x^y = exp(y ln x). K = 25 on leaves."""
    return exp_of(multiply(y, ln_of(x)))


def sqrt_of(x: Tree) -> Tree:
    """sqrt x = exp(ln x / 2)."""
    return exp_of(divide(ln_of(x), constant(Fraction(2))))


@cache
def constant(value: Fraction) -> Tree:
    """Build a rational number from 1 alone: the smaller of a sum and a product of halves."""
    if value < 0:
        return negate(constant(-value))
    if value.denominator != 1:
        return divide(constant(Fraction(value.numerator)), constant(Fraction(value.denominator)))
    if value == 0:
        return ln_of(ONE)
    if value == 1:
        return ONE
    half, odd = divmod(value.numerator, 2)
    if odd or half == 1:
        return add(constant(value - 1), ONE)
    return multiply(constant(Fraction(half)), constant(Fraction(2)))


_BINARY: dict[type[ast.operator], Callable[[Tree, Tree], Tree]] = {
    ast.Add: add,
    ast.Sub: subtract,
    ast.Mult: multiply,
    ast.Div: divide,
    ast.Pow: power,
}
_UNARY = {"exp": exp_of, "ln": ln_of, "log": ln_of, "sqrt": sqrt_of}
_MAX_POWER = 64


def compile_expression(text: str) -> Tree:
    """Compile an expression to an exact EML tree.

    Allowed: + - * / ^ (or **), exp, ln (or log), sqrt, rational constants, e, and variables.
    Real inputs are assumed to keep imaginary parts within (-pi, pi], where ln(exp u) = u.

    Args:
        text: for example "exp(-x^2 / 2) * sqrt(y)".

    Returns:
        the tree; its `size`, `depth` and `distinct` say what it costs.

    Raises:
        SpecError: a syntax error, or an operation outside the list.
    """
    return _compile(_parse(text), text)


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text.replace("^", "**"), mode="eval").body
    except SyntaxError as error:
        raise SpecError(f"{text!r} is not an expression: {error.msg}") from error


def _compile(at: ast.expr, text: str) -> Tree:
    if isinstance(at, ast.Constant) and isinstance(at.value, (int, float)):
        return constant(Fraction(str(at.value)))
    if isinstance(at, ast.Name):
        return E if at.id == "e" else leaf(at.id)
    if isinstance(at, ast.UnaryOp) and isinstance(at.op, (ast.USub, ast.UAdd)):
        inner = _compile(at.operand, text)
        return negate(inner) if isinstance(at.op, ast.USub) else inner
    if isinstance(at, ast.BinOp) and type(at.op) in _BINARY:
        left, right = _compile(at.left, text), _compile(at.right, text)
        exponent = at.right.value if isinstance(at.right, ast.Constant) else None
        is_power = isinstance(at.op, ast.Pow)
        if is_power and isinstance(exponent, int) and 1 <= exponent <= _MAX_POWER:
            return min(power(left, right), _whole_power(left, exponent), key=lambda t: t.size)
        if is_power and left is E:
            return exp_of(right)
        return _BINARY[type(at.op)](left, right)
    if isinstance(at, ast.Call) and isinstance(at.func, ast.Name):
        function = _UNARY.get(at.func.id)
        if function is not None and len(at.args) == 1 and not at.keywords:
            return function(_compile(at.args[0], text))
    raise SpecError(
        f"{ast.unparse(at)!r} in {text!r} cannot be compiled; "
        f"use + - * / ^, {', '.join(_UNARY)}, numbers, e and variables"
    )


def _whole_power(x: Tree, exponent: int) -> Tree:
    if exponent == 1:
        return x
    half = _whole_power(x, exponent // 2)
    square = multiply(half, half)
    return multiply(square, x) if exponent % 2 else square


@dataclass(frozen=True)
class Check:
    """What `verify` found: the largest error relative to 1 + |value|, and whether it is small."""

    ok: bool
    max_error: float


def verify(
    tree: Tree,
    text: str,
    low: float = 0.1,
    high: float = 2.0,
    points: int = 256,
    tolerance: float = 1e-8,
) -> Check:
    """Compare a tree with its expression on random points, on complex128.

    Args:
        tree: what is checked.
        text: the expression, evaluated directly.
        low, high: range of every variable.
        points: how many.
        tolerance: bound on |tree - value| / (1 + |value|), at points where the value is finite.
    """
    parsed = _parse(text)
    names = {at.id for at in ast.walk(parsed) if isinstance(at, ast.Name)} - {"e", *_UNARY}
    generator = torch.Generator().manual_seed(0)
    variables = {
        name: torch.rand(points, generator=generator, dtype=torch.float64) * (high - low) + low
        for name in sorted(names)
    }
    expected = _direct(parsed, variables).expand(points)
    got = evaluate(tree, variables).expand(points)
    fine = expected.isfinite()
    error = ((got - expected).abs() / (1 + expected.abs()))[fine].nan_to_num(torch.inf)
    worst = float(error.max()) if len(error) else 0.0
    return Check(worst <= tolerance, worst)


def _direct(at: ast.expr, variables: Mapping[str, Tensor]) -> Tensor:
    """Evaluate a parsed expression without EML."""
    if isinstance(at, ast.Constant):
        return torch.tensor(complex(at.value), dtype=torch.complex128)  # pyright: ignore
    if isinstance(at, ast.Name):
        if at.id == "e":
            return torch.exp(torch.ones((), dtype=torch.complex128))
        return variables[at.id].to(torch.complex128)
    if isinstance(at, ast.UnaryOp):
        inner = _direct(at.operand, variables)
        return -inner if isinstance(at.op, ast.USub) else inner
    if isinstance(at, ast.Call) and isinstance(at.func, ast.Name):
        functions = {"exp": torch.exp, "ln": torch.log, "log": torch.log, "sqrt": torch.sqrt}
        return functions[at.func.id](_direct(at.args[0], variables))
    assert isinstance(at, ast.BinOp)
    left, right = _direct(at.left, variables), _direct(at.right, variables)
    operators = {
        ast.Add: torch.add,
        ast.Sub: torch.sub,
        ast.Mult: torch.mul,
        ast.Div: torch.div,
        ast.Pow: torch.pow,
    }
    return operators[type(at.op)](left, right)
