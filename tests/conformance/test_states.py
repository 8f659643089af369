"""States know their model, move, and go through files and pickles."""

import io

import pytest
import torch
from cases import CAUSAL, MIXERS, causal_parts, make, model_spec, tokens

from kizzasi.errors import CheckpointError, StateError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model, load_state
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.s4d import S4DSpec
from kizzasi.models.state import ModelState, map_state, named_leaves


def model_of(mixer, d=16):
    return build_model(ModelSpec(d, (BlockSpec(mixer),) * 2, Tokens(23)))


def same(a, b):
    pairs = zip(named_leaves(a), named_leaves(b), strict=True)
    return type(a) is type(b) and all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


FOREIGN = {
    "fewer states": (MambaSpec(d_state=1), MambaSpec(d_state=4)),
    "one key head": (AttentionSpec(2, 1), AttentionSpec(2, 2)),
    "head_dim": (AttentionSpec(2, head_dim=8), AttentionSpec(2, head_dim=4)),
    "window": (AttentionSpec(2, window=4), AttentionSpec(2, window=8)),
    "rotary base": (AttentionSpec(2), AttentionSpec(2, rope_theta=1e6)),
    "S4D": (S4DSpec(d_state=8), S4DSpec(d_state=16)),
    "another mixer": (MambaSpec(), AttentionSpec(2)),
}


@pytest.mark.parametrize("pair", FOREIGN)
def test_a_state_of_another_model_is_refused_with_both_digests(pair, tmp_path):
    mine, other = (model_of(mixer) for mixer in FOREIGN[pair])
    state = mine(tokens(2, 5)).state
    state.save(tmp_path / "state")
    digests = f"{mine.spec.digest[:12]}.*{other.spec.digest[:12]}"
    for use in (
        lambda: other(tokens(2, 5), state),
        lambda: other.step(tokens(2, 1)[:, 0], state),
        lambda: other.step(tokens(2, 1)[:, 0], mine.init_state(2)),
        lambda: load_state(tmp_path / "state", other.init_state(1)),
    ):
        with pytest.raises(StateError, match=digests):
            use()


def test_a_state_that_says_no_model_is_held_against_the_shapes():
    model = model_of(MambaSpec(d_state=4))
    state = model(tokens(2, 5)).state._replace(model="")
    model(tokens(2, 3), state)
    thin = map_state(lambda t: t[..., :1] if t.ndim > 1 else t, state)
    deep = state._replace(blocks=state.blocks * 2)
    strange = state._replace(blocks=model_of(AttentionSpec(2)).init_state(2).blocks)
    for wrong in (thin, deep, strange):
        for use in (lambda w: model(tokens(2, 3), w), lambda w: model.step(tokens(2, 1)[:, 0], w)):
            with pytest.raises(StateError, match="state"):
                use(wrong)


@causal_parts
def test_every_state_goes_through_a_file_and_a_pickle(name, tmp_path):
    model = make(name, dtype=torch.float32)
    state = model(tokens(2, 7)).state.detach()
    assert state.model == model.spec.digest
    state.save(tmp_path / "state")
    buffer = io.BytesIO()
    torch.save({"state": state, "step": 3}, buffer)
    buffer.seek(0)
    unpickled = torch.load(buffer, weights_only=True)["state"]
    for again in (load_state(tmp_path / "state", model.init_state(1)), unpickled):
        assert same(again, state)
        assert again.model == state.model
        assert torch.equal(model(tokens(2, 3), again).logits, model(tokens(2, 3), state).logits)


@causal_parts
def test_a_state_moves_without_harm_to_its_integers(name):
    model = make(name, dtype=torch.float32)
    state = model(tokens(2, 7)).state.detach()
    wide = state.to(torch.float64)
    back = wide.to("cpu", torch.float32)
    assert same(back, state)
    assert same(state.to(torch.bfloat16), state)
    assert state.to("meta").position.is_meta
    for (key, a), (_, b) in zip(named_leaves(state), named_leaves(wide), strict=True):
        exact = not (a.is_floating_point() or a.is_complex())
        assert b.dtype == (a.dtype if exact else torch.promote_types(a.dtype, torch.float64)), key


