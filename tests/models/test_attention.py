"""Attention: fused kernels against the formula, caches against the whole, and against Llama."""

import math

import pytest
import torch
from tolerance import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.call import Call
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.ops.attention import (
    alibi_slopes,
    attention,
    attention_ref,
    document_positions,
    visibility,
)

LENGTHS = (1, 2, 7, 63, 64, 65, 100)
D_MODEL = 16
SPECS = {
    "mha": AttentionSpec(2),
    "gqa-norm": AttentionSpec(4, 2, qk_norm=True, qkv_bias=True),
    "mqa-softcap": AttentionSpec(4, 1, softcap=2.0, position="none"),
    "window": AttentionSpec(2, window=5),
    "wide-window": AttentionSpec(2, window=200, rope_dims=4),
    "alibi-window": AttentionSpec(3, head_dim=6, window=7, position="alibi", out_bias=True),
    "alibi": AttentionSpec(2, position="alibi"),
    "yarn": AttentionSpec(2, rope_scaling=RopeScaling("yarn", 4.0, 16)),
    "window-1": AttentionSpec(2, window=1),
    "full-norm-clip": AttentionSpec(4, 2, qk_norm="full", qk_norm_kind="layer", clip_qkv=0.5),
    "sinks": AttentionSpec(4, 2, sinks=True, qk_norm="head", qk_norm_kind="layer_unbiased"),
    "sinks-window": AttentionSpec(2, sinks=True, window=5, position="alibi"),
    "dilated-global": AttentionSpec(2, window=4, dilation=2, n_global=3, position="xpos"),
    "dilated": AttentionSpec(2, dilation=3, position="alibi"),
    "blocks": AttentionSpec(4, 2, block=4, n_blocks=2, position="relative", sinks=True),
    "block-global": AttentionSpec(2, block=5, n_global=2, qkv_rank=5, qkv_shared=True),
    "gate": AttentionSpec(4, 2, head_dim=6, gate=True, qk_norm=True, qk_norm_kind="rms_plus_one"),
}
ENCODERS = {
    "encoder-relative": AttentionSpec(2, position="relative", causal=False, n_buckets=8),
    "encoder": AttentionSpec(4, 2, causal=False),
    "encoder-window": AttentionSpec(2, window=5, causal=False, position="none", softcap=2.0),
    "encoder-alibi": AttentionSpec(2, position="alibi", causal=False),
    "encoder-wide-window": AttentionSpec(2, window=200, causal=False, gate=True),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_encoder = pytest.mark.parametrize("spec", ENCODERS.values(), ids=ENCODERS)


def build(spec, dtype=torch.float64, engine="torch", d_model=D_MODEL):
    mixer = spec.build(LayerContext(d_model, n_layers=2))
    mixer.reset_parameters(2, torch.Generator().manual_seed(0))
    mixer.engine = engine
    return mixer.to(dtype)


def signal(b, t, seed=0, dtype=torch.float64, d_model=D_MODEL):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, d_model, generator=generator, dtype=dtype)


def fold(mixer, x, state=None):
    state = mixer.init_state(x.shape[0], x.device, x.dtype) if state is None else state
    ys = []
    for i in range(x.shape[1]):
        out = mixer.step(x[:, i], state)
        ys.append(out.y)
        state = out.state
    return torch.stack(ys, 1), state


def assert_same_state(actual, expected):
    for a, b, name in zip(actual, expected, actual._fields, strict=True):
        assert a.dtype == b.dtype
        assert_close(a.double(), b.double(), msg=name)


def heads(h, s, seed, d=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, h, s, d, generator=generator, dtype=torch.float64, requires_grad=True)


