"""A loop by its formulas: adapters, noise, drawn iterates, truncated gradients."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.adaptive import after_step
from kizzasi.models.call import Call
from kizzasi.models.channels import MLPSpec
from kizzasi.models.layers import LoopSpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.models.ops.noise import noise_of
from kizzasi.train.leak import find_leak

D = 8
BODY = (BlockSpec(MambaSpec(d_state=2)), BlockSpec(AttentionSpec(2, window=4), MLPSpec(8)))


def loop(**fields):
    torch.manual_seed(1)
    return (
        LoopSpec(**{"body": BODY, "n_loops": 3, **fields})
        .build(LayerContext(D), 1e-5, 0.0)
        .double()
    )


def stream(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_adapters_follow_their_formulas():
    x = stream(2, 5, D)
    for adapter, read in (
        ("identity", lambda module, s, e: e if s is None else s),
        ("residual", lambda module, s, e: e if s is None else s + e),
        (
            "concat_linear",
            lambda module, s, e: module.adapter(torch.cat([e * 0 if s is None else s, e], -1)),
        ),
    ):
        module, s = loop(adapter=adapter, norm="rms"), None
        for _ in range(3):
            s = read(module, s, x)
            for layer in module.body:
                s = layer(s).y
        assert_close(module(x).y, module.norm(s))


def test_noise_is_a_function_of_seed_and_position():
    position = torch.arange(4000).view(2, 2000) % 1000
    noise = noise_of(3, position, 6)
    assert torch.equal(noise[0, :1000], noise[1, :1000])
    assert noise.abs().max() <= 3
    flat = noise_of(3, position, 6, bound=9.0)[0, :1000]
    assert flat.unique().numel() == flat.numel()
    assert abs(flat.mean()) < 0.04
    assert abs(flat.std() - 1) < 0.03
    assert (torch.corrcoef(flat.T) - torch.eye(6, dtype=flat.dtype)).abs().max() < 0.15
    assert not torch.equal(noise, noise_of(4, position, 6))
    module, x = loop(noise_std=0.7, adapter="residual"), stream(2, 5, D)
    s = 0.7 * noise_of(0, torch.arange(5)[None], D)
    for _ in range(3):
        s = s + x
        for layer in module.body:
            s = layer(s).y
    assert_close(module(x).y, s)


def test_iterates_are_drawn_in_training_and_fixed_in_evaluation():
    module, x = loop(n_loops=4, schedule="poisson_lognormal", max_loops=12), stream(1, 2, D)
    drawn = [module._n_loops() for _ in range(3000)]
    assert min(drawn) == 1
    assert max(drawn) == 12
    assert abs(sum(drawn) / len(drawn) - 5) < 0.2  # 1 + Poisson of mean 4, the tail cut off
    assert {module.eval()._n_loops() for _ in range(9)} == {4}
    module.train()
    for r in (2, 6):  # fewer and more than a state holds
        module._n_loops = lambda r=r: r
        out = module(x)
        assert len(out.state.iterates) == 4
        kept = [one[0].mixer.ssm for one in out.state.iterates]
        assert torch.equal(kept[3], kept[min(r, 4) - 1])
        assert module(x, out.state).y.isfinite().all()


def test_iterates_grow_over_the_steps_of_training():
    """fixed: rounded; drawn: what the mean follows; and the count comes back from a checkpoint."""
    module, grown = loop(n_loops=2, n_train=5, curriculum="linear", warmup_steps=8), []
    for _ in range(10):
        grown.append(module._n_loops())
        after_step(module)
    assert grown == [1, 2, 2, 2, 3, 4, 4, 4, 5, 5]  # 1 + 4 s / 8, a half to the even number
    assert module.eval()._n_loops() == 2
    assert {name for name, _ in module.named_buffers()} == {"steps"}
    again = loop(n_loops=2, n_train=5, curriculum="sqrt", warmup_steps=40)
    again.load_state_dict(module.state_dict())
    assert (int(again.steps), again._mean()) == (10, 3.0)
    drawn = loop(n_loops=9, schedule="poisson_lognormal", sigma=0.0, n_train=4, min_loops=3)
    numbers = [drawn._n_loops() for _ in range(3000)]
    assert min(numbers) == 3
    assert abs(sum(numbers) / 3000 - 5.14) < 0.15  # 1 + Poisson(4), at least 3


def test_flops_of_training_are_of_as_many_iterates_as_it_runs():
    def spec(**fields):
        inner = LoopSpec(BODY, **fields)
        return ModelSpec(D, (LoopSpec((inner,), n_loops=1), BODY[0]), Tokens(9))

    assert spec(n_loops=2, n_train=5).training_flops(7) == spec(n_loops=5).cost(7).flops
    drawn = spec(n_loops=2, n_train=5, schedule="poisson_lognormal")
    assert drawn.training_flops(7) == spec(n_loops=6).cost(7).flops
    assert drawn.cost(7).flops == spec(n_loops=2).cost(7).flops


def test_gradients_are_cut_before_the_last_iterates():
    module, x = loop(adapter="residual", n_backprop=1), stream(1, 3, D).requires_grad_()
    s = torch.zeros_like(x)
    for i in range(3):
        with torch.set_grad_enabled(i == 2):
            s = s + x
            for layer in module.body:
                s = layer(s).y
    wanted = torch.autograd.grad(s.sum(), [x, *module.parameters()])
    out = module(x)
    assert_close(out.y, s)
    given = torch.autograd.grad(out.y.sum(), [x, *module.parameters()])
    for a, b in zip(given, wanted, strict=True):
        assert_close(a, b)
    again = torch.autograd.grad(module.eval()(x).y.sum(), x)[0]
    assert not torch.allclose(again, wanted[0])


def test_a_model_of_loops_is_trained_recomputed_searched_and_priced():
    again = LoopSpec(BODY, n_loops=3, adapter="concat_linear")
    spec = ModelSpec(D, (BODY[0], again, BODY[1]), Tokens(9))
    model, x = build_model(spec, dtype=torch.float64), torch.arange(14).view(2, 7) % 9
    parameters = list(model.parameters())
    given = torch.autograd.grad(model(x).loss(x), parameters)
    model.recompute = True
    twice = torch.autograd.grad(model(x).loss(x), parameters)
    for a, b in zip(given, twice, strict=True):
        assert_close(a, b)
    assert find_leak(model) is None
    assert spec.depth == 8
    assert [spec.layer_context(i).index for i in range(3)] == [0, 1, 7]
    wide = spec.replace(blocks=(BODY[0], replace(again, n_loops=6), BODY[1]))
    assert wide.cost(7).params == spec.cost(7).params == model.n_params
    assert wide.context_window == spec.context_window == float("inf")
    ids = model.generate(x, 3, temperature=0)
    assert torch.equal(ids[:, -1], model(ids[:, :-1]).logits[:, -1].argmax(-1))
    with pytest.raises(SpecError, match=r"blocks\[1\]: 'loop' is no plain block"):
        _ = spec.plain_blocks


def test_iterates_read_the_keys_of_the_first():
    body = (BlockSpec(AttentionSpec(2, position="none")),)
    module, x = loop(body=body, n_loops=2, keys="first"), stream(2, 5, D)
    (layer,) = module.body
    once = layer(x)
    kv = once.lent
    q = layer.mixer.q_proj(layer.mixer_norm(once.y)).unflatten(-1, (2, -1)).transpose(1, 2)
    z = F.scaled_dot_product_attention(q, kv.k, kv.v, is_causal=True).transpose(1, 2).flatten(-2)
    out = module(x)
    assert_close(out.y, once.y + layer.mixer.o_proj(z))
    assert len(out.state.iterates) == 1


def test_a_token_stops_by_itself_when_it_changes_no_more():
    body = (
        BlockSpec(AttentionSpec(2), residual_scale=0.3),
        BlockSpec(AttentionSpec(2), MLPSpec(8)),
    )
    fields = {"body": body, "keys": "first", "norm": "rms"}
    module, x = loop(**fields, n_loops=9, tolerance=0.35), stream(2, 6, D)
    plain = {n: loop(**fields, n_loops=n).eval() for n in range(1, 10)}
    for twin in plain.values():
        twin.load_state_dict(module.state_dict())
    ran, body = [], module.body.forward
    module.body.forward = lambda *a, **k: (ran.append(1), body(*a, **k))[1]
    assert_close(module.train()(x).y, plain[9](x).y)
    ran.clear()
    y = module.eval()(x).y
    assert len(ran) < 9
    each = torch.stack([plain[n](x).y for n in range(1, 10)])
    stops = (each - y).abs().amax(-1) < 1e-9
    assert stops.any(0).all()  # every token's is the output of some number of iterates
    assert stops.int().argmax(0).unique().numel() > 1  # not the same for all
    state, rows = None, []
    for t in range(6):
        out = module(x[:, t], state, call=Call.of(x[:, t], step=True))
        state, rows = out.state, [*rows, out.y]
    assert_close(torch.stack(rows, 1), y)


def test_what_fits_no_loop_is_refused():
    for fields, message in (
        ({"body": ()}, r"blocks\[0\]\.body: empty"),
        ({"n_loops": 0}, "n_loops: 0 is not positive"),
        ({"max_loops": 3}, "max_loops: the number of iterates is fixed"),
        ({"min_loops": 2}, "min_loops: the number of iterates is fixed"),
        ({"n_train": 0}, "n_train: 0 is not positive"),
        ({"curriculum": "sqrt"}, "warmup_steps: 0 is not positive"),
        ({"warmup_steps": 5}, "warmup_steps: there is no curriculum"),
        (
            {"n_train": 1, "curriculum": "sqrt", "warmup_steps": 5},
            "curriculum: a single iterate cannot grow",
        ),
        (
            {"schedule": "poisson_lognormal", "min_loops": 4, "max_loops": 3},
            "min_loops: 4 is more than max_loops 3",
        ),
        ({"n_backprop": 1}, "n_backprop: the layers before would have no gradient"),
        ({"tolerance": 0.1}, "tolerance: a token stops where .* set keys to 'first'"),
        ({"keys": "first"}, r"blocks\[0\]\.body\[0\]: has no keys and values of its own"),
        (
            {"keys": "first", "body": BODY[1:], "adapter": "residual", "n_backprop": 1},
            "n_backprop: the first iterate's keys would have no gradient",
        ),
        ({"noise_std": -1.0}, "noise_std: -1.0 is negative"),
        ({"body": (BlockSpec(AttentionSpec(3)),)}, r"blocks\[0\]\.body\[0\]\.mixer\.n_heads"),
    ):
        blocks = (LoopSpec(**{"body": BODY, "n_loops": 2, **fields}),)
        with pytest.raises(SpecError, match=message):
            ModelSpec(D, blocks, Tokens(5)).check()


def test_a_call_alone_and_in_steps():
    module, x = loop(noise_std=0.5, adapter="residual").eval(), stream(2, 4, D)
    state, rows = None, []
    for t in range(4):
        out = module(x[:, t], state, call=Call.of(x[:, t], step=True))
        state, rows = out.state, [*rows, out.y]
    assert_close(torch.stack(rows, 1), module(x).y)


def test_costs_of_a_body_without_keys_say_so_before_any_check():
    spec = LoopSpec((BlockSpec(MambaSpec()),), 2, keys="first")
    with pytest.raises(SpecError, match="mamba: it has no keys and values of its own"):
        spec.cost(LayerContext(8), 4, 1)
