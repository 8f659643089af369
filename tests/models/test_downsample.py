"""A stack at a lower rate by its formulas, and what it must not see."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, join_states
from kizzasi.models.call import Call
from kizzasi.models.channels import MLPSpec
from kizzasi.models.layers import DownsampleSpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, BidirectionalSpec, MambaSpec, ShortConvSpec
from kizzasi.train.leak import find_leak

D, K = 8, 3
CONV = BlockSpec(ShortConvSpec(d_conv=2))
HEADS = BlockSpec(AttentionSpec(2), MLPSpec(8))


def make(*body, **fields):
    torch.manual_seed(1)
    spec = DownsampleSpec(body=body or (HEADS,), factor=K, **fields)
    return spec.build(LayerContext(D), 1e-5, 0.0).double()


def stream(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_an_inner_token_pools_what_has_come_and_is_repeated():
    x = stream(2, 8, D)
    for pooling in ("mean", "linear"):
        for upsampling in ("repeat", "linear"):
            module = make(pooling=pooling, upsampling=upsampling)
            before = torch.cat([torch.zeros_like(x[:, : K - 1]), x], 1)  # the shift by k - 1
            windows = [before[:, t : t + K] for t in (0, 3, 6)]
            if pooling == "mean":
                z = torch.stack([window.mean(1) for window in windows], 1)
            else:
                z = torch.stack([module.pool_proj(window.flatten(1)) for window in windows], 1)
            u = module.body[0](z).y
            each = [u[:, t // K] for t in range(8)]
            if upsampling == "linear":
                each = [module.up_proj(v).chunk(K, -1)[t % K] for t, v in enumerate(each)]
            assert_close(module(x).y, x + torch.stack(each, 1))


def test_its_window_is_what_outputs_depend_on_and_nothing_later_is_seen():
    spec = ModelSpec(D, (DownsampleSpec(body=(CONV,), factor=K),), Tokens(9))
    model = build_model(spec, dtype=torch.float64)
    x = stream(1, 24, D).requires_grad_()
    reach = set()
    for t in range(12, 24):
        (grad,) = torch.autograd.grad(model.blocks(x, None, Call.of(x)).x[0, t].sum(), x)
        seen = grad[0].abs().sum(-1).nonzero()[:, 0]
        assert int(seen.max()) == t
        reach.add(t - int(seen.min()) + 1)
    assert max(reach) == spec.context_window == K * 2 + K - 1
    broken = x.detach().clone()
    broken[:, 13:] = torch.nan
    with torch.no_grad():
        y, z = (model.blocks(each, None, Call.of(x)).x[:, :13] for each in (x, broken))
    assert torch.equal(y, z)


def test_the_gate_knows_its_factor_and_finds_no_leak():
    inner = DownsampleSpec(body=(HEADS,), factor=2)
    blocks = (HEADS, DownsampleSpec(body=(BlockSpec(MambaSpec(d_state=2)), inner), factor=2))
    assert find_leak(build_model(ModelSpec(D, blocks, Tokens(9)))) is None


def test_rows_of_any_phase_go_on_as_they_would_alone():
    spec = ModelSpec(D, (DownsampleSpec(body=(HEADS,), factor=K), HEADS), Tokens(9))
    model, x = build_model(spec, dtype=torch.float64), torch.arange(20).view(2, 10) % 9
    states = [model(x[:1, :n]).state for n in (4, 5, 6)]
    rows = join_states(states)
    for t in range(4):
        alone = [model.step(x[1:, t], state) for state in states]
        together = model.step(x[1:, t].expand(3), rows)
        assert_close(together.logits, torch.cat([out.logits for out in alone]))
        states, rows = [out.state for out in alone], together.state


def test_forward_compiles_to_one_graph():
    spec = ModelSpec(D, (DownsampleSpec(body=(HEADS,), factor=K),), Tokens(9))
    model, x = build_model(spec, dtype=torch.float64), torch.arange(20).view(2, 10) % 9
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert_close(compiled(x).logits, model(x).logits)


def test_what_does_not_fit_is_refused():
    for fields, message in (
        ({"factor": 1}, r"blocks\[0\]\.factor: 1 leaves the rate as it is"),
        ({"body": ()}, r"blocks\[0\]\.body: empty"),
        ({"body": (BlockSpec(BidirectionalSpec(MambaSpec())),)}, r"body: has a part that reads"),
    ):
        blocks = (DownsampleSpec(**{"body": (HEADS,), "factor": 2, **fields}),)
        with pytest.raises(SpecError, match=message):
            ModelSpec(D, blocks, Tokens(5)).check()