def visible_to(t, window, packed):
    starts = torch.zeros(2, t, dtype=torch.bool)
    if packed:
        starts[0, t // 3] = starts[1, t // 2] = starts[1, -1] = True
    document, position = document_positions(starts, torch.tensor([0, 3]))
    return visibility(document, position, document, position, window)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("window", "packed", "bias", "softcap"),
    [
        (None, False, False, None),
        (5, False, False, None),
        (1000, True, False, None),
        (3, True, True, None),
        (None, True, True, 1.5),
    ],
)
def test_fused_equals_reference(length, window, packed, bias, softcap):
    plain = not (window or packed or bias)
    visible = None if plain else visible_to(length, window, packed)
    weight = heads(4, length, 9).detach()
    results = []
    for attend in (attention, attention_ref):
        q, k, v = heads(4, length, 1), heads(2, length, 2), heads(2, length, 3)
        slopes = torch.rand(4, 1, length, generator=torch.Generator().manual_seed(4)).double()
        added = slopes if bias else None
        y = attend(q, k, v, visible=visible, bias=added, softcap=softcap)
        results.append((y, *torch.autograd.grad((y * weight).sum(), (q, k, v))))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("length", [1, 2, 65])
@pytest.mark.parametrize(
    ("window", "bias", "softcap", "causal"),
    [(None, False, None, True), (5, False, None, True), (3, True, None, True)]
    + [(None, True, 1.5, True), (None, False, None, False)],
)
def test_sinks_take_their_share(length, window, bias, softcap, causal):
    """Fused equals reference; the shares of keys and sink add up to one."""
    visible = visible_to(length, window, True) if window else None
    added = torch.rand(4, 1, length, dtype=torch.float64) if bias else None
    results, wanted = [], torch.randn(2, 4, length, 4, dtype=torch.float64)
    for attend in (attention, attention_ref):
        q, k, v = heads(4, length, 1), heads(2, length, 2), heads(2, length, 3)
        sinks = torch.tensor([-1.0, 0.0, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
        how = {"visible": visible, "bias": added, "softcap": softcap, "causal": causal}
        y = attend(q, k, v, sinks=sinks, scale=0.8, **how)
        results.append((y, *torch.autograd.grad((y * wanted).sum(), (q, k, v, sinks))))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)
    q, k, one = heads(4, length, 1), heads(2, length, 2), torch.ones(2, 2, length, 4).double()
    share = attention(q, k, one, sinks=sinks.detach(), **how)[..., 0]
    assert (share < 1).all()
    nobody = attention(q, k, one, sinks=torch.full((4,), -50.0, dtype=torch.float64), **how)
    assert_close(nobody, torch.ones_like(nobody))
    if length == 1 and not bias:  # by hand: e^z / (e^z + e^sink)
        z = (q * k.repeat_interleave(2, 1)).sum(-1) / 2
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        assert_close(share, (z - sinks.detach()[:, None]).sigmoid())


def test_a_scale_of_its_own_for_every_head():
    spec = AttentionSpec(2, position="none", qk_norm="head", qk_norm_kind="layer_unbiased")
    mixer, x = build(spec), signal(1, 5)
    plain = build(AttentionSpec(2, position="none", qk_norm=True, qk_norm_kind="layer_unbiased"))
    plain.load_state_dict({**mixer.state_dict(), **plain.state_dict()}, strict=False)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(plain, part).load_state_dict(getattr(mixer, part).state_dict())
    assert mixer.q_norm.weight.shape == (16,)
    assert_close(mixer(x).y, plain(x).y)
    with torch.no_grad():
        mixer.q_norm.weight[8:] *= 3
    assert not torch.allclose(mixer(x).y, plain(x).y)


def test_documents_and_positions():
    starts = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 1, 1]], dtype=torch.bool)
    document, position = document_positions(starts, torch.tensor([7, 4]))
    assert document.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 2, 3]]
    assert position.tolist() == [[7, 8, 0, 1, 2], [0, 1, 2, 0, 0]]


def test_alibi_slopes_of_the_paper():
    eight = alibi_slopes(8, device=torch.device("cpu"), dtype=torch.float64)
    assert_close(eight, 2.0 ** -torch.arange(1, 9).double())
    twelve = alibi_slopes(12, device=torch.device("cpu"), dtype=torch.float64)
    assert_close(twelve[:8], eight)
    assert_close(twelve[8:], 2.0 ** -(torch.arange(4).double() + 0.5))


