"""The dispatch backends are one function: outputs, gradients, and grouped_mm's failures."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.mixer import ChannelSpec, LayerContext
from kizzasi.models.ops import experts
from kizzasi.models.ops.experts import SwiGLUWeights, grouped_linear, mix, mix_swiglu
from kizzasi.models.ops.routing import Assignments

BACKENDS = ("masked", "sorted", "grouped", "padded", "dense")
TIGHT = {torch.float64: (1e-9, 1e-11), torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 3e-2)}


def make(n=37, d=24, h=16, e=5, k=2, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=gen, dtype=torch.float64).to(dtype)
    shapes = ((h, d), (h, d), (d, h))
    flat = [
        (torch.randn(s, generator=gen, dtype=torch.float64) / s[1] ** 0.5).to(dtype)
        for s in shapes
        for _ in range(e)
    ]
    ids = torch.rand(n, e, generator=gen).topk(k).indices.flatten()
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(n * k, generator=gen, dtype=torch.float64).to(wide)
    token = torch.arange(n).repeat_interleave(k)
    return x, flat, Assignments(token, ids, weight)


def run(backend, x, flat, to, e, autocast=False):
    leaves = [t.detach().clone().requires_grad_() for t in (x, to.weight, *flat)]
    weights = SwiGLUWeights(*(leaves[2 + i * e : 2 + (i + 1) * e] for i in range(3)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mix_swiglu(leaves[0], to._replace(weight=leaves[1]), weights, backend)
    y.backward(torch.cos(torch.arange(y.numel()).view(y.shape)).to(y.dtype))
    return y, [t.grad for t in leaves]


def assert_same(backend, dtype, x, flat, to, e, autocast=False):
    rtol, atol = TIGHT[torch.bfloat16 if autocast else dtype]
    y, grads = run(backend, x, flat, to, e, autocast)
    y_ref, grads_ref = run("masked", x, flat, to, e)
    for got, want in zip([y, *grads], [y_ref, *grads_ref], strict=True):
        scale = float(want.detach().abs().max()) or 1.0
        torch.testing.assert_close(got / scale, want / scale, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_agree(backend, dtype):
    assert_same(backend, dtype, *make(dtype=dtype), e=5)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_widths_that_are_not_multiples_of_16_bytes(backend):
    assert_same(backend, torch.float32, *make(d=13, h=7, dtype=torch.float32), e=5)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_empty_groups_and_jobs_of_nobody(backend):
    x, flat, to = make(dtype=torch.float32)
    expert = torch.where(to.expert == 2, -1, torch.where(to.expert == 4, 7, to.expert))
    assert_same(backend, torch.float32, x, flat, to._replace(expert=expert), e=5)
    nobody = to._replace(expert=torch.full_like(to.expert, -1))
    y, grads = run(backend, x, flat, nobody, 5)
    assert not y.any()
    assert all(g is not None and not g.any() for g in grads)


@pytest.mark.parametrize("rows", [1, 20, 74])
def test_blocks_of_any_length(rows, monkeypatch):
    monkeypatch.setattr(experts, "BLOCK_ROWS", rows)
    x, flat, to = make()
    for idle in (0, 2, 4):
        some = to._replace(expert=torch.where(to.expert == idle, -1, to.expert))
        assert_same("sorted", torch.float64, x, flat, some, e=5)


def test_gradients_of_experts_add_up_and_do_not_touch_each_other():
    x, flat, to = make(e=3)
    leaves = [t.requires_grad_() for t in flat]
    weights = SwiGLUWeights(leaves[:3], leaves[3:6], leaves[6:])
    for _ in range(2):
        mix_swiglu(x, to, weights, "sorted").sum().backward()
    twice = [t.grad.clone() for t in leaves]
    leaves[4].grad.zero_()
    for i, (leaf, want) in enumerate(zip(leaves, twice, strict=True)):
        assert_close(leaf.grad, want * (i != 4))
        leaf.grad = None
    mix_swiglu(x, to, weights, "masked").sum().backward()
    assert_close(twice[5], 2 * leaves[5].grad)


def test_sorted_refuses_to_be_differentiated_twice():
    x, flat, to = make(e=3)
    x.requires_grad_()
    y = mix_swiglu(x, to, SwiGLUWeights(flat[:3], flat[3:6], flat[6:]), "sorted")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 5, 8)])
def test_experts_that_share_no_shape_or_have_biases(bias, widths):
    swiglu = ChannelSpec.registry["swiglu"]
    spec = MoESpec(n_experts=3, experts=tuple(swiglu(hidden=h, bias=bias) for h in widths))
    moe = spec.build(LayerContext(6)).double()
    for i, parameter in enumerate(moe.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    x, results = torch.randn(1, 9, 6, dtype=torch.float64), {}
    for backend in ("sorted", "masked", "dense"):
        moe.backend = backend
        moe.zero_grad()
        y = moe(x).y
        y.sum().backward()
        results[backend] = [y, *(p.grad for p in moe.parameters())]
    row = torch.stack([moe.experts[i](x).y[0] for i in range(3)])
    moe.gate.register_forward_hook(lambda gate, args, routing: seen.append(routing.to))
    seen: list[Assignments] = []
    moe(x)
    want = torch.zeros(9, 6, dtype=torch.float64)
    for token, i, weight in zip(*seen[0], strict=True):
        want[token] += weight * row[i, token]
    assert_close(results["masked"][0][0], want)
    for backend in ("sorted", "dense"):
        for got, ref in zip(results[backend], results["masked"], strict=True):
            assert_close(got, ref)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_of_an_experts_layer_are_called(hook):
    moe = MoESpec(n_experts=3, hidden=8).build(LayerContext(6))
    moe.reset_parameters(1, torch.Generator().manual_seed(0))
    called = []
    getattr(moe.experts[0].up_proj, hook)(lambda *_: called.append(1))
    moe(torch.randn(1, 9, 6, requires_grad=True)).y.sum().backward()
    assert called


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    assert_same(backend, torch.float32, *make(dtype=torch.float32), e=5, autocast=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_poisoned_memory_does_not_reach_results(backend, monkeypatch):
    def poisoned(x, w, offs):
        y = real(x, w, offs=offs)
        keep = torch.arange(len(y)) < offs[-1]
        return torch.where(keep[:, None], y, torch.nan)

    real = experts.GROUPED_MM
    if real is None:
        pytest.skip("this torch has no grouped_mm")
    monkeypatch.setattr(experts, "GROUPED_MM", lambda x, w, offs: poisoned(x, w, offs))
    x, flat, to = make(dtype=torch.float32)
    expert = torch.where(to.expert == 1, -1, to.expert)
    assert_same(backend, torch.float32, x, flat, to._replace(expert=expert), e=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_linear_takes_expanded_gradients(dtype):
    x = torch.randn(9, 13, dtype=dtype, requires_grad=True)
    weights = torch.randn(3, 7, 13, dtype=dtype, requires_grad=True)
    y = grouped_linear(x, weights, torch.tensor([4, 4, 9], dtype=torch.int32))
    y.sum().backward()
    want = torch.cat([x[:4] @ weights[0].T, x[4:] @ weights[2].T])
    assert_close(y, want)
    assert_close(weights.grad[2], x[4:].sum(0).expand(7, 13).detach())
    assert not weights.grad[1].any()


def test_without_the_kernel_groups_are_multiplied_one_by_one(monkeypatch):
    monkeypatch.setattr(experts, "GROUPED_MM", None)
    assert_same("grouped", torch.float32, *make(dtype=torch.float32), e=5)


def test_any_callable_is_an_expert():
    x, _, to = make(e=3, k=2)
    layers = [torch.nn.Linear(24, 6), torch.nn.Sequential(torch.nn.Linear(24, 6), torch.nn.Tanh())]
    layers = [layer.double() for layer in [*layers, torch.nn.Linear(24, 6, bias=False)]]
    assert_close(mix(x, to, layers, "sorted"), mix(x, to, layers, "masked"))
    with pytest.raises(SpecError, match=r"'grouped' stacks weights.*use \"sorted\""):
        mix(x, to, layers, "grouped")


def test_idle_experts_get_zero_gradients():
    x, flat, to = make(dtype=torch.float32)
    to = to._replace(expert=torch.zeros_like(to.expert))
    for backend in BACKENDS:
        _, grads = run(backend, x, flat, to, 5)
        assert all(g is not None for g in grads), backend
        assert not grads[3].any()
        assert grads[2].any()


@pytest.mark.parametrize("ids", [[2, 0], [4, 5], [-1, 9]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_token_alone_gets_what_it_gets_among_others(ids, dtype):
    """Ids 5 and up and below 0 are choices without an expert."""
    x, flat, to = make(n=1, dtype=dtype)
    to = to._replace(expert=torch.tensor(ids))
    split = SwiGLUWeights(flat[:5], flat[5:10], flat[10:])
    each = [experts._swiglu(*one) for one in zip(*split, strict=True)]
    torch.testing.assert_close(experts.mix_one(x, to, each), mix(x, to, each, "masked"))


def test_decoding_without_gradients_equals_the_parallel_form():
    spec = MoESpec(n_experts=4, top_k=3, hidden=8, n_null=1, n_identity=1, shared_hidden=8)
    moe = spec.build(LayerContext(6)).eval()
    moe.reset_parameters(1, torch.Generator().manual_seed(0))
    x = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        steps = torch.stack([moe.step(x[:, t], ()).y for t in range(9)], 1)
        assert_close(steps, moe(x).y)
