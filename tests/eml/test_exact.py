"""Exact trees: the compiler against direct evaluation, known sizes, and recovery from samples."""

import cmath
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from kizzasi.eml.exact import enumerate as tree_search
from kizzasi.eml.exact.anneal import MasterFormula, train_master_formula
from kizzasi.eml.exact.compiler import compile_expression, constant, verify
from kizzasi.eml.exact.enumerate import TreeSearch, search_tree
from kizzasi.eml.exact.tree import ONE, evaluate, formula, leaf, node
from kizzasi.errors import ShapeError, SpecError

SIZES = {
    "exp(x)": (3, 1), "ln(x)": (7, 3), "0": (7, 3), "x - y": (11, 4), "-x": (17, 6),
    "x * y": (17, 8), "x / y": (17, 8), "x + y": (19, 8), "x ^ y": (25, 9), "1 / x": (17, 8),
}  # fmt: skip


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_compiled_sizes(text, size):
    tree = compile_expression(text)
    assert (tree.size, tree.depth) == size
    assert str(tree).count("eml(") == (tree.size - 1) / 2
    assert tree.distinct <= tree.size
    assert verify(tree, text).ok


@pytest.mark.parametrize("text", ["x + y", "x - y", "x * y", "x / y", "-x", "x^2", "exp(-x)"])
def test_identities_hold_for_negative_numbers(text):
    assert verify(compile_expression(text), text, -2.0, 2.0).ok


FORMULAS = [
    "exp(-x^2 / 2) / sqrt(2)", "(x - 1) / (x + 1)", "ln(x) / ln(y)", "x*y + y*z - 2.5",
    "1 / (1 + exp(-x))", "e^x - 3", "sqrt(x^2 + y^2)", "x^3 - 7*x",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_compiler(text):
    check = verify(compile_expression(text), text)
    assert check.ok, check


EXPRESSIONS = st.recursive(
    st.sampled_from(["x", "y", "1", "2"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
        inner.map(lambda t: f"ln({t})"),
        inner.map(lambda t: f"exp({t})"),
    ),
    max_leaves=4,
)


@settings(max_examples=30, deadline=None, database=None)
@given(EXPRESSIONS)
def test_compiler_on_random_expressions(text):
    """Points are generic, so neither side meets a pole; huge intermediates may lose digits."""
    tree = compile_expression(text)
    x = {"x": torch.tensor([0.7312]).double(), "y": torch.tensor([1.3391]).double()}
    value = evaluate(tree, x)
    scope = {"x": complex(x["x"]), "y": complex(x["y"]), "exp": cmath.exp, "ln": cmath.log}
    try:
        direct = eval(text, scope)
    except (ZeroDivisionError, OverflowError, ValueError):
        return
    if abs(direct) < 1e3 and abs(direct) > 1e-3 and abs(direct.imag) < 3:
        assert abs(complex(value) - direct) < 1e-4 * (1 + abs(direct))


@pytest.mark.parametrize("text", ["sin(x)", "x +", "x if y else z", "f.x", "exp(x, y)", "'a'"])
def test_refused_expressions(text):
    with pytest.raises(SpecError):
        compile_expression(text)


def test_trees_are_shared_and_need_their_variables():
    x = leaf("x")
    assert node(x, ONE) is node(leaf("x"), ONE)
    assert compile_expression("exp(ln(x))") is x
    assert formula(compile_expression("ln(x)")) == "ln(x)"
    assert formula(node(node(x, ONE), x)) == "(exp(exp(x)) - ln(x))"
    with pytest.raises(SpecError, match="'x' has no value"):
        evaluate(x, {"y": torch.ones(1)})


def random_tree(depth, generator):
    if depth == 0:
        return ONE if torch.rand(1, generator=generator) < 0.5 else leaf("x")
    other = int(torch.randint(depth, (1,), generator=generator))
    pair = random_tree(depth - 1, generator), random_tree(other, generator)
    return node(*(pair if torch.rand(1, generator=generator) < 0.5 else pair[::-1]))


SAMPLES = {"x": torch.linspace(0.3, 1.7, 10, dtype=torch.float64)}


def targets(depth, count):
    generator = torch.Generator().manual_seed(depth)
    found = []
    while len(found) < count:
        tree = random_tree(depth, generator)
        value = evaluate(tree, SAMPLES)
        if (value.abs() < 1e4).all() and value.real.std() > 1e-3:
            found.append((tree, value))
    return found


@pytest.mark.parametrize(("depth", "count"), [(2, 5), (3, 5)])
def test_search_recovers_every_tree(depth, count):
    for tree, value in targets(depth, count):
        found = search_tree(SAMPLES, value, depth)
        assert found.tree is not None
        assert found.error <= 1e-8
        assert found.tree.size <= 2 ** (depth + 1) - 1
        other = {"x": torch.linspace(0.35, 1.6, 7, dtype=torch.float64)}
        difference = (evaluate(found.tree, other) - evaluate(tree, other)).abs()
        assert (difference <= 1e-6 * (1 + evaluate(tree, other).abs())).all()


def test_search_of_two_variables_and_of_nothing():
    samples = SAMPLES | {"y": torch.linspace(2.0, 0.4, 10, dtype=torch.float64).sqrt()}
    tree = node(node(leaf("x"), leaf("y")), node(leaf("y"), ONE))
    assert search_tree(samples, evaluate(tree, samples), 2).tree is tree
    assert search_tree(SAMPLES, torch.sin(9 * SAMPLES["x"]), 3).tree is None


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_master_formula_size(depth):
    assert MasterFormula(depth, ["x"], 2).parameter_count == 5 * 2**depth - 6


@pytest.mark.parametrize("depth", [2, 3])
def test_training_recovers_trees(depth):
    for _, value in targets(depth, 1):
        found = train_master_formula(SAMPLES, value, depth, restarts=48, steps=60)
        assert found.tree is not None


@pytest.mark.parametrize(("set_size", "depth"), [(100, 3), (100, 4), (2000, 5)])
def test_search_meets_in_the_middle(monkeypatch, set_size, depth):
    """Sets of depth 2 and 3 only; one level is looked up, one peeled."""
    monkeypatch.setattr(tree_search, "_MAX_SET", set_size)
    search = TreeSearch(SAMPLES)
    for tree, value in targets(depth, 8):
        found = search.find(value, depth)
        if min(tree.left.depth, tree.right.depth) > search.known.depth:
            continue  # no sibling is known: that is beyond the search's promise
        assert found.tree is not None
        assert found.tree.depth <= depth
        other = {"x": torch.linspace(0.35, 1.6, 7, dtype=torch.float64)}
        difference = (evaluate(found.tree, other) - evaluate(tree, other)).abs()
        assert (difference <= 1e-6 * (1 + evaluate(tree, other).abs())).all()
        assert search.find(value, depth, lookups=0).tree in (None, found.tree)
    assert search.known.depth == (2 if set_size == 100 else 3)


@pytest.mark.parametrize("text", [
    "9.81*x", "3.14159*x^2", "12345.678*x", "299792458*x", "x+710", "x-1000", "1000-x", "-2000+x",
    "x*71+1000*3", "-100000*x", "6.02e23*x", "x/1.6e-19", "1e300", "1000000", "0.0001", "x+1e10",
])  # fmt: skip
def test_constants_are_exact_at_any_size(text):
    check = verify(compile_expression(text), text)
    assert check.ok, check
    check = verify(compile_expression(text, wide=True), text)
    assert check.ok, check


def test_every_whole_number_compiles():
    for n in [*range(0, 800, 37), *range(711, 2999, 166), 981, 1023, 1024, 2**40 + 1, 10**15 + 7]:
        value = complex(evaluate(constant(Fraction(n)), {}))
        assert abs(value - n) < 1e-9 * (1 + n), n


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("x+y", 300, 1000), ("x-y", 300, 1000), ("x^2+y^2", 20, 50), ("(x+y)*(x-y)", 10, 500),
        ("x+y", -1e6, 1e6), ("x-y-z", 1e5, 1e9), ("-x", 800, 900), ("5-x", 800, 900),
        ("x+3", -5e3, 5e3), ("5e4-x", 800, 900),
    ],
)  # fmt: skip
def test_wide_sums(text, low, high):
    check = verify(compile_expression(text, wide=True), text, low, high)
    assert check.ok, check
    assert not verify(compile_expression(text), text, low, high).ok


