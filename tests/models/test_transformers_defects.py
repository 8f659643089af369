"""What goes wrong in transformers 5.23.0, with our models in its place: one test per defect.

The defects are cited with what they cost there. Two more, of RWKV-4 (a batch that decodes to the
wrong shape, and left padding that is not seen), are met by
test_a_batch_with_padding_equals_transformers_row_by_row in test_rwkv_checkpoints.py.
"""

import pytest
import torch
from tolerance import assert_close

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.mixers import (
    AttentionSpec,
    GatedDeltaSpec,
    GLASpec,
    Mamba2Spec,
    MambaSpec,
    RetentionSpec,
    RWKV4Spec,
    RWKV7Spec,
)
from kizzasi.models.state import named_leaves

WIDTH, VOCAB = 16, 19
MAMBA2 = Mamba2Spec(d_state=4, head_dim=8)
BAMBA = (
    BlockSpec(MAMBA2, SwiGLUSpec(24)),
    BlockSpec(AttentionSpec(4, 2, rope_dims=2), SwiGLUSpec(24)),
)
JAMBA = (
    BlockSpec(MambaSpec(d_state=4, inner_norm="rms"), SwiGLUSpec(24)),
    BlockSpec(AttentionSpec(4, 2, position="none"), MoESpec(3, hidden=24, normalize="all")),
)
MODELS = {
    "mamba": (BlockSpec(MambaSpec(d_state=4)),) * 2,
    "falcon_mamba": (BlockSpec(MambaSpec(d_state=4, inner_norm="weightless")),) * 2,
    "jamba": JAMBA,
    "mamba2": (BlockSpec(MAMBA2),) * 2,
    "bamba": BAMBA,
    "rwkv4": (BlockSpec(RWKV4Spec()),) * 2,
    "rwkv7": (BlockSpec(RWKV7Spec(8)),) * 2,
    "gated_delta": (BlockSpec(GatedDeltaSpec(2)),) * 2,
    "gla": (BlockSpec(GLASpec(2)),) * 2,
    "retention beside a window": (
        BlockSpec(RetentionSpec(2)),
        BlockSpec(AttentionSpec(2, window=5)),
    ),
}


