"""A mixer in anyone's network: the layer does what the mixer does in a model."""

import io

import pytest
import torch
from cases import CAUSAL, CHANNELS, D_MODEL, MIXERS, causal_parts, every_part, other_parts
from tolerance import assert_close
from torch import nn

from kizzasi.errors import ShapeError, SpecError, StateError
from kizzasi.models import parameter_groups
from kizzasi.models.layer import Layer
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec

PARTS = {**MIXERS, **CHANNELS}


def layer(name, **kwargs) -> Layer:
    kwargs = {"seed": 1, "dtype": torch.float64, **kwargs}
    made = PARTS[name].layer(D_MODEL, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return made


def frames(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D_MODEL, generator=generator, dtype=torch.float64)


@every_part
def test_tensor_in_tensor_out_in_a_network(name):
    torch.manual_seed(3)
    spec = PARTS[name]
    parts = [spec.layer(D_MODEL) for _ in range(2)]  # pyright: ignore[reportAttributeAccessIssue]
    network = nn.Sequential(parts[0], nn.LayerNorm(D_MODEL), parts[1], nn.Linear(D_MODEL, 3))
    assert all(t.isfinite().all() for t in (*network.parameters(), *network.buffers()))
    y = network(torch.randn(2, 9, D_MODEL))
    assert y.shape == (2, 9, 3)
    y.square().mean().backward()
    twins = zip(parts[0].parameters(), parts[1].parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in twins)
    groups = parameter_groups(network, 1e-2, 0.1)
    assert sorted(map(id, (p for g in groups for p in g["params"]))) == sorted(
        map(id, network.parameters())
    )
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for part in parts:
        for key, rule in part.mixer.param_rules.items():
            p = dict(part.mixer.named_parameters()).get(key)
            if p is not None:
                want = (min(1e-2 * rule.lr_scale, rule.lr_max), 0.1 if rule.decay else 0.0)
                assert rates[id(p)] == want, key


@every_part
def test_stateful_equals_the_layer_and_its_mixer(name):
    made, x = layer(name), frames(2, 9)
    y = made(x)
    assert torch.equal(y, made.mixer(x).y)
    out = made.stateful(x)
    assert_close(out.y, y)
    assert set(out.aux) == set(made.mixer(x).aux)


@causal_parts
def test_a_stream_equals_the_whole(name):
    made, x = layer(name), frames(2, 9)
    whole = made(x)
    first = made.stateful(x[:, :4])
    state, rows = first.state, [first.y]
    for t in range(4, 7):
        out = made.stateful(x[:, t], state)
        state, y = out.state, out.y[:, None]
        rows.append(y)
    rows.append(made.stateful(x[:, 7:], state).y)
    assert_close(torch.cat(rows, 1), whole)
    alone = made.stateful(x[:, 0])
    assert_close(alone.y, whole[:, 0])


def test_a_plain_call_takes_documents_padding_and_a_state_too():
    made = MambaSpec(d_state=4).layer(D_MODEL, seed=1, dtype=torch.float64)
    x = frames(2, 9)
    ids = torch.tensor([[4] * 5 + [6] * 4] * 2)
    for given in ({"segment_ids": ids}, {"mask": ids == 6}, {"state": made.stateful(x).state}):
        assert torch.equal(made(x, **given), made.stateful(x, **given).y)
        assert not torch.equal(made(x, **given), made(x))


@every_part
def test_documents_and_padding_are_kept_apart(name):
    made, x = layer(name), frames(1, 9)
    ids = torch.tensor([[4] * 5 + [6] * 4])
    packed = made.stateful(x, segment_ids=ids).y
    assert_close(packed, torch.cat([made(x[:, :5]), made(x[:, 5:])], 1))
    padded = torch.cat([torch.full((1, 3, D_MODEL), torch.nan, dtype=x.dtype), x], 1)
    mask = torch.arange(12)[None] >= 3
    out = made.stateful(padded, mask=mask)
    assert_close(out.y[:, 3:], made(x))
    if CAUSAL[name]:
        more = frames(1, 2, 5)
        assert_close(
            made.stateful(more, out.state).y, made.stateful(more, made.stateful(x).state).y
        )


@other_parts
def test_what_reads_later_tokens_refuses_a_state(name):
    made, x = layer(name), frames(1, 3)
    for refused in (lambda: made.stateful(x, made.init_state(1)), lambda: made.stateful(x[:, 0])):
        with pytest.raises(SpecError, match="depends on later tokens"):
            refused()


@every_part
def test_a_seed_decides(name):
    a, b = (PARTS[name].layer(D_MODEL, seed=4) for _ in range(2))  # pyright: ignore[reportAttributeAccessIssue]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    meta = PARTS[name].layer(D_MODEL, device="meta")  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.is_meta for p in meta.parameters())
    meta.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(4))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), meta.parameters(), strict=True))


def test_misuse_is_named():
    good = MambaSpec().layer(8)
    state = good.stateful(torch.randn(1, 2, 8)).state
    for use, error, message in (
        (lambda: RWKV7Spec().layer(32), SpecError, "rwkv7"),
        (lambda: AttentionSpec(3).layer(8), SpecError, "attention"),
        (lambda: MambaSpec().layer(0), SpecError, "d_model: expected a width"),
        (lambda: MambaSpec().layer(torch.zeros(2)), SpecError, "d_model"),  # pyright: ignore[reportArgumentType]
        (lambda: MambaSpec().layer(8, index=2), SpecError, "index: 2 is outside the 1 layers"),
        (lambda: MambaSpec().layer(8, device="gpu"), SpecError, "device: 'gpu'"),
        (lambda: good(torch.randn(2, 3, 7)), ShapeError, r"expected \(b, t, 8\), got \(2, 3, 7\)"),
        (lambda: good(torch.randn(3, 8)), ShapeError, r"expected \(b, t, 8\)"),
        (lambda: good([1.0]), ShapeError, "got a list"),
        (lambda: good.stateful(torch.randn(2, 3, 8), state), ShapeError, "a batch of 1"),
        (
            lambda: MambaSpec(d_state=3).layer(8).stateful(torch.randn(1, 2, 8), state),
            StateError,
            "a state of another model",
        ),
        (lambda: good.stateful(torch.randn(1, 2, 8), (1, 2)), StateError, "of type tuple"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(error, match=message):
            use()


def test_default_dtype_and_pickles():
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = MambaSpec().layer(8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.mixer.in_proj.weight.dtype == torch.bfloat16
    assert made.mixer.A_log.dtype == torch.float32
    assert made(torch.randn(1, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(1, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(again(x), made(x))


def test_hooks_on_a_layer_act_in_stateful_too():
    made, x = MambaSpec(d_state=4).layer(16, seed=1), torch.randn(2, 5, 16)
    state = made.stateful(x[:, :4]).state
    plain = made(x)
    made.register_forward_hook(lambda _, __, out: out._replace(y=out.y + 1))
    torch.testing.assert_close(made.stateful(x[:, 4], state).y, plain[:, 4] + 1)
    torch.testing.assert_close(made.stateful(x).y, plain + 1)
