"""Every part under torch.func and twice differentiated, against plain backward."""

import pytest
import torch
from cases import every_kind, make, tokens
from tolerance import assert_close
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = [
    # torch scripts its own decompositions for forward mode, and warns of it.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    # Attention has no batching rule of its own: torch loops, and says that it is slow.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
LENGTH = 11


@pytest.fixture
def model(name):
    return make(name).eval()


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model):
    def loss(parameters, row):
        return functional_call(model, parameters, (row[None],)).loss(row[None])

    return loss


def plain(model, row):
    model.zero_grad(set_to_none=True)
    model(row[None]).loss(row[None]).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


@every_kind
def test_a_gradient_for_each_row(name, model):
    rows = tokens(3, LENGTH)
    each = vmap(grad(loss_of(model)), (None, 0), randomness="different")(parameters(model), rows)
    for i, row in enumerate(rows):
        for key, expected in plain(model, row).items():
            assert_close(each[key][i], expected, msg=key)


@every_kind
def test_a_directional_derivative_is_the_gradient_along_it(name, model):
    row, given = tokens(1, LENGTH)[0], parameters(model)
    along = {
        key: torch.sin(1.0 + torch.arange(p.numel(), dtype=p.dtype)).view_as(p)
        for key, p in given.items()
    }
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no forward mode
        _, actual = jvp(lambda p: loss_of(model)(p, row), (given,), (along,))
    expected = sum((g * along[key]).sum() for key, g in plain(model, row).items())
    assert_close(actual, expected)


@every_kind
def test_a_gradient_penalty(name):
    """Twice backward, against the loops that define the ops."""
    row, results = tokens(1, LENGTH), []
    for engine in ("torch", "reference"):
        model = make(name, engine=engine).eval()
        named, how = dict(model.named_parameters()), {"allow_unused": True}
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
            loss = model(row).loss(row)
            first = torch.autograd.grad(loss, list(named.values()), create_graph=True, **how)
            penalty = sum(g.square().sum() for g in first if g is not None)
            second = torch.autograd.grad(penalty, list(named.values()), **how)
        results.append(dict(zip(named, second, strict=True)))
    for key, expected in results[1].items():
        actual = results[0][key]
        assert (actual is None) == (expected is None), key
        if expected is not None:
            assert_close(actual, expected, msg=key)
