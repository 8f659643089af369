"""Every kind is one graph: torch.compile without a break, torch.export of the step. And every kind
has a deterministic backward.

One layer of the first variant of every kind, as compilers are slow. The fast suite captures the
graphs of all kinds and runs them as they are ("eager"); the slow one also has the compiler derive
their gradients ("aot_eager"). What does not compile to one graph are documents (segment_ids, mask)
in s4, s4d and long_conv, whose convolutions are sorted by the documents' lengths; without
fullgraph, or without documents, they compile.
"""

import cases
import pytest
import torch
from cases import every_causal_kind, every_kind, make, tokens
from tolerance import assert_close

from kizzasi.models.export import StepModule
from kizzasi.models.ops import devices
from kizzasi.models.ops import selective_scan as scan

# The compiler itself makes a Function and looks at .grad while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

backends = pytest.mark.parametrize(
    "backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)]
)


@pytest.fixture(autouse=True)
def one_layer_and_a_fresh_compiler(monkeypatch):
    monkeypatch.setattr(cases, "LAYERS", 1)
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=False)


def assert_same_gradients(actual, expected, model, x):
    parameters = list(model.parameters())
    given, wanted = (
        torch.autograd.grad(out.loss(x), parameters, allow_unused=True)
        for out in (actual, expected)
    )
    for a, b in zip(given, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(a, b)


@every_kind
@backends
def test_forward_and_its_gradients_compile_to_one_graph(name, backend):
    model, x = make(name), tokens(2, 9)
    actual, expected = compiled(model, backend)(x), model(x)
    assert_close(actual.logits, expected.logits)
    assert_same_gradients(actual, expected, model, x)


@every_causal_kind
@backends
@torch.no_grad()
def test_step_compiles_to_one_graph(name, backend):
    model, x = make(name), tokens(2, 9)
    before = model(x[:, :-1]).state
    actual, expected = compiled(model.step, backend)(x[:, -1], before), model.step(x[:, -1], before)
    assert_close(actual.logits, expected.logits)


@every_causal_kind
def test_step_exports(name):
    model, x = make(name).eval(), tokens(2, 9)
    step, state = StepModule(model, batch_size=2), model(x).state.detach()
    program = torch.export.export(step, (x[:, 0], *step.flat(state)))
    logits, *after = program.module()(x[:, 0], *step.flat(state))
    expected = model.step(x[:, 0], state)
    assert_close(logits, expected.logits)
    for a, b in zip(after, step.flat(expected.state), strict=True):
        a, b = (torch.view_as_real(v) if v.is_complex() else v.double() for v in (a, b))
        assert_close(a, b)


@pytest.mark.parametrize("name", ["attention-mha", "mamba-small", "rwkv7-two-heads"])
@backends
@torch.no_grad()
def test_documents_and_padding_compile_to_one_graph(name, backend):
    model, x = make(name), tokens(2, 9)
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    ids = torch.tensor([[3] * 4 + [5] * 5, [1] * 5 + [2] * 4])
    forward = compiled(model, backend)
    actual = forward(x, mask=mask, segment_ids=ids).logits[mask]
    assert_close(actual, model(x, mask=mask, segment_ids=ids).logits[mask])
    with pytest.raises(RuntimeError, match="padding after a real token"):
        forward(x, mask=~mask, segment_ids=ids)


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("length", [9, 200])
def test_a_scan_is_one_node_whatever_its_length(length, cpu, monkeypatch):
    monkeypatch.setattr(devices, "on_cpu", lambda x: cpu)
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    g = torch.Generator().manual_seed(0)
    shapes = {"u": (3, length, 4), "dt": (3, length, 4), "A": (4, 2), "B": (3, length, 2)}
    shapes |= {"C": (3, length, 2), "D": (4,), "h0": (3, 4, 2)}
    made = {k: torch.rand(s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    inputs = [made[k].neg() if k == "A" else made[k] for k in shapes]
    y, h = compiled(scan.selective_scan, note)(*inputs)
    expected_y, expected_h = scan.selective_scan_ref(*inputs)
    assert_close(y, expected_y)
    assert_close(h, expected_h)
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("kizzasi.selective_scan" in call for call in calls) == 1
    assert len(calls) < 10
    torch.library.opcheck(
        torch.ops.kizzasi.selective_scan,
        (*(v.requires_grad_() for v in inputs), None, True, 2, 8),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_a_scan_compiles_with_memory_and_gradient_through_the_state():
    """Two calls, the state carried, in one graph; the reference loop says what is right."""
    model = make("mamba-small")
    x, leaf = tokens(3, 12), torch.randn(3, 32, 4, dtype=torch.float64, requires_grad=True)

    def two_calls(x, leaf):
        first = model(x[:, :5])
        block = first.state.blocks[0]
        mixer = block.mixer._replace(ssm=block.mixer.ssm + leaf)
        blocks = (block._replace(mixer=mixer),)
        return model(x[:, 5:], first.state._replace(blocks=blocks)).logits.square().sum()

    given = torch.autograd.grad(compiled(two_calls)(x, leaf), [leaf, *model.parameters()])
    model.blocks[0].mixer.engine = "reference"
    wanted = torch.autograd.grad(two_calls(x, leaf), [leaf, *model.parameters()])
    for a, b in zip(given, wanted, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["mamba-small", "attention-mha"])
def test_recomputed_blocks_compile_to_one_graph(name):
    model, x = make(name), tokens(2, 9)
    expected = model(x)
    model.recompute = True
    actual = compiled(model)(x)
    assert_close(actual.logits, expected.logits)
    assert_same_gradients(actual, expected, model, x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_mamba_compiles_with_inductor():
    model, x = make("mamba-small"), tokens(2, 9)
    actual, expected = compiled(model, "inductor")(x), model(x)
    assert_close(actual.logits, expected.logits)
    assert_same_gradients(actual, expected, model, x)


@every_kind
def test_deterministic_mode_runs_forward_and_backward(name):
    model, x = make(name), tokens(2, 9)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = ([*torch.autograd.grad(model(x).loss(x), model.parameters())] for _ in "ab")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, again))