def make(blocks):
    """In float64, with weights large enough to tell mistakes."""
    model = build_model(ModelSpec(WIDTH, tuple(blocks), Tokens(VOCAB)), seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


def tokens(batch, length, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def in_pieces(model, ids, sizes, state=None):
    logits = []
    for part in ids.split(sizes, dim=1):
        out = model(part, state)
        logits.append(out.logits)
        state = out.state
    return torch.cat(logits, dim=1), state


def by_steps(model, ids, state):
    logits = []
    for token in ids.unbind(1):
        out = model.step(token, state)
        logits.append(out.logits)
        state = out.state
    return torch.stack(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
def test_several_tokens_continue_a_cached_prompt(kind):
    """8 + 8 + 5 tokens drop the state there, without an error: logits off by 0.09, 0.9 and 0.4."""
    model, ids = make(MODELS[kind]), tokens(2, 21)
    whole = model(ids)
    logits, state = in_pieces(model, ids, [8, 8, 5])
    assert_close(logits, whole.logits)
    for (name, a), (_, b) in zip(named_leaves(state), named_leaves(whole.state), strict=True):
        assert_close(a.double(), b.double(), msg=name)


@torch.no_grad()
def test_mamba2_bounds_its_steps_when_decoding_too():
    """time_step_limit (0.02, 0.05) bounds the prompt's steps only there: 6e-2, or 1e-1 in all."""
    bounded = Mamba2Spec(d_state=4, head_dim=8, dt_limit=(0.02, 0.05))
    model, free = make([BlockSpec(bounded)] * 2), make(MODELS["mamba2"])
    ids = tokens(2, 16)
    whole = model(ids).logits
    assert (whole - free(ids).logits).abs().max() > 1e-2  # both bounds matter here
    assert_close(by_steps(model, ids, model.init_state(2)), whole)
    prompt = model(ids[:, :9])
    assert_close(by_steps(model, ids[:, 9:], prompt.state), whole[:, 9:])


@torch.no_grad()
def test_bamba_keeps_counting_positions_in_a_cached_forward():
    """A cached forward without position_ids starts again at 0 there: 6e-2 to 2e-1."""
    model, ids = make(BAMBA), tokens(2, 15)
    whole = model(ids).logits
    assert_close(in_pieces(model, ids, [6, 5, 4])[0], whole)
    prompt = model(ids[:, :6])
    assert prompt.state.position.tolist() == [6, 6]
    assert_close(by_steps(model, ids[:, 6:], prompt.state), whole[:, 6:])
    first, second = prompt.state.blocks
    restarted = second.mixer._replace(position=second.mixer.positions() + 7)
    forgetful = prompt.state._replace(blocks=(first, second._replace(mixer=restarted)))
    wrong = model.step(ids[:, 6], forgetful).logits
    assert (wrong - whole[:, 6]).abs().max() > 1e-3  # and positions matter here


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_left_padding_of_recurrent_models_changes_nothing(kind):
    """xLSTM is off by 2.2 there and RecurrentGemma by 0.2. We have neither; for the first stand the
    fading matrix memories gla and gated_delta, for the second a recurrence beside a window."""
    model, rows = make(MODELS[kind]), [tokens(1, n, seed=n) for n in (11, 7, 2)]
    more = tokens(3, 4, seed=9)
    padded = torch.cat([torch.cat([tokens(1, 11 - r.shape[1], seed=5), r], 1) for r in rows])
    mask = torch.arange(11) >= torch.tensor([[11 - r.shape[1]] for r in rows])
    out = model(padded, mask=mask)
    steps = by_steps(model, more, out.state)
    for i, row in enumerate(rows):
        bare = model(torch.cat([row, more[i : i + 1]], 1)).logits[0]
        assert_close(out.logits[i, mask[i]], bare[:-4], msg=f"row {i}")
        assert_close(steps[i], bare[-4:], msg=f"row {i}, decoding")


def gradients(model, loss):
    """By name; None of what the loss does not read, such as v0 of RWKV-7's first layer."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_flow_through_a_cached_state(kind):
    """The cache is written in place there, so nothing can be differentiated through it."""
    model, ids = make(MODELS[kind]), tokens(2, 17)
    probe = torch.randn(
        2, 5, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    expected = gradients(model, (model(ids).logits[:, 12:] * probe).sum())
    state = model(ids[:, :8]).state
    state = model(ids[:, 8:12], state).state
    actual = gradients(model, (model(ids[:, 12:], state).logits * probe).sum())
    stepped = model(ids[:, :12]).state
    by_step = gradients(model, (by_steps(model, ids[:, 12:], stepped) * probe).sum())
    for name, grad in expected.items():
        for other in (actual[name], by_step[name]):
            assert (grad is None) == (other is None), name
            if grad is not None:
                assert_close(other, grad, msg=name)
    unseen = sorted(set(range(VOCAB)) - set(ids[:, 12:].flatten().tolist()))
    early = [i for i in unseen if i in ids[:, :12]]
    assert model.stem.embedding.weight.grad[early].abs().amin(0).max() > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_recurrent_states_roll_back(kind):
    """Recurrent caches cannot be cropped there. Here one keeps the state and continues from it."""
    model, ids = make(MODELS[kind]), tokens(2, 14)
    held = model(ids[:, :9]).state
    before = [leaf.clone() for _, leaf in named_leaves(held)]
    model(tokens(2, 5, seed=7), held)  # a draft that is thrown away
    by_steps(model, tokens(2, 5, seed=8), held)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, named_leaves(held), strict=True))
    whole = model(ids).logits
    assert_close(model(ids[:, 9:], held).logits, whole[:, 9:])
    assert_close(by_steps(model, ids[:, 9:], held), whole[:, 9:])
