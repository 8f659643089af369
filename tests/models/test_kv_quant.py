"""Keys and values in codes: what a code stands for, once coded always coded, and whose bytes."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError, StateError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.attention.memory import CodedState
from kizzasi.models.channels import MLPSpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, MambaSpec, MLASpec, ParallelSpec
from kizzasi.models.ops.kv_codes import (
    LEVELS,
    code_bytes,
    decode,
    encode,
    hadamard,
    straight_through,
    turn,
)
from kizzasi.models.state import join_states, named_leaves

KINDS = ("int8", "fp8", "nf4")


def model_of(*mixers, seed=0):
    blocks = tuple(BlockSpec(mixer, MLPSpec()) for mixer in mixers)
    return build_model(ModelSpec(16, blocks, Tokens(11)), seed=seed, dtype=torch.float64)


def ids(b, t, seed=0):
    return torch.randint(11, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 7, 64, 80, 128])
def test_codes_stand_for_numbers_nearby_and_for_themselves(kind, width):
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 0] = 0
    codes, scale = encode(x, kind)
    assert codes.dtype == torch.uint8
    assert codes.shape[-1] == code_bytes(width, kind)
    read = decode(codes, scale, kind, width, x.dtype)
    assert not read[0, 0].any()
    most = x.abs().amax(-1, keepdim=True)
    error = ((read - x) / most.clamp(min=1e-9)).abs().max()
    assert error <= {"int8": 0.51 / 127, "fp8": 1 / 16, "nf4": 0.153}[kind]
    if kind == "nf4" or width != 7:  # what was read is read again
        again = decode(*encode(read, kind), kind, width, x.dtype)
        assert (again - read).abs().max() <= (0 if kind == "nf4" else 0.01) * most.max()
    half = decode(*encode(x.bfloat16(), kind), kind, width, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert encode(x.bfloat16(), kind)[1].dtype == torch.bfloat16


def test_every_level_of_nf4_has_its_code():
    x = 3 * torch.tensor(LEVELS, dtype=torch.float64)
    codes, scale = encode(x, "nf4")
    assert scale.tolist() == [3.0]
    assert codes.tolist() == [i | (i + 1) << 4 for i in range(0, 16, 2)]
    assert torch.equal(decode(codes, scale, "nf4", 16, x.dtype), x)
    between = torch.tensor([1.0, (LEVELS[9] + LEVELS[10]) / 2 + 1e-9], dtype=torch.float64)
    codes, scale = encode(between, "nf4")
    assert decode(codes, scale, "nf4", 2, between.dtype)[1] == LEVELS[10]


@pytest.mark.parametrize("width", [1, 6, 64])
def test_a_turn_keeps_products_and_shares_out_what_is_large(width):
    by = hadamard(width, device=torch.device("cpu"), dtype=torch.float64)
    q, k = torch.randn(2, 5, width, dtype=torch.float64)
    assert_close(turn(turn(q, by), by), q)
    assert_close((turn(q, by) * turn(k, by)).sum(-1), (q * k).sum(-1))
    if width < 64:
        return
    k[:, 3] = 40.0

    def error(x):
        return (decode(*encode(x, "nf4"), "nf4", width, x.dtype) - x).norm()

    assert error(turn(k, by)) < 0.7 * error(k)


def test_gradients_pass_as_if_nothing_was_coded():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    shown = decode(*encode(x, "nf4"), "nf4", 8, x.dtype)
    y = straight_through(x, shown)
    assert torch.equal(y, shown)
    assert torch.equal(torch.autograd.grad((y * 3).sum(), x)[0], torch.full_like(x, 3))
    mixer = AttentionSpec(2, kv_quant="nf4").build(LayerContext(16)).double()
    mixer(torch.randn(1, 5, 16, dtype=torch.float64)).y.sum().backward()
    assert mixer.k_proj.weight.grad.abs().sum() > 0


def test_what_is_coded_is_never_coded_again_and_leaves_a_ring_whole():
    spec = AttentionSpec(2, window=5, n_global=2, kv_quant="nf4")
    mixer = spec.build(LayerContext(16)).double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    early, late = mixer(x[:, :6]).state, mixer(x).state
    assert isinstance(late, CodedState)
    assert late.position.tolist() == [[0, 1, 7, 8, 9, 10, 11]]
    for state in (early, late):  # the first are exact
        k = mixer(x[:, :2]).state.k_first
        assert_close(state.k_first, k)
    kept = [early.position[0].tolist().index(p) for p in (2, 3, 4, 5)]
    after = mixer(x[:, 6:7], early).state
    for position, slot in zip((3, 4, 5), kept[1:], strict=True):
        assert after.position[0, slot] == position
        assert torch.equal(after.k[:, :, slot], early.k[:, :, slot])
        assert torch.equal(after.v_scale[:, :, slot], early.v_scale[:, :, slot])
    poisoned = x.clone()
    poisoned[:, 2:4] = 1e3
    assert_close(mixer(poisoned).y[:, 8:], mixer(x).y[:, 8:])
    assert torch.equal(mixer(poisoned).state.k[:, :, 2:], late.k[:, :, 2:])


@pytest.mark.parametrize(
    ("quant", "most"), [("nf4", 0.3), ("int8", 0.56), ("fp8", 0.56), ("none", 2.05)]
)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_bytes_beside_those_of_float16(quant, most, head_dim):
    spec = AttentionSpec(8, 4, head_dim=head_dim, window=100, kv_quant=quant)
    mixer = spec.build(LayerContext(32))
    held = sum(leaf.nbytes for leaf in mixer.init_state(3))
    assert held == spec.cost(LayerContext(32), 100, 3).state_bytes
    assert held <= most * 3 * 100 * 4 * 2 * head_dim * 2


def test_forks_gathers_and_joins_move_codes_with_their_scales():
    model = model_of(AttentionSpec(2, kv_quant="nf4"), AttentionSpec(2, window=3, kv_quant="int8"))
    x, more = ids(3, 7), ids(3, 4, 1)
    state = model(x).state
    order = torch.tensor([2, 0, 0])
    forked = model(more, state.gather(order)).logits
    for i, row in enumerate(order.tolist()):
        alone = model(x[row : row + 1]).state
        assert_close(model(more[i : i + 1], alone).logits[0], forked[i])
    short = model(x[:1, :4]).state
    joined = join_states([state, short])
    assert_close(
        model(more[:1], joined.gather(torch.tensor([3]))).logits, model(more[:1], short).logits
    )
    assert_close(
        model(more[:1], joined.gather(torch.tensor([1]))).logits[0],
        model(more[:1], model(x[1:2]).state).logits[0],
    )
    beams = model.generate(x, 5, n_beams=3, temperature=0)
    assert beams.shape == (3, 12)
    wide = model.to(torch.float32)
    assert {leaf.dtype for _, leaf in named_leaves(wide(x).state)} == {
        *(torch.uint8, torch.bfloat16, torch.int64, torch.float32)
    }
    moved = wide(x).state.to(torch.float64)
    assert wide.double()(more, moved).logits.dtype == torch.float64


def test_a_models_cache_can_be_chosen_when_it_is_trained(tmp_path):
    plain = model_of(AttentionSpec(4, 2), AttentionSpec(2, window=4), MambaSpec(d_state=3))
    coded = plain.with_cache("int8", window=6, n_global=2)
    first, second, third = (block.mixer for block in coded.spec.blocks)
    assert (first.window, first.n_global, first.kv_quant) == (6, 2, "int8")
    assert (second.window, second.n_global, second.kv_quant) == (4, 2, "int8")
    assert third == MambaSpec(d_state=3)
    ours, theirs = dict(plain.named_parameters()), dict(coded.named_parameters())
    assert all(theirs[name] is parameter for name, parameter in ours.items())
    x = ids(2, 5)
    wanted = build_model(coded.spec, dtype=torch.float64)
    wanted.load_state_dict(plain.state_dict())
    long = ids(1, 20)
    assert torch.equal(coded(long).logits, wanted(long).logits)
    assert plain.spec.blocks[0].mixer.kv_quant == "none"
    assert 0 < (coded(x).logits - plain(x).logits).abs().max() < 0.05
    with pytest.raises(StateError, match="another model"):
        plain(x, coded(x).state)
    coded.save_pretrained(tmp_path / "coded")
    assert load(tmp_path / "coded").spec == coded.spec
    assert torch.equal(coded.generate(x, 6, temperature=0), wanted.generate(x, 6, temperature=0))
    again = coded.with_cache()
    assert again.spec.blocks[0].mixer.kv_quant == "none"
    assert again.spec.blocks[0].mixer.window == 6


def test_attention_within_other_parts_and_latents_are_found():
    inner = ParallelSpec((MambaSpec(d_state=3), AttentionSpec(2)))
    sizes = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    model = model_of(inner, MLASpec(2, **sizes))
    coded = model.with_cache("nf4", group=0)
    assert coded.spec.blocks[0].mixer.mixers[1].kv_quant == "nf4"
    assert coded.spec.blocks[1].mixer.kv_quant == "nf4"
    x = ids(2, 9)
    kinds = {type(part) for block in coded(x).state.blocks for part in (block.mixer, *block.mixer)}
    assert CodedState in kinds
    assert coded(x).state.nbytes < model(x).state.nbytes
    assert coded.spec.cost(9, 2).state_bytes < model.spec.cost(9, 2).state_bytes
    with pytest.raises(SpecError, match="mla keeps all positions"):
        model.with_cache("nf4", window=4)
    with pytest.raises(SpecError, match=r"no attention or mla, but \['mamba', 'mlp'\]"):
        model_of(MambaSpec(d_state=3)).with_cache("nf4")
    with pytest.raises(SpecError, match=r"kv_quant: 'nf5' is not one of .* did you mean nf4\?"):
        model.with_cache("nf5")
    with pytest.raises(SpecError, match=r"m.kv_quant: an encoder remembers nothing"):
        AttentionSpec(2, causal=False, kv_quant="nf4").check(16, "m")
