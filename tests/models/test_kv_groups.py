"""Keys in codes by channel: what a query sees, codes that are made once, and whose bytes."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.attention.grouped_state import GroupedState
from kizzasi.models.channels import MLPSpec
from kizzasi.models.decoding.decoder import Decoder
from kizzasi.models.decoding.inplace import codes
from kizzasi.models.decoding.inplace.attention import AttentionSteps
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.models.ops.attention import attention_ref
from kizzasi.models.ops.coded_attention import Coded, coded_attention, coded_attention_ref
from kizzasi.models.ops.kv_codes import (
    code_bytes,
    decode,
    decode_channels,
    encode,
    encode_channels,
    hadamard,
    turn,
)
from kizzasi.models.ops.stencil import Places, Stencil, stencil_attention, stencil_attention_ref
from kizzasi.models.state import join_states, map_state
from kizzasi.testing.mixer import assert_same_state


def mixer_of(**fields):
    mixer = AttentionSpec(4, 2, **fields).build(LayerContext(16)).double()
    mixer.reset_parameters(1, torch.Generator().manual_seed(0))
    return mixer


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def read(x, kind):
    codes, step, least = encode_channels(x, kind)
    about = step.unsqueeze(-2), least.unsqueeze(-2)
    return decode_channels(codes, *about, kind, x.dtype)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("width", [1, 7, 80])
def test_a_channel_is_coded_in_even_steps_between_its_least_and_largest(kind, width):
    x = draw(2, 3, 9, width) * 10 ** torch.arange(width).remainder(3).double()
    x[0, 0, :, 0] = -4.0  # does not change
    codes, _, least = encode_channels(x, kind)
    assert codes.shape == (2, 3, 9, code_bytes(width, kind))
    assert codes.dtype == torch.uint8
    made, n = read(x, kind), {"int8": 255, "nf4": 15}[kind]
    span = x.amax(2) - x.amin(2)
    assert ((made - x).abs().amax(2) <= span / n * 0.503).all()
    assert torch.equal(made[0, 0, :, 0], x[0, 0, :, 0])
    assert_close(least, x.amin(2))
    half = x.bfloat16()
    assert encode_channels(half, kind)[1].dtype == torch.bfloat16
    assert read(half, kind).dtype == torch.bfloat16
    far = (read(x.float() + 1e4, kind) - x.float() - 1e4).abs().amax(2)  # least is rounded: 64 off
    assert (far <= 64 + span / n).all()


@pytest.mark.parametrize("fields", [{}, {"window": 7, "n_global": 2}, {"block": 4, "n_blocks": 2}])
def test_a_query_sees_its_own_group_as_it_is_and_earlier_ones_in_codes(fields):
    n, t = 4, 19
    mixer = mixer_of(position="none", kv_quant="nf4", kv_group=n, **fields)
    x, stencil = draw(1, t, 16), mixer.stencil
    q, k, v = (
        p(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    by = hadamard(4, device=torch.device("cpu"), dtype=torch.float64)
    seen_v = turn(decode(*encode(turn(v, by), "nf4"), "nf4", 4, v.dtype), by)
    whole = t // n * n
    seen_k = k.clone()
    seen_k[:, :, :whole] = read(k[:, :, :whole].unflatten(2, (-1, n)), "nf4").flatten(2, 3)
    g = stencil.n_global
    seen_k[:, :, :g], seen_v[:, :, :g] = k[:, :, :g], v[:, :, :g]
    place = torch.arange(t)[None]
    places = Places(torch.zeros_like(place), place)
    visible = stencil.visible(places, places)[0, 0]
    rows = []
    for i in range(t):
        keys = torch.cat([seen_k[:, :, : i // n * n], k[:, :, i // n * n :]], 2)
        values = torch.cat([seen_v[:, :, : i // n * n], v[:, :, i // n * n :]], 2)
        rows.append(attention_ref(q[:, :, i : i + 1], keys, values, visible=visible[i : i + 1]))
    wanted = mixer.o_proj(torch.cat(rows, 2).transpose(1, 2).flatten(-2))
    assert_close(mixer(x).y, wanted)
    assert (wanted - mixer_of(position="none", **fields)(x).y).abs().max() > 1e-4


@pytest.mark.parametrize("stencil", [Stencil(6), Stencil(20, n_global=3), Stencil(block=5)])
def test_two_kinds_of_keys_block_by_block(stencil):
    t, plan = 70, stencil.plan(70)
    assert plan is not None
    q, k, v, own_k, own_v = draw(5, 1, 2, t, 4)
    place = torch.arange(t)[None]
    at = Places(torch.zeros_like(place), place)
    for bias in (None, lambda distance: -0.1 * distance[:, None].double()):
        how = {"own": (own_k, own_v, 4), "bias": bias}
        made = stencil_attention(q, k, v, at, at, stencil, plan, **how)
        assert_close(made, stencil_attention_ref(q, k, v, at, at, stencil, plan, **how))
        plain = stencil_attention(q, k, v, at, at, stencil, plan, bias=bias)
        assert (made - plain).abs().max() > 0.1


@pytest.mark.parametrize("window", [None, 3, 6, 14])
def test_any_two_pieces_and_single_steps_leave_the_same_state(window):
    mixer = mixer_of(kv_quant="int8", kv_group=4, window=window, n_global=2 if window else 0)
    x, folded = draw(2, 21, 16), [mixer.init_state(2, dtype=torch.float64)]
    whole = mixer(x).y
    for i in range(21):
        out = mixer.step(x[:, i], folded[-1])
        assert_close(out.y, whole[:, i])
        folded.append(out.state)
    for a in range(20):
        for b in (a + 1, a + 3, a + 9):
            state = mixer(x[:, a:b], folded[a])
            assert_close(state.y, whole[:, a : min(b, 21)])
            for one, other in zip(state.state, folded[min(b, 21)], strict=True):
                assert_close(one.double(), other.double())


def test_a_group_is_coded_once_and_out_of_reach_it_touches_nothing():
    mixer = mixer_of(window=6, kv_quant="nf4", kv_group=4)
    x = draw(1, 30, 16)
    early, late = mixer(x[:, :18]).state, mixer(x[:, :20]).state
    assert isinstance(late, GroupedState)
    kept = [p for p in early.position[0].tolist() if 16 > p >= 14]
    for p in kept:
        slot = p % 6
        assert torch.equal(early.k[:, :, slot], late.k[:, :, slot])
        group = p // 4 % late.k_step.shape[2]
        assert torch.equal(early.k_step[:, :, group], late.k_step[:, :, group])
    other = x.clone()
    other[:, :4] = 1e3
    assert_close(mixer(other).y[:, 9:], mixer(x).y[:, 9:])
    other[:, 4:8] = 1e3  # position 8 is in sight of 13, in a group of its own
    assert_close(mixer(other).y[:, 13:], mixer(x).y[:, 13:])


def test_gradients_pass_as_if_nothing_was_coded():
    mixer, x = mixer_of(kv_quant="nf4", kv_group=4, position="none"), draw(1, 9, 16)
    mixer(x).y.sum().backward()
    assert mixer.k_proj.weight.grad.abs().sum() > 0
    # The last query sees the first groups in codes alone, and yet their keys.
    x.requires_grad_()
    mixer.v_proj.requires_grad_(False)
    (grad,) = torch.autograd.grad(mixer(x).y[:, -1].sum(), x)
    assert grad[:, :4].abs().sum() > 0


def test_forks_gathers_joins_and_beams_move_groups_with_their_codes():
    ring = AttentionSpec(2, window=5, n_global=1, kv_quant="int8", kv_group=4)
    mixers = AttentionSpec(2, kv_quant="nf4", kv_group=3), MambaSpec(d_state=3), ring
    blocks = tuple(BlockSpec(mixer, MLPSpec()) for mixer in mixers)
    model = build_model(ModelSpec(16, blocks, Tokens(11)), seed=0, dtype=torch.float64)
    x = torch.randint(11, (3, 11), generator=torch.Generator().manual_seed(1))
    more, state = x[:, 7:], model(x[:, :7]).state
    forked = model(more, state.gather(torch.tensor([2, 0, 0]))).logits
    for i, row in enumerate((2, 0, 0)):
        alone = model(x[row : row + 1, :7]).state
        assert_close(model(more[i : i + 1], alone).logits[0], forked[i])
    short, long = model(x[:1, :4]).state, model(x[1:2, :10]).state
    joined = join_states([short, state, long])
    for row, alone in ((0, short), (4, long)):
        taken = model(more[:1], joined.gather(torch.tensor([row]))).logits
        assert_close(taken, model(more[:1], alone).logits)
    steps = joined
    for i in range(4):
        out = model.step(more[:1, i].expand(5), steps)
        steps = out.state
        assert_close(out.logits[0], model(more[:1], short).logits[0, i])
        assert_close(out.logits[4], model(more[:1], long).logits[0, i])
    assert model.generate(x, 5, n_beams=3, temperature=0).shape == (3, 16)


RINGS = {"none": {}, "ring": {"window": 9, "n_global": 2}, "late": {"window": 5, "n_global": 6}}


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("how", [{"kv_quant": "int8"}, {"kv_quant": "nf4", "kv_group": 4}, {}])
def test_codes_are_written_in_place_and_decode_as_values_do(ring, how, engine, monkeypatch):
    monkeypatch.setattr(codes, "SPARE", 4)
    blocks = (BlockSpec(AttentionSpec(4, 2, **RINGS[ring], **how), MLPSpec()),)
    how_built = {"dtype": torch.float64, "engine": engine}
    model = build_model(ModelSpec(16, blocks, Tokens(11)), seed=0, **how_built)
    x = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(1))
    for begin in (0, 5, 13):
        state = model(x[:, :begin]).state if begin else model.init_state(2)
        decoder, kept = Decoder(model, state), map_state(torch.clone, state)
        begun, places = state, set()
        for t in range(begin, 30):
            out = model.step(x[:, t], state)
            state = out.state
            assert_close(decoder.step(x[:, t]), out.logits)
            line = decoder._line.blocks[0].mixer
            assert type(line) is AttentionSteps
            store = line.store.leaves["v"] if how else line.store.slots
            places.add(store.data_ptr())
        assert len(places) <= (1 if RINGS[ring] else 5)  # grown by doubling, else never moved
        assert_same_state(decoder.fork(), state)
        assert_same_state(begun, kept)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
@pytest.mark.parametrize("width", [1, 6, 7, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 10])
def test_codes_are_attended_to_alike_in_c(kind, width, dtype, n):
    """Few and many slots, before, at and after the end of a group, inside the first ones; slots to
    spare hold codes that would show."""
    native = pytest.importorskip("kizzasi.models.ops.native.coded_attention", exc_type=ImportError)
    if n and kind == "fp8":
        return
    b, h, room, g = 2, 3, 140, 4
    k, v = draw(2, b, h, room, width).to(dtype)
    q, exact = draw(b, h, 5, width).to(dtype), draw(4, b, h, max(n, g), width).to(dtype)
    v_codes, v_scale = encode(v, kind)
    open_ = [x[:, :, :n] for x in exact[2:]] if n else [None, None]
    least = None
    if n:
        k_codes, k_scale, least = encode_channels(k.unflatten(2, (-1, n)), kind)
        k_codes = k_codes.flatten(2, 3)
    else:
        k_codes, k_scale = encode(k, kind)
    firsts = exact[0, :, :, :g], exact[1, :, :, :g]
    coded = Coded(k_codes, v_codes, k_scale, least, v_scale, *firsts, *open_)
    for s in (1, 3, 4, 5, 10, 11, 20, 97, 130, 131):
        wanted = coded_attention_ref(q, coded, s, kind)
        assert_close(native.coded_attention(q, coded, s, kind), wanted)
        assert_close(coded_attention(q, coded, s, kind), wanted)


@pytest.mark.parametrize(("quant", "most"), [("nf4", 0.3), ("int8", 0.56)])
@pytest.mark.parametrize("window", [1000, None])
def test_bytes_beside_those_of_float16(quant, most, window):
    spec = AttentionSpec(8, 4, head_dim=64, window=window, kv_quant=quant, kv_group=64)
    mixer = spec.build(LayerContext(32))
    state = mixer.init_state(3) if window else mixer(torch.randn(3, 1000, 32)).state
    held = sum(leaf.nbytes for leaf in state)
    assert held == spec.cost(LayerContext(32), 1000, 3).state_bytes
    open_ = state.k_open.nbytes + state.v_open.nbytes
    assert held - open_ <= most * 3 * 1000 * 4 * 2 * 64 * 2


def test_a_checkpoint_in_nf4_codes_keys_by_channel_unless_told_otherwise():
    blocks = (BlockSpec(AttentionSpec(2)),)
    model = build_model(ModelSpec(16, blocks, Tokens(11)), seed=0)

    def group(*args, **how):
        return model.with_cache(*args, **how).spec.blocks[0].mixer.kv_group

    assert group("nf4") == group("nf4", window=9) == 64
    assert group("nf4", group=0) is None
    assert group("int8") is group("none") is None
    assert group("int8", group=32) == 32
    digest = ModelSpec(16, (BlockSpec(AttentionSpec(2, kv_quant="nf4")),), Tokens(11)).digest
    assert model.with_cache("nf4", group=0).spec.digest == digest
    with pytest.raises(SpecError, match="kv_group: keys are not coded; give kv_quant too"):
        group("none", group=32)
    with pytest.raises(SpecError, match="kv_group: no channels are coded in fp8"):
        group("fp8", group=32)
    with pytest.raises(SpecError, match="kv_group: 1 tokens are no group"):
        group("nf4", group=1)