def test_wide_forms_hold_for_small_numbers_too():
    for text in [*FORMULAS, *SIZES]:
        assert verify(compile_expression(text, wide=True), text).ok, text
    zero = {"x": torch.zeros(1, dtype=torch.float64)}
    for text, value in (("x + 3", 3), ("3 - x", 3), ("x - 3", -3), ("-x", 0), ("1000 + x", 1000)):
        assert abs(complex(evaluate(compile_expression(text, True), zero)) - value) < 1e-9, text


@pytest.mark.parametrize("terms", [400, 2000])
def test_long_expressions_need_no_recursion(terms):
    text = "+".join(["x"] * terms)
    tree = compile_expression(text)
    x = {"x": torch.linspace(0.1, 0.3, 5, dtype=torch.float64)}
    assert_close(evaluate(tree, x).real, terms * x["x"])
    assert verify(tree, text, 0.1, 0.3).ok
    assert str(tree).count("x") == len(re.findall(r"\bx\b", formula(tree))) == terms


def test_trees_too_long_to_write_say_so():
    tree = leaf("x")
    for _ in range(40):
        tree = node(tree, tree)
    for write in (str, formula):
        with pytest.raises(SpecError, match="longer than"):
            write(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("True", "cannot be compiled"), ("1e400", "beyond float64"), ("10**400", "x"),
        ("9" * 5000, "not an expression"), ("1" + "0" * 400, "1020 bits"),
        ("", "not an expression"), ("x\0", "not an expression"),
        ("(" * 5000 + "x" + ")" * 5000, "not an expression|too deeply"),
        ("sin(" + "+".join(["x"] * 3000) + ")", "cannot be compiled|too deeply"),
        ("-" * 100_000 + "x", "too deeply|not an expression"),
    ],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_refusals_are_one_short_line(text, message):
    if text == "10**400":  # a power of constants: compiled, and infinite
        assert not complex(evaluate(compile_expression(text), {})).real < 1e300
        return
    with pytest.raises(SpecError, match=message) as caught:
        compile_expression(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("find", [search_tree, train_master_formula])
def test_samples_are_checked(find):
    y = torch.ones(8, dtype=torch.float64)
    with pytest.raises(SpecError, match="at least one name"):
        find({}, y, 2)
    with pytest.raises(SpecError, match="at least one name"):
        find({"x": y[:0]}, y[:0], 2)
    with pytest.raises(ShapeError, match=r"\(7,\)"):
        find({"x": y[:7]}, y, 2)
    with pytest.raises(ShapeError, match="one"):
        evaluate(node(leaf("x"), leaf("y")), {"x": y, "y": y[:7]})
