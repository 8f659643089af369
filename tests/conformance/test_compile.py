"""Every mixer is one graph: torch.compile without a break, torch.export of the step, checkpoints of
activations."""

import pytest
import torch
from cases import CHANNELS, MIXERS, every_part, make, tokens
from tolerance import assert_close

from kizzasi.models.state import map_state, named_leaves


# The compiler itself makes a Function and looks at .grad while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def leaves(state):
    return [leaf for _, leaf in named_leaves(state)]


@every_part
def test_forward_and_its_gradients_compile_to_one_graph(name):
    model, x = make(name), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = model(x), compiled(x)
    assert_close(actual.logits, expected.logits)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected.loss(x), parameters, allow_unused=True)
    given = torch.autograd.grad(actual.loss(x), parameters, allow_unused=True)
    for a, b in zip(given, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(a, b)


@every_part
def test_step_compiles_to_one_graph(name):
    model, x = make(name), tokens(2, 9)
    state = model(x).state.detach()
    compiled = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    for t in range(3):
        expected, actual = model.step(x[:, t], state), compiled(x[:, t], state)
        assert_close(actual.logits, expected.logits)
        state = actual.state.detach()


class Step(torch.nn.Module):
    """A model's step over plain tensors, as exporters want it."""

    def __init__(self, model, state):
        super().__init__()
        self.model, self.like = model, state

    def forward(self, ids, *state):
        order = iter(state)
        out = self.model.step(ids, map_state(lambda _: next(order), self.like))
        return out.logits, *leaves(out.state)


@every_part
def test_step_exports(name):
    model, x = make(name).eval(), tokens(2, 9)
    state = model(x).state.detach()
    program = torch.export.export(Step(model, state), (x[:, 0], *leaves(state)))
    logits, *after = program.module()(x[:, 0], *leaves(state))
    expected = model.step(x[:, 0], state)
    assert_close(logits, expected.logits)
    assert len(after) == len(leaves(expected.state))
