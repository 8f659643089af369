"""The ways of dispatch are one function: outputs, gradients, and grouped_mm's failures."""

import pytest
import torch
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kizzasi.errors import ShapeError
from kizzasi.models.channels.moe import ListedExperts, MoESpec
from kizzasi.models.mixer import ChannelSpec, LayerContext
from kizzasi.models.ops import experts, sorted_experts
from kizzasi.models.ops.experts import mix, mix_swiglu, swiglu
from kizzasi.models.ops.routing import Assignments

# Anything that has the compiler make a Function brings its own deprecation with it.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")
WAYS = ("masked", "sorted", "grouped", "dense")
every_way = pytest.mark.parametrize("how", WAYS)
every_other_way = pytest.mark.parametrize("how", WAYS[1:])
TIGHT = {torch.float64: (1e-9, 1e-11), torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 3e-2)}


def make(n=37, d=24, h=16, e=5, k=2, dtype=torch.float64, seed=0):
    """Tokens, gates and ups, downs, jobs."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=gen, dtype=torch.float64).to(dtype)
    gate_up, down = (
        (torch.randn(s, generator=gen, dtype=torch.float64) / s[2] ** 0.5).to(dtype)
        for s in ((e, 2 * h, d), (e, d, h))
    )
    ids = torch.rand(n, e, generator=gen).topk(k).indices.flatten()
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(n * k, generator=gen, dtype=torch.float64).to(wide)
    token = torch.arange(n).repeat_interleave(k)
    return x, gate_up, down, Assignments(token, ids, weight)


def run(how, x, gate_up, down, to, autocast=False):
    """Output and gradients of x, the jobs' weights, gates and ups, downs."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, to.weight, gate_up, down)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mix_swiglu(leaves[0], to._replace(weight=leaves[1]), *leaves[2:], how)  # pyright: ignore
    y.backward(torch.cos(torch.arange(y.numel()).view(y.shape)).to(y.dtype))
    return y, [t.grad for t in leaves]