@causal_parts
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_a_state_crosses_between_precisions(name, first):
    """A model in bfloat16 goes on from a float32 state, and the other way round."""
    second = torch.bfloat16 if first == torch.float32 else torch.float32
    x = tokens(2, 11)
    expected = make(name, dtype=torch.float32)(x).logits[:, -1]
    state = make(name, dtype=torch.float32).to(first)(x[:, :-1]).state
    model = make(name, dtype=torch.float32).to(second)
    for logits in (model(x[:, -1:], state).logits[:, -1], model.step(x[:, -1], state).logits):
        assert logits.dtype == second
        assert (logits.float() - expected).abs().mean() < 0.1 * expected.std()


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "state").write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="cannot read the state"):
        load_state(tmp_path / "state", model_of(MambaSpec()).init_state(1))


RECURRENT = [
    name
    for name in MIXERS
    if CAUSAL[name]
    and all(
        leaf.is_floating_point() or leaf.is_complex()
        for _, leaf in named_leaves(build_model(model_spec(name)).init_state(1).blocks)
    )
]


def tuned(model):
    """A state at position 0 that is not zero, such as training it leaves."""
    generator = torch.Generator().manual_seed(1)

    def noise(leaf):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        return 0.5 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(
            leaf.dtype
        )

    return map_state(noise, model.init_state(1))


@pytest.mark.parametrize("name", RECURRENT)
def test_a_given_state_at_position_0_is_a_state_also_under_padding(name):
    model = make(name)
    start = tuned(model)
    rows = [tokens(1, n, n) for n in (9, 4, 1)]
    x = torch.cat([torch.cat([tokens(1, 9 - r.shape[1], 3), r], 1) for r in rows])
    mask = torch.arange(9) >= torch.tensor([[0], [5], [8]])
    many = start.gather(torch.zeros(3, dtype=torch.long))
    out = model(x, many, mask=mask)
    for i, row in enumerate(rows):
        alone = model(row, start)
        torch.testing.assert_close(out.logits[i, 9 - row.shape[1] :], alone.logits[0])
        again = model(tokens(1, 3, 7), out.state.gather(torch.tensor([i])))
        torch.testing.assert_close(again.logits, model(tokens(1, 3, 7), alone.state).logits)
    split = model(x[:, :6], many, mask=mask[:, :6])
    rest = model(x[:, 6:], split.state, mask=mask[:, 6:])
    torch.testing.assert_close(rest.logits[mask[:, 6:]], out.logits[:, 6:][mask[:, 6:]])
    ids = torch.full((3, 9), 7)
    packed = model(x, many, mask=mask, segment_ids=ids)
    torch.testing.assert_close(packed.logits[mask], out.logits[mask])


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_is_trained_through_padding(name):
    model = make(name).requires_grad_(False)
    start = map_state(
        lambda t: t.requires_grad_() if t.is_floating_point() or t.is_complex() else t, tuned(model)
    )
    x, mask = tokens(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]).bool()
    out = model(x, start.gather(torch.zeros(2, dtype=torch.long)), mask=mask)
    out.loss(x, mask).backward()
    for key, leaf in named_leaves(start.blocks):
        assert leaf.grad is not None, key
        assert leaf.grad.isfinite().all(), key


def test_frames_take_a_tuned_state_too():
    model = build_model(ModelSpec(8, (BlockSpec(MambaSpec()),), Signal(3, 2)), dtype=torch.float64)
    start, x = tuned(model), torch.randn(1, 5, 3, dtype=torch.float64)
    padded = torch.cat([torch.full((1, 2, 3), float("nan"), dtype=torch.float64), x], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]]).bool()
    out = model(padded, start, mask=mask)
    assert isinstance(out.state, ModelState)
    torch.testing.assert_close(out.logits[:, 2:], model(x, start).logits)
