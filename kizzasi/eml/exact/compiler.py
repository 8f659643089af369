"""Compile an expression to an exact EML tree, and check it. Every rule is an identity of eml."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

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


# -- constants and large summands ----------------------------------------------------------------

# exp overflows at 709.78, and x + y is ln(exp x exp y). What a sum must hold beyond that enters
# through the other side of eml, exp(ln x), which has no bound.
_LARGE = 512
_MOST_BITS = 1020


@cache
def constant(value: Fraction) -> Tree:
    """Build a rational number from 1 alone: the smaller of a sum and a product of halves.

    Above 512 a whole number is 2^k (q + r / 2^k) with q in [256, 512), so that every summand stays
    small, whatever the number.

    Raises:
        SpecError: numerator or denominator beyond 2^1020.
    """
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise SpecError(f"a constant has more than {_MOST_BITS} bits; float64 cannot hold it")
    if value < 0:
        return negate(constant(-value)) if value >= -_LARGE else _times_minus_one(constant(-value))
    if value.denominator != 1:
        return divide(constant(Fraction(value.numerator)), constant(Fraction(value.denominator)))
    n = value.numerator
    if n == 0:
        return ln_of(ONE)
    if n == 1:
        return ONE
    if n <= _LARGE:
        if n % 2 or n == 2:
            return add(constant(value - 1), ONE)
        return multiply(constant(value / 2), constant(Fraction(2)))
    twos = (n & -n).bit_length() - 1
    if twos:
        odd, power = constant(Fraction(n >> twos)), _power_of_two(twos)
        return power if odd is ONE else multiply(odd, power)
    shift = n.bit_length() - _LARGE.bit_length() + 1
    high, low = divmod(n, 1 << shift)
    part = divide(constant(Fraction(low)), _power_of_two(shift))
    return multiply(add(constant(Fraction(high)), part), _power_of_two(shift))


@cache
def _power_of_two(k: int) -> Tree:
    if k == 1:
        return constant(Fraction(2))
    half = _power_of_two(k // 2)
    square = multiply(half, half)
    return multiply(square, constant(Fraction(2))) if k % 2 else square


def _times_minus_one(x: Tree) -> Tree:
    """-x for any x: x times exp(i pi)."""
    return multiply(x, negate(ONE))


def _shift(x: Tree, c: Fraction) -> Tree:
    """x + c = eml(ln x, exp(-c)) for any x, and c small."""
    return node(ln_of(x), exp_of(constant(-c)))


def _wide_add(x: Tree, y: Tree) -> Tree:
    """x + y = x (y / x + 1), for any x but 0."""
    return multiply(x, _shift(divide(y, x), Fraction(1)))


def _wide_subtract(x: Tree, y: Tree) -> Tree:
    """x - y = y (x / y - 1), for any y but 0."""
    return multiply(y, _shift(divide(x, y), Fraction(-1)))


@dataclass(frozen=True)
class _Value:
    """A compiled part, and its exact value where that is a known rational."""

    tree: Tree
    known: Fraction | None = None

    @property
    def large(self) -> bool:
        return self.known is not None and abs(self.known) > _LARGE


def _sum(x: _Value, y: _Value, wide: bool) -> Tree:
    """x + y, by the form that fits what is known of both."""
    if x.known is None or (y.large and not x.large):
        x, y = y, x
    c = x.known
    if c is None:
        return _wide_add(x.tree, y.tree) if wide else add(x.tree, y.tree)
    if y.known is not None and abs(c) + abs(y.known) > _LARGE:
        return constant(c + y.known)
    if not x.large:
        return _shift(y.tree, c) if wide else add(x.tree, y.tree)
    if wide:  # c (y / c + 1)
        return multiply(x.tree, _shift(multiply(y.tree, constant(1 / c)), Fraction(1)))
    if c > 0:
        return node(ln_of(x.tree), exp_of(negate(y.tree)))  # eml(ln c, exp(-y)) = c + y
    return _times_minus_one(subtract(constant(-c), y.tree))


def _difference(x: _Value, y: _Value, wide: bool) -> Tree:
    """x - y, by the form that fits what is known of both."""
    if y.known is not None and (x.large or y.large or wide):
        return _sum(x, _Value(constant(-y.known), -y.known), wide)
    if not wide:
        return subtract(x.tree, y.tree)
    if x.known is None:
        return _wide_subtract(x.tree, y.tree)
    if x.large:  # c - y = -c (y / c - 1)
        ratio = multiply(y.tree, constant(1 / x.known))
        return multiply(constant(-x.known), _shift(ratio, Fraction(-1)))
    return _times_minus_one(_shift(y.tree, -x.known))


_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
_UNARY = {"exp": exp_of, "ln": ln_of, "log": ln_of, "sqrt": sqrt_of}
_MAX_POWER = 64


def compile_expression(text: str, wide: bool = False) -> Tree:
    """Compile an expression to an exact EML tree.

    Allowed: + - * / ^ (or **), exp, ln (or log), sqrt, rational constants, e, and variables.
    Real inputs are assumed to keep imaginary parts within (-pi, pi], where ln(exp u) = u.

    Constants are exact at any size. Other summands, and their sums, must stay below 700 unless
    `wide`: exp of them is taken on the way, which float64 holds to 709. `verify` shows it.

    Args:
        text: for example "exp(-x^2 / 2) * sqrt(y)".
        wide: sums of any size, by x + y = x (y / x + 1) and x - y = y (x / y - 1): some 40 nodes
            more each, and undefined where that divisor is exactly 0.

    Returns:
        the tree; its `size`, `depth` and `distinct` say what it costs.

    Raises:
        SpecError: a syntax error, an operation outside the list, or a constant beyond float64.
    """
    done: list[_Value] = []
    for at, operands in _in_order(_parse(text), text):
        parts = done[len(done) - operands :]
        del done[len(done) - operands :]
        tree = _combine(at, parts, wide)
        done.append(_Value(tree, _known(at, [part.known for part in parts])))
    return done[0].tree


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text.replace("^", "**").strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise SpecError(f"{text!r:.80} is not an expression: {reason}") from error
    except (RecursionError, MemoryError) as error:
        raise SpecError(
            f"{text!r:.80} is nested too deeply for Python's parser; split it"
        ) from error


def _in_order(root: ast.expr, text: str) -> Iterator[tuple[ast.expr, int]]:
    """Yield every part after its operands, with how many it has, however deep they are."""
    stack: list[tuple[ast.expr, int]] = [(root, -1)]
    while stack:
        at, count = stack.pop()
        if count >= 0:
            yield at, count
            continue
        operands = _operands(at, text)
        stack.append((at, len(operands)))
        stack += [(each, -1) for each in reversed(operands)]


def _operands(at: ast.expr, text: str) -> list[ast.expr]:
    """Return the operands of a part, or refuse it."""
    if isinstance(at, ast.Constant) and type(at.value) in (int, float):
        if isinstance(at.value, float) and not math.isfinite(at.value):
            raise SpecError(f"{text!r:.80} has a constant beyond float64")
        return []
    if isinstance(at, ast.Name):
        return []
    if isinstance(at, ast.UnaryOp) and isinstance(at.op, (ast.USub, ast.UAdd)):
        return [at.operand]
    if isinstance(at, ast.BinOp) and isinstance(at.op, _OPERATORS):
        return [at.left, at.right]
    if isinstance(at, ast.Call) and len(at.args) == 1 and not at.keywords:
        function = at.func.id if isinstance(at.func, ast.Name) else ""
        if function in _UNARY:
            return at.args
    part = ast.get_source_segment(text.replace("^", "**").strip(), at)
    raise SpecError(
        f"{part!r:.80} in {text!r:.80} cannot be compiled; "
        f"use + - * / ^, {', '.join(_UNARY)}, numbers, e and variables"
    )


def _combine(at: ast.expr, parts: list[_Value], wide: bool) -> Tree:
    """Compile one part from its compiled operands."""
    if isinstance(at, ast.Constant):
        return constant(Fraction(str(at.value)))
    if isinstance(at, ast.Name):
        return E if at.id == "e" else leaf(at.id)
    x = parts[0]
    if isinstance(at, ast.UnaryOp):
        if isinstance(at.op, ast.UAdd):
            return x.tree
        if x.known is not None:
            return constant(-x.known)
        return _times_minus_one(x.tree) if wide else negate(x.tree)
    if isinstance(at, ast.Call):
        assert isinstance(at.func, ast.Name)
        return _UNARY[at.func.id](x.tree)
    assert isinstance(at, ast.BinOp)
    y = parts[1]
    if isinstance(at.op, ast.Add):
        return _sum(x, y, wide)
    if isinstance(at.op, ast.Sub):
        return _difference(x, y, wide)
    if isinstance(at.op, ast.Pow):
        return _power(x.tree, y.tree, at.right)
    return (multiply if isinstance(at.op, ast.Mult) else divide)(x.tree, y.tree)


def _known(at: ast.expr, parts: list[Fraction | None]) -> Fraction | None:
    """Return the exact value of a part, if it is a rational of moderate length."""
    if isinstance(at, ast.Constant):
        return Fraction(str(at.value))
    if isinstance(at, ast.UnaryOp) and parts[0] is not None:
        return -parts[0] if isinstance(at.op, ast.USub) else parts[0]
    if not isinstance(at, ast.BinOp) or parts[0] is None or parts[1] is None:
        return None
    x, y = parts
    if isinstance(at.op, ast.Pow) or (isinstance(at.op, ast.Div) and not y):
        return None
    value = _DIRECT[type(at.op)](x, y)
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    return value if bits <= _MOST_BITS else None


def _power(x: Tree, y: Tree, exponent: ast.expr) -> Tree:
    value = exponent.value if isinstance(exponent, ast.Constant) else None
    if isinstance(value, int) and 1 <= value <= _MAX_POWER:
        return min(power(x, y), _whole_power(x, value), key=lambda tree: tree.size)
    return exp_of(y) if x is E else power(x, y)


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
    expected = _direct(parsed, text, variables).expand(points)
    got = evaluate(tree, variables).expand(points)
    fine = expected.isfinite()
    error = ((got - expected).abs() / (1 + expected.abs()))[fine].nan_to_num(torch.inf)
    worst = float(error.max()) if len(error) else 0.0
    return Check(worst <= tolerance, worst)


_DIRECT: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: torch.pow,
}


def _direct(root: ast.expr, text: str, variables: Mapping[str, Tensor]) -> Tensor:
    """Evaluate a parsed expression without EML."""
    functions = {"exp": torch.exp, "ln": torch.log, "log": torch.log, "sqrt": torch.sqrt}
    done: list[Tensor] = []
    for at, operands in _in_order(root, text):
        parts = done[len(done) - operands :]
        del done[len(done) - operands :]
        if isinstance(at, ast.Constant):
            value = torch.tensor(complex(at.value), dtype=torch.complex128)  # pyright: ignore
        elif isinstance(at, ast.Name) and at.id == "e":
            value = torch.exp(torch.ones((), dtype=torch.complex128))
        elif isinstance(at, ast.Name):
            value = variables[at.id].to(torch.complex128)
        elif isinstance(at, ast.UnaryOp):
            value = -parts[0] if isinstance(at.op, ast.USub) else parts[0]
        elif isinstance(at, ast.Call):
            assert isinstance(at.func, ast.Name)
            value = functions[at.func.id](parts[0])
        else:
            assert isinstance(at, ast.BinOp)
            value = _DIRECT[type(at.op)](*parts)
        done.append(value)
    return done[0]