@every_spec
@pytest.mark.parametrize("length", [1, 2, 7, 65])
@torch.no_grad()
def test_forward_equals_fold_of_step(spec, length):
    mixer, x = build(spec), signal(2, length)
    out = mixer(x)
    ys, state = fold(mixer, x)
    assert_close(out.y, ys)
    assert_same_state(out.state, state)
    assert_same_state(mixer(x, mixer.init_state(2, dtype=x.dtype)).state, state)


def leaves(mixer, x, state):
    wanted = [x, *mixer.parameters()]
    return wanted + [leaf for leaf in state if leaf.is_floating_point()]


@every_spec
@pytest.mark.parametrize(
    ("segments", "length"),
    [*[("none", n) for n in LENGTHS], *[(s, n) for s in ("packed", "padded") for n in (7, 65)]],
)
def test_reference_engine_agrees_in_values_gradients_and_state(spec, segments, length):
    ids = torch.zeros(2, length, dtype=torch.int64)
    if segments == "packed":
        ids[0, length // 2 :] = 1
        ids[1, -1:] = 1
    elif segments == "padded":
        ids[1, : length // 2] = -1
        ids[1, length // 2 :] = 1
    prefix = signal(2, 9, 7)
    results = []
    for engine in ("torch", "reference"):
        mixer = build(spec, engine=engine)
        before = [
            leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in mixer(prefix).state
        ]
        state, x = type(mixer(prefix).state)(*before), signal(2, length).requires_grad_()
        out = mixer(x, state, call=Call.of(x, None if segments == "none" else ids))
        weight = torch.linspace(-1, 1, out.y.numel(), dtype=torch.float64).view_as(out.y)
        loss = (out.y * weight).sum() + out.state.k.square().sum() + out.state.v.sum()
        grads = torch.autograd.grad(loss, leaves(mixer, x, state))
        results.append((out, grads))
    (a, ga), (b, gb) = results
    assert_close(a.y, b.y)
    assert_same_state(a.state, b.state)
    for actual, expected in zip(ga, gb, strict=True):
        assert expected.isfinite().all()
        assert_close(actual, expected)


@every_spec
@pytest.mark.parametrize("splits", [(8, 8, 5), (1, 20), (20, 1), (7, 14)])
def test_splits_equal_one_call(spec, splits):
    mixer = build(spec)
    results = []
    for pieces in (splits, (21,)):
        x, state, ys = signal(2, 21).requires_grad_(), None, []
        for piece in x.split(list(pieces), dim=1):
            out = mixer(piece, state)
            state = out.state
            ys.append(out.y)
        loss = torch.cat(ys, 1).square().sum() + state.k.square().sum() + state.v.sum()
        results.append((torch.cat(ys, 1), state, torch.autograd.grad(loss, x)[0]))
    assert_close(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1])
    assert_close(results[0][2], results[1][2])


@every_spec
def test_documents_and_padding_leave_no_trace(spec):
    mixer = build(spec)
    documents = [signal(1, n, n) for n in (6, 1, 11)]
    packed = torch.cat(documents, 1)
    ids = torch.cat([torch.full((1, n), i) for i, n in ((1, 6), (2, 1), (3, 11))], 1)
    alone = [mixer(x) for x in documents]
    out = mixer(packed, call=Call.of(packed, ids))
    assert_close(out.y, torch.cat([a.y for a in alone], 1))
    more = signal(1, 9, 5)
    assert_close(fold(mixer, more, out.state)[0], mixer(more, alone[-1].state).y)
    padded = torch.cat([signal(1, 4, 8), documents[0]], 1).requires_grad_()
    ids = torch.tensor([[-1] * 4 + [1] * 6])
    out = mixer(padded, call=Call.of(padded, ids))
    assert_close(out.y[:, 4:], alone[0].y)
    assert out.y.isfinite().all()
    (gradient,) = torch.autograd.grad(out.y.sum(), padded)
    assert gradient.isfinite().all()
    assert_close(fold(mixer, more, out.state)[0], mixer(more, alone[0].state).y)
    nothing = mixer(padded, call=Call.of(padded, torch.full((1, 10), -1))).state
    assert (nothing.position == -1).all()
    assert_close(mixer(more, nothing).y, mixer(more).y)


def test_cache_and_ring_layout():
    full = build(SPECS["mha"])(signal(1, 7)).state
    assert full.position.shape == (1, 0)
    assert full.positions().tolist() == [list(range(7))]
    assert full.k.shape == (1, 2, 7, 8)
    ring = build(SPECS["window"])
    out = ring(signal(1, 3))
    assert out.state.position.tolist() == [[0, 1, 2, -1, -1]]
    assert not out.state.k[:, :, 3:].any()
    empty = ring.init_state(1)
    assert empty.k.data_ptr() != empty.v.data_ptr()
    out = ring(signal(1, 9, 1), out.state)
    assert out.state.position.tolist() == [[10, 11, 7, 8, 9]]
    assert out.state.next_position().tolist() == [12]
    assert fold(ring, signal(1, 40))[1].k.shape == (1, 2, 5, 8)
    assert AttentionSpec(2, window=5).context_window == 5
    assert AttentionSpec(2).context_window == math.inf


@every_spec
@torch.no_grad()
def test_a_cache_in_order_and_its_written_out_form_are_one(spec):
    mixer, prefix, more = build(spec), signal(2, 9), signal(2, 4, 1)
    short = mixer(prefix).state
    assert short.in_order == (spec.stencil.slots is None)
    written = short._replace(position=short.positions())
    assert_close(fold(mixer, more, short)[0], fold(mixer, more, written)[0])
    assert_close(mixer(more, short).y, mixer(more, written).y)
    ids = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    packed = [mixer(more, state, call=Call.of(more, ids)) for state in (short, written)]
    assert_close(packed[0].y, packed[1].y)
    assert_same_state(packed[0].state, packed[1].state)


def test_ring_forgets_what_left_the_window():
    mixer, x = build(SPECS["window"]), signal(1, 20)
    poisoned = x.clone()
    poisoned[:, :10] = 1e6
    a, b = mixer(x), mixer(poisoned)
    assert_close(a.y[:, 14:], b.y[:, 14:])
    assert_same_state(a.state, b.state)


def made_by(mixer, call, x, state=None):
    """Names of what a mixer made of a call, given what others had made before."""
    before = set(call._made)
    mixer(x, state, call=call)
    return {name.split(",")[0] for name in set(call._made) - before}


def test_layers_of_one_call_share_layouts_masks_and_rotary_tables():
    x = signal(1, 9)
    mixer, wider, ring = (build(SPECS[name]) for name in ("mha", "gqa-norm", "window"))
    call, states = Call.of(x), [m(signal(1, 3)).state for m in (mixer, wider, ring)]
    full, narrow = "layout after 3", "layout after 5"
    assert made_by(mixer, call, x, states[0]) == {full, "visible True after 3", "rope of 8"}
    assert made_by(mixer, call, x, states[0]) == set()
    assert made_by(wider, call, x, states[1]) == {"rope of 4"}  # another width
    assert made_by(ring, call, x, states[2]) == {narrow, "visible True after 5", "rope of 8"}
    assert made_by(build(SPECS["alibi"]), Call.of(x), x) == {
        "layout after 0",
        "visible True after 0",
    }


def test_what_is_shared_changes_nothing():
    x = signal(2, 9)
    mixers = [build(SPECS[name]) for name in ("mha", "window", "gqa-norm", "alibi", "mha")]
    ids = torch.tensor([[0] * 4 + [1] * 5, [-1] * 2 + [0] * 7])
    states = [m(signal(2, 3)).state for m in mixers]
    call = Call.of(x, ids)
    for mixer, state in zip(mixers, states, strict=True):
        alone, together = mixer(x, state, call=Call.of(x, ids)), mixer(x, state, call=call)
        assert torch.equal(together.y, alone.y)
        assert_same_state(together.state, alone.state)


@every_spec
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 64)])
def test_cost_is_what_is_measured(spec, batch, length):
    mixer = build(spec, torch.float32)
    cost = spec.cost(LayerContext(D_MODEL), length, batch)
    # The flop counter knows the fused kernels of CUDA and the plain form, not the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        out = mixer(signal(batch, length, dtype=torch.float32))
    assert cost.flops == counter.get_total_flops()
    assert cost.params == cost.active_params == sum(p.numel() for p in mixer.parameters())
    assert cost.state_bytes == sum(leaf.nbytes for leaf in out.state)