def assert_same(how, x, gate_up, down, to, autocast=False):
    rtol, atol = TIGHT[torch.bfloat16 if autocast else x.dtype]
    y, grads = run(how, x, gate_up, down, to, autocast)
    y_ref, grads_ref = run("masked", x, gate_up, down, to)
    for got, want in zip([y, *grads], [y_ref, *grads_ref], strict=True):
        scale = float(want.detach().abs().max()) or 1.0
        torch.testing.assert_close(got / scale, want / scale, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_other_way
def test_all_ways_agree(how, dtype):
    assert_same(how, *make(dtype=dtype))


@pytest.mark.parametrize("how", ["sorted", "dense"])  # grouped_mm knows no float64
def test_all_ways_of_float64_agree(how):
    assert_same(how, *make())


@pytest.mark.parametrize("how", ["sorted", "dense"])
def test_odd_widths(how):
    assert_same(how, *make(d=13, h=7, dtype=torch.float32))


@every_other_way
def test_empty_groups_and_jobs_of_nobody(how):
    x, gate_up, down, to = make(dtype=torch.float32)
    expert = torch.where(to.expert == 2, -1, torch.where(to.expert == 4, 7, to.expert))
    assert_same(how, x, gate_up, down, to._replace(expert=expert))
    nobody = to._replace(expert=torch.full_like(to.expert, -1))
    y, grads = run(how, x, gate_up, down, nobody)
    assert not y.any()
    assert all(g is not None and not g.any() for g in grads)


@pytest.mark.parametrize("rows", [1, 20, 74])
def test_blocks_of_any_length(rows, monkeypatch):
    x, gate_up, down, to = make()
    monkeypatch.setattr(sorted_experts, "BLOCK", rows * gate_up.shape[1])
    for idle in (0, 2, 4):
        some = to._replace(expert=torch.where(to.expert == idle, -1, to.expert))
        assert_same("sorted", x, gate_up, down, some)


def test_gradients_add_up():
    x, gate_up, down, to = make(e=3)
    gate_up.requires_grad_()
    for _ in range(2):
        mix_swiglu(x, to, gate_up, down, "sorted").sum().backward()
    twice, gate_up.grad = gate_up.grad, None
    mix_swiglu(x, to, gate_up, down, "masked").sum().backward()
    assert_close(twice, 2 * gate_up.grad)  # pyright: ignore


@pytest.mark.parametrize("how", ["masked", "sorted", "dense"])
def test_second_derivatives(how):
    x, gate_up, down, to = make(n=3, d=4, h=2, e=3)
    expert = to.expert.clone()
    expert[1] = -1

    def function(x, weight, gate_up, down):
        return mix_swiglu(x, Assignments(to.token, expert, weight), gate_up, down, how)

    inputs = [t.requires_grad_() for t in (x, to.weight, gate_up, down)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


class Watch(TorchDispatchMode):
    """The size of everything that is made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [out] if isinstance(out, torch.Tensor) else out
        if not func.is_view and made is not None:
            self.sizes += [one.numel() for one in made if isinstance(one, torch.Tensor)]
        return out


@every_way
def test_no_weight_is_copied(how):
    x, gate_up, down, to = make(n=3, d=32, h=64, e=16, dtype=torch.float32)
    with Watch() as watch, torch.no_grad():
        mix_swiglu(x, to, gate_up, down, how)
    assert max(watch.sizes) < down[0].numel()


def test_a_graph_holds_sorted_as_one_node_with_the_same_gradients():
    x, gate_up, down, to = make()
    inputs = (x, to.weight, to.token, to.expert, gate_up, down)
    graphs = []

    def note(graph, example):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    def call(x, weight, token, expert, gate_up, down):
        return mix_swiglu(x, Assignments(token, expert, weight), gate_up, down, "sorted")

    torch._dynamo.reset()
    torch.compile(call, backend=note, fullgraph=True)(*inputs)
    assert sum("kizzasi.mix_swiglu" in target for target in graphs[0]) == 1
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, call):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        y = function(*leaves)
        y.cos().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
    order, counts = experts.sort_by_expert(to, 5)
    arguments = (x, to.weight[order], to.token[order], counts, gate_up, down)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    leaves = tuple(t.requires_grad_(t.is_floating_point()) for t in arguments)
    torch.library.opcheck(torch.ops.kizzasi.mix_swiglu, leaves, test_utils=checks)


@pytest.mark.parametrize("how", ["dense", "masked"])
def test_torch_func_takes_the_layer(how):
    """vmap over rows and grad over weights, by the rule, which is dense there."""
    x, gate_up, down, to = make(n=6, k=2)

    def loss(gate_up, down, x):
        ids = Assignments(torch.arange(6).repeat_interleave(2), to.expert, to.weight)
        return mix_swiglu(x, ids, gate_up, down, experts.dispatch_rule(x, down)).cos().sum()

    grads = torch.func.grad(loss, (0, 1))(gate_up, down, x)
    want = [t.clone().requires_grad_() for t in (gate_up, down)]
    mix_swiglu(x, to, *want, how).cos().sum().backward()  # pyright: ignore
    for a, b in zip(grads, want, strict=True):
        assert_close(a, b.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 5, 8)])
def test_layers_of_any_experts_agree_with_a_sum_by_hand(bias, widths):
    kind = ChannelSpec.registry["swiglu"]
    spec = MoESpec(n_experts=3, experts=tuple(kind(hidden=h, bias=bias) for h in widths))
    moe = spec.build(LayerContext(6)).double()
    assert isinstance(moe.experts, ListedExperts) == (bias or widths[1] == 5)
    for i, parameter in enumerate(moe.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    x, seen = torch.randn(1, 9, 6, dtype=torch.float64), []
    moe.gate.register_forward_hook(lambda gate, args, routing: seen.append(routing.to))
    results = []
    for engine in ("auto", "reference"):
        moe.engine = engine
        moe.zero_grad()
        y = moe(x).y
        y.sum().backward()
        results.append([y, *(p.grad for p in moe.parameters())])
    for got, want in zip(*results, strict=True):
        assert_close(got, want)
    want = torch.zeros(9, 6, dtype=torch.float64)
    for token, i, weight in zip(*seen[0], strict=True):
        if isinstance(moe.experts, ListedExperts):
            one = moe.experts[int(i)](x).y[0, token]
        else:
            gate, up, down = moe.experts.tensors(int(i))
            one = swiglu(torch.cat([gate, up]), down)(x[0, token])
        want[token] += weight * one
    assert_close(results[0][0][0], want)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_of_a_listed_experts_layer_are_called(hook):
    swiglus = (ChannelSpec.registry["swiglu"](hidden=8, bias=True),) * 3
    moe = MoESpec(n_experts=3, experts=swiglus).build(LayerContext(6))
    moe.reset_parameters(1, torch.Generator().manual_seed(0))
    called = []
    getattr(moe.experts[0].up_proj, hook)(lambda *_: called.append(1))
    moe(torch.randn(1, 9, 6, requires_grad=True)).y.sum().backward()
    assert called


@every_way
def test_autocast(how):
    assert_same(how, *make(dtype=torch.float32), autocast=True)


@every_way
def test_poisoned_memory_does_not_reach_results(how, monkeypatch):
    def poisoned(x, w, offs):
        y = real(x, w, offs=offs)
        keep = torch.arange(len(y)) < offs[-1]
        return torch.where(keep[:, None], y, torch.nan)

    real = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
    x, gate_up, down, to = make(dtype=torch.float32)
    expert = torch.where(to.expert == 1, -1, to.expert)
    assert_same(how, x, gate_up, down, to._replace(expert=expert))


def test_grouped_takes_expanded_gradients():
    x, gate_up, down, to = make(dtype=torch.float32)
    grads = []
    for how in ("grouped", "masked"):
        gate_up = gate_up.detach().requires_grad_()
        mix_swiglu(x, to, gate_up, down, how).sum().backward()
        grads.append(gate_up.grad)
    torch.testing.assert_close(*grads)


def test_the_rule():
    class OnCuda:
        is_cuda, dtype = True, torch.bfloat16

    down, odd = torch.empty(2, 16, 8), torch.empty(2, 16, 12)
    assert experts.dispatch_rule(OnCuda(), down) == "grouped"  # pyright: ignore
    assert experts.dispatch_rule(OnCuda(), odd) == "sorted"  # pyright: ignore
    assert experts.dispatch_rule(OnCuda(), None) == "sorted"  # pyright: ignore
    assert experts.dispatch_rule(down, down) == "sorted"
    OnCuda.dtype = torch.float32
    assert experts.dispatch_rule(OnCuda(), down) == "sorted"  # pyright: ignore


def test_any_callable_is_an_expert():
    x, _, _, to = make(e=3, k=2)
    layers = [torch.nn.Linear(24, 6), torch.nn.Sequential(torch.nn.Linear(24, 6), torch.nn.Tanh())]
    layers = [layer.double() for layer in [*layers, torch.nn.Linear(24, 6, bias=False)]]
    want = mix(x, to, layers, "masked")
    for how in ("sorted", "dense"):
        assert_close(mix(x, to, layers, how), want)


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (torch.nn.GRU(6, 6, batch_first=True), r"experts\[1\]: GRU made a tuple of \(3, 6\)"),
        (torch.nn.Flatten(0), r"experts\[1\]: Flatten made \(18,\) of \(3, 6\)"),
    ],
)
def test_a_wrong_expert_is_named(expert, message):
    listed = ListedExperts([torch.nn.Identity(), expert])
    to = Assignments(torch.arange(3), torch.ones(3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(ShapeError, match=message):
        listed(torch.randn(3, 6), to)


def test_idle_experts_get_zero_gradients():
    x, gate_up, down, to = make(dtype=torch.float32)
    to = to._replace(expert=torch.zeros_like(to.expert))
    for how in WAYS:
        _, grads = run(how, x, gate_up, down, to)
        assert not any(g[1:].any() for g in grads[2:]), how  # pyright: ignore
        assert all(g[0].any() for g in grads[2:]), how  # pyright: ignore


@pytest.mark.parametrize("ids", [[2, 0], [4, 5], [-1, 9]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_token_alone_gets_what_it_gets_among_others(ids, dtype):
    """Ids 5 and up and below 0 are choices without an expert."""
    x, gate_up, down, to = make(n=1, dtype=dtype)
    to = to._replace(expert=torch.tensor(ids))
    each = [swiglu(*one) for one in zip(gate_up, down, strict=True)]
    alone = experts.mix_one(x, to, lambda i: each[i], 5)
    torch.testing.assert_close(alone, mix(x, to, each, "masked"))


def test_decoding_without_gradients_equals_the_parallel_form():
    spec = MoESpec(n_experts=4, top_k=3, hidden=8, n_null=1, n_identity=1, shared_hidden=8)
    moe = spec.build(LayerContext(6)).eval()
    moe.reset_parameters(1, torch.Generator().manual_seed(0))
    x = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        steps = torch.stack([moe.step(x[:, t], ()).y for t in range(9)], 1)
        assert_close(steps, moe(x).y)
