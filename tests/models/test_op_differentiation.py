"""Every op under torch.func and twice differentiated: its own engine against the defining loop."""

import pytest
import torch
from op_cases import OPS, STARTS, every_op, normal
from tolerance import assert_close
from torch.func import grad, jacfwd, jvp, vmap

from kizzasi.models.ops import conv, scan_blocks

# torch scripts its own decompositions for forward mode, and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
packed = pytest.mark.parametrize("starts", [None, STARTS], ids=["whole", "packed"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(conv, "BLOCK_ELEMENTS", 20)
    monkeypatch.setattr(scan_blocks, "BLOCK_STATES", 1)


def flat(outputs):
    y, state = outputs
    leaves = (y, state) if isinstance(state, torch.Tensor) else (y, *state)
    return torch.cat([leaf.flatten() for leaf in leaves])


def forms(name, starts):
    """The fast op and the loop as functions to one vector, and their inputs."""
    fast, loop, make, _ = OPS[name]
    inputs, options = make()
    given = tuple(x.clone().requires_grad_() for x in inputs if x is not None)

    def form(op):
        def run(*xs):
            xs = iter(xs)
            full = [None if x is None else next(xs) for x in inputs]
            return flat(op(*full, starts=starts, **options))

        return run

    return form(fast), form(loop), given


def loss(form):
    return lambda *inputs: (form(*inputs).square() * 0.5).sum()


@every_op
@packed
def test_gradients_of_gradients(name, starts):
    fast, loop, inputs = forms(name, starts)
    results = []
    for form in (fast, loop):
        first = torch.autograd.grad(loss(form)(*inputs), inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append((*first, *torch.autograd.grad(penalty, inputs)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@every_op
@packed
def test_gradcheck_twice_forward_mode_and_batched(name, starts):
    fast, _, inputs = forms(name, starts)
    assert torch.autograd.gradcheck(
        fast, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(fast, inputs, fast_mode=True)


@every_op
@packed
def test_torch_func(name, starts):
    fast, loop, inputs = forms(name, starts)
    inputs = tuple(x.detach() for x in inputs)
    every = tuple(range(len(inputs)))
    directions = tuple(0.1 * normal(*x.shape, seed=9) for x in inputs)
    for a, b in zip(*(grad(loss(f), every)(*inputs) for f in (fast, loop)), strict=True):
        assert_close(a, b)
    for a, b in zip(*(jvp(f, inputs, directions) for f in (fast, loop)), strict=True):
        assert_close(a, b)
    assert_close(jacfwd(fast)(*inputs), jacfwd(loop)(*inputs))

    def many(form):
        shifted = tuple(
            torch.stack([x, x + 0.1 * d]) for x, d in zip(inputs, directions, strict=True)
        )
        return vmap(grad(loss(form), every))(*shifted)

    for a, b in zip(many(fast), many(loop), strict=True):
        assert_close(a, b)


@every_op
def test_a_gradient_for_each_row(name):
    """vmap over grad with shared weights: what per-example clipping needs."""
    fast, loop, inputs = forms(name, None)
    results = []
    for form in (fast, loop):
        batch = tuple(x.detach() for x in inputs)
        stacked = torch.stack([batch[0], 2 * batch[0]])
        per_row = vmap(grad(loss(form), tuple(range(len(batch)))), (0, *[None] * (len(batch) - 1)))
        results.append(per_row(stacked, *batch[1:]))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