@every_spec
def test_low_precision(spec):
    full, x = build(spec, torch.float32), signal(2, 33, dtype=torch.float32)
    expected = full(x).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, stepped = full(x), fold(full, x)[0]
        again = full(x, mixed.state).y
    assert mixed.state.k.dtype == torch.bfloat16
    low = build(spec, torch.bfloat16)
    out = low(x.bfloat16())
    for y in (mixed.y, stepped, out.y, fold(low, x.bfloat16())[0]):
        assert y.dtype == torch.bfloat16
        assert (y.float() - expected).abs().mean() < 0.05 * expected.std()
    assert (again.float() - full(x, full(x).state).y).abs().mean() < 0.05 * expected.std()
    out.y.float().sum().backward()
    assert full(x, mixed.state).y.dtype == torch.float32


def test_unequal_widths_of_heads_and_model():
    spec = AttentionSpec(3, 1, head_dim=10)
    mixer = build(spec)
    assert mixer.q_proj.weight.shape == (30, 16)
    assert mixer.v_proj.weight.shape == (10, 16)
    assert mixer.o_proj.weight.shape == (16, 30)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AttentionSpec(3), r"m.n_heads: d_model 16 is not divisible by 3 heads; give a divisor"),
        (AttentionSpec(0), r"m.n_heads: 0 is not positive"),
        (AttentionSpec(4, 3), r"m.n_kv_heads: 3 does not divide n_heads 4"),
        (AttentionSpec(4, 0), r"m.n_kv_heads: 0 is not positive"),
        (AttentionSpec(4, window=0), r"m.window: 0 is not positive; give at least 1"),
        (AttentionSpec(4, softcap=-1.0), r"m.softcap: -1.0 is not positive"),
        (AttentionSpec(4, clip_qkv=0.0), r"m.clip_qkv: 0.0 is not positive"),
        (AttentionSpec(2, window=4, dilation=0), r"m.dilation: 0 is not positive"),
        (AttentionSpec(2, block=0), r"m.block: 0 is not positive"),
        (AttentionSpec(2, block=4, window=4), r"m.block: blocks take neither a window"),
        (AttentionSpec(2, n_blocks=2), r"m.n_blocks: 2 blocks of no size; give block too"),
        (AttentionSpec(2, n_global=2), r"m.n_global: .*give window or block too, or 0"),
        (AttentionSpec(2, window=2, n_global=-1), r"m.n_global: -1 is negative"),
        (AttentionSpec(2, causal=False, block=4), r"m.block: an encoder knows windows alone"),
        (AttentionSpec(2, causal=False, position="xpos"), r"m.position: .*use rope"),
        (AttentionSpec(2, position="xpos", xpos_base=0.0), r"m.xpos_base: 0.0 is not positive"),
        (AttentionSpec(2, position="xpos", rope_dims=3), r"m.rope_dims: 3 of 8"),
        (AttentionSpec(2, position="relative", rope_dims=4), r"m.position: 'relative' takes no"),
        (AttentionSpec(2, n_buckets=7), r"m.n_buckets: 7 buckets are too few; give an even"),
        (AttentionSpec(2, max_distance=16), r"m.max_distance: 16 is not above the 16 dist"),
        (AttentionSpec(2, qkv_rank=0), r"m.qkv_rank: 0 is not positive"),
        (AttentionSpec(2, qkv_shared=True), r"m.qkv_shared: .*give qkv_rank too"),
        (AttentionSpec(2, qk_norm="head"), r"m.qk_norm: .*give one of \('layer', 'layer_unb"),
        (
            AttentionSpec(2, rope_scaling=RopeScaling("ntk", 2.0, truncate=False)),
            r"m.rope_scaling.truncate: ntk does not read it",
        ),
        (AttentionSpec(2, rope_dims=3), r"m.rope_dims: 3 of 8 entries .* give an even number"),
        (AttentionSpec(2, rope_dims=10), r"m.rope_dims: 10 of 8 entries"),
        (AttentionSpec(2, head_dim=5), r"m.rope_dims: 5 of 5 entries .* another head_dim"),
        (AttentionSpec(2, rope_theta=1.0), r"m.rope_theta: 1.0 is not above 1"),
        (AttentionSpec(2, position="none", rope_dims=4), r"m.position: 'none' takes no rope_dims"),
        (
            AttentionSpec(2, rope_scaling=RopeScaling("linear", 0.5)),
            r"m.rope_scaling.factor: 0.5 is below 1",
        ),
        (
            AttentionSpec(2, rope_scaling=RopeScaling("yarn", 2.0)),
            r"m.rope_scaling.original_context: yarn needs it",
        ),
        (
            AttentionSpec(
                2, rope_scaling=RopeScaling("yarn", 2.0, 64, beta_fast=1.0, beta_slow=2.0)
            ),
            r"m.rope_scaling.beta_slow: outside",
        ),
        (
            AttentionSpec(2, rope_scaling=RopeScaling("llama3", 2.0, 64, low_freq_factor=4.0)),
            r"m.rope_scaling.low_freq_factor: outside \(0, high_freq_factor\)",
        ),
        (
            AttentionSpec(2, rope_scaling=RopeScaling("longrope", 2.0, 64, divisors=(1.0, 2.0))),
            r"m.rope_scaling.divisors: give 4 positive numbers",
        ),
        (
            AttentionSpec(2, rope_scaling=RopeScaling("llama3", 2.0, 64, attention_factor=1.0)),
            r"m.rope_scaling.attention_factor: llama3 does not read it",
        ),
        (
            AttentionSpec(2, rope_dims=2, rope_scaling=RopeScaling("ntk", 2.0)),
            r"m.rope_scaling: ntk cannot stretch 2",
        ),
        (
            AttentionSpec(2, rope_scaling=RopeScaling("linear", 2.0, original_context=64)),
            r"m.rope_scaling.original_context: linear does not read it; leave it out",
        ),
    ],
)
def test_check_names_the_rule_and_the_remedy(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(16, "m")


def test_scaling_reads_from_plain_data():
    data = {"kind": "attention", "n_heads": 2, "rope_scaling": {"method": "linear", "factor": 2}}
    spec = AttentionSpec.from_dict(data)
    assert spec == AttentionSpec(2, rope_scaling=RopeScaling("linear", 2.0))
    assert AttentionSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(SpecError, match=r"rope_scaling\.facter: unknown; did you mean factor\?"):
        AttentionSpec.from_dict({**data, "rope_scaling": {"method": "linear", "facter": 2}})


@every_encoder
@pytest.mark.parametrize("length", LENGTHS)
def test_an_encoder_sees_both_ways(spec, length):
    """Fused and reference agree in values and gradients; the mirror image has the mirrored output.

    Rotary, ALiBi and no positions know distances only, and the window is symmetric.
    """
    x = signal(2, length).requires_grad_()
    weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    results = []
    for engine in ("torch", "reference"):
        mixer = build(spec, engine=engine)
        y = mixer(x).y
        results.append((y, *torch.autograd.grad((y * weight).sum(), (x, *mixer.parameters()))))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)
    mixer = build(spec)
    if spec.position not in ("rope", "relative"):
        assert_close(mixer(x.flip(1)).y, mixer(x).y.flip(1))
    if length > 2:
        other = torch.cat([x[:, :1], x[:, 1:2] + 1, x[:, 2:]], 1)
        changed = (mixer(other).y - mixer(x).y).abs().amax((0, 2)) > 1e-9
        reach = spec.window or length
        assert changed.tolist() == [abs(t - 1) < reach for t in range(length)]


@every_encoder
@pytest.mark.parametrize("engine", ["torch", "reference"])
def test_an_encoder_honours_documents_and_padding(spec, engine):
    mixer = build(spec, engine=engine)
    documents = [signal(1, n, n) for n in (6, 1, 11)]
    ids = torch.tensor([[-1] * 4 + [1] * 6 + [2] + [3] * 11])
    packed = torch.cat([signal(1, 4, 8), *documents], 1).requires_grad_()
    out = mixer(packed, call=Call.of(packed, ids))
    assert_close(out.y[:, 4:], torch.cat([mixer(x).y for x in documents], 1))
    (gradient,) = torch.autograd.grad(out.y.sum(), packed)
    assert gradient.isfinite().all()
    both = torch.cat([documents[2], documents[2].flip(0)])
    assert_close(
        mixer(both, call=Call.of(both, torch.tensor([[0] * 11, [4] * 11]))).y, mixer(both).y
    )


@every_encoder
def test_an_encoder_has_no_state(spec):
    mixer, x = build(spec), signal(2, 7)
    out = mixer(x)
    assert not spec.causal
    assert out.state == mixer.init_state(2) == ()
    with pytest.raises(ShapeError, match=r"state: this attention is not causal.* whole sequences"):
        mixer(x, out.state)
    with pytest.raises(ShapeError, match=r"step: this attention is not causal"):
        mixer.step(x[:, 0], out.state)
    cost = spec.cost(LayerContext(D_MODEL), 7, 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mixer(x)
    assert cost.flops == counter.get_total_flops()
    assert (cost.params, cost.state_bytes) == (sum(p.numel() for p in mixer.parameters()), 0)


def test_gates_of_a_head_follow_its_queries():
    spec = SPECS["gate"]
    mixer, plain = build(spec), build(AttentionSpec(4, 2, 6, qk_norm=True))
    q, gate = mixer.q_proj.weight.view(4, 2, 6, D_MODEL).unbind(1)
    with torch.no_grad():
        plain.q_proj.weight.copy_(q.flatten(0, 1))
        for name in ("k_proj", "v_proj"):
            getattr(plain, name).weight.copy_(getattr(mixer, name).weight)
        plain.o_proj.weight.copy_(torch.eye(16, 24))
        mixer.o_proj.weight.copy_(torch.eye(16, 24))
    x = signal(2, 9)
    gates = torch.sigmoid(x @ gate.flatten(0, 1).T)[..., :16]
    assert_close(mixer(x).y, plain(x).y * gates)


def test_clipping_bounds_queries_keys_and_values():
    mixer = build(AttentionSpec(2, clip_qkv=0.1, position="none"))
    state = mixer(signal(1, 9)).state
    assert state.k.abs().max() == state.v.abs().max() == 0.1


class TestParity:
    """The same layer of transformers, float32, whole sequences."""

    T = 40

    @pytest.fixture(autouse=True)
    def _needs_transformers(self):
        pytest.importorskip("transformers", reason="parity with transformers: it is not installed")

    def compare(self, config, theirs, rotary, spec, window=None):
        torch.manual_seed(0)
        config._attn_implementation = "eager"
        layer, tables = theirs(config, layer_idx=0).eval(), rotary(config)
        ours = spec.build(LayerContext(config.hidden_size))
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(0, 0.2)
        ours.load_state_dict(layer.state_dict())
        x = torch.randn(2, self.T, config.hidden_size)
        position = torch.arange(self.T)
        age = position[:, None] - position
        hidden = (age < 0) | (age >= (window or self.T))
        mask = torch.zeros(1, 1, self.T, self.T).masked_fill(hidden, torch.finfo().min)
        cos_sin = tables(x, position.expand(2, -1))
        expected = layer(x, position_embeddings=cos_sin, attention_mask=mask)[0]
        assert_close(ours(x).y, expected)
        assert_close(fold(ours, x)[0], expected)

    @pytest.mark.parametrize(
        ("scaling", "theirs"),
        [
            (None, {"rope_type": "default"}),
            (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
            (
                RopeScaling("yarn", 8.0, 16),
                {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
            ),
        ],
    )
    @pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
    def test_llama(self, scaling, theirs, n_kv_heads):
        from transformers import LlamaConfig
        from transformers.models.llama import modeling_llama as llama

        config = LlamaConfig(
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=n_kv_heads,
            max_position_embeddings=128,
            rope_parameters={"rope_theta": 500.0, **theirs},
        )
        spec = AttentionSpec(4, n_kv_heads, rope_theta=500.0, rope_scaling=scaling)
        self.compare(config, llama.LlamaAttention, llama.LlamaRotaryEmbedding, spec)

    def test_qwen3_norms_queries_and_keys(self):
        from transformers import Qwen3Config
        from transformers.models.qwen3 import modeling_qwen3 as qwen3

        config = Qwen3Config(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16
        )
        theta = config.rope_parameters["rope_theta"]
        spec = AttentionSpec(4, 2, head_dim=16, qk_norm=True, rope_theta=theta)
        self.compare(config, qwen3.Qwen3Attention, qwen3.Qwen3RotaryEmbedding, spec)

    def test_olmoe_norms_all_heads_together_and_clips(self):
        from transformers import OlmoeConfig
        from transformers.models.olmoe import modeling_olmoe as olmoe

        config = OlmoeConfig(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=2, clip_qkv=0.3
        )
        theta = config.rope_parameters["rope_theta"]
        spec = AttentionSpec(
            4, 2, qk_norm="full", qk_norm_eps=config.rms_norm_eps, clip_qkv=0.3, rope_theta=theta
        )
        self.compare(config, olmoe.OlmoeAttention, olmoe.OlmoeRotaryEmbedding, spec)

    def test_qwen3_next_gates_and_norms_by_one_plus_the_weight(self):
        from transformers import Qwen3NextConfig
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

        config = Qwen3NextConfig(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16
        )
        rope = config.rope_parameters
        spec = AttentionSpec(
            4,
            2,
            head_dim=16,
            gate=True,
            qk_norm=True,
            qk_norm_kind="rms_plus_one",
            qk_norm_eps=config.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            rope_dims=int(16 * rope["partial_rotary_factor"]),
        )
        rotary = qwen3_next.Qwen3NextRotaryEmbedding
        self.compare(config, qwen3_next.Qwen3NextAttention, rotary, spec)

    def test_qwen2_has_biases_and_mistral_a_window(self):
        from transformers import MistralConfig, Qwen2Config
        from transformers.models.mistral import modeling_mistral as mistral
        from transformers.models.qwen2 import modeling_qwen2 as qwen2

        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen2Config(**sizes)
        spec = AttentionSpec(4, 2, qkv_bias=True, rope_theta=config.rope_parameters["rope_theta"])
        self.compare(config, qwen2.Qwen2Attention, qwen2.Qwen2RotaryEmbedding, spec)
        config = MistralConfig(**sizes, head_dim=8, sliding_window=6)
        spec = AttentionSpec(4, 2, window=6, rope_theta=config.rope_parameters["rope_theta"])
        rotary = mistral.MistralRotaryEmbedding
        self.compare(config, mistral.MistralAttention, rotary, spec, window=6)
