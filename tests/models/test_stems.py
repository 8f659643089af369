"""Stems: learned positions restart with every document, skip padding, and end somewhere."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.mixers.attention import AttentionSpec

LIMIT = 12


def spec(**changes):
    mixer = AttentionSpec(2, position="none", qkv_bias=True, out_bias=True)
    block = BlockSpec(mixer, MLPSpec(activation="gelu_tanh", bias=True), norm="layer")
    stem = Tokens(11, max_positions=LIMIT)
    return ModelSpec(8, (block, block), stem, norm="layer", tie_head=True).replace(**changes)


@pytest.fixture
def model():
    made = build_model(spec(), seed=1, dtype=torch.float64)
    with torch.no_grad():
        made.stem.position_embedding.weight.mul_(50)  # so that a wrong position shows
    return made


def tokens(batch, length, seed=0):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))


def fold(model, x, state=None):
    state = model.init_state(len(x)) if state is None else state
    logits = []
    for t in range(x.shape[1]):
        out = model.step(x[:, t], state)
        logits.append(out.logits)
        state = out.state
    return torch.stack(logits, 1), state


def test_positions_matter_and_step_counts_them(model):
    x = tokens(2, LIMIT)
    out = model(x)
    assert_close(fold(model, x)[0], out.logits)
    same = model(torch.zeros(1, 4, dtype=torch.long)).logits[0]
    assert not torch.allclose(same[0], same[1])
    pieces = [model(x[:, :5])]
    pieces.append(model(x[:, 5:], pieces[0].state))
    assert_close(torch.cat([p.logits for p in pieces], 1), out.logits)
    assert pieces[1].state.position.tolist() == [LIMIT, LIMIT]


@pytest.mark.parametrize("cut", [None, 1, 6, 9])
def test_positions_restart_in_every_document(model, cut):
    documents = [tokens(1, n, n) for n in (6, 1, 9, 3)]
    packed = torch.cat(documents, 1)
    ids = torch.cat([torch.full_like(d, 7 - i) for i, d in enumerate(documents)], 1)
    state, logits = None, []
    for x, i in zip(
        packed.tensor_split([cut or 0], 1), ids.tensor_split([cut or 0], 1), strict=True
    ):
        if x.numel():
            out = model(x, state, segment_ids=i)
            state = out.state
            logits.append(out.logits)
    alone = [model(d) for d in documents]
    assert_close(torch.cat(logits, 1), torch.cat([a.logits for a in alone], 1))
    assert state.position.tolist() == [3]
    more = tokens(1, 4, 9)
    for continued in (model(more, state), model(more, state, segment_ids=ids[:, -1:].expand(1, 4))):
        assert_close(continued.logits, model(more, alone[-1].state).logits)
    assert_close(fold(model, more, state)[0], model(more, alone[-1].state).logits)


@pytest.mark.parametrize("splits", [(12,), (4, 4, 4), (1, 11)])
def test_positions_skip_padding(model, splits):
    rows = [tokens(1, n, n) for n in (12, 5, 1)]
    x = torch.cat([torch.cat([tokens(1, 12 - r.shape[1], 3), r], 1) for r in rows])
    mask = torch.arange(12) >= torch.tensor([[0], [7], [11]])
    state, logits = None, []
    for piece, real in zip(x.split(splits, 1), mask.split(splits, 1), strict=True):
        out = model(piece, state, mask=real)
        state = out.state
        logits.append(out.logits)
    logits = torch.cat(logits, 1)
    assert state.position.tolist() == [12, 5, 1]
    for i, row in enumerate(rows):
        assert_close(logits[i, 12 - row.shape[1] :], model(row).logits[0])
    more = tokens(1, 2, 8)
    last_two = state.gather(torch.tensor([1, 2]))
    continued = model(more.expand(2, -1), last_two).logits
    assert_close(fold(model, more.expand(2, -1), last_two)[0], continued)
    for i, row in enumerate(rows[1:]):
        assert_close(continued[i], model(more, model(row).state).logits[0])


def test_too_long_a_document_is_refused(model):
    message = rf"has 13 tokens and the stem max_positions {LIMIT}; give shorter documents"
    with pytest.raises(ShapeError, match=message):
        model(tokens(2, 13))
    full = model(tokens(2, 12)).state
    with pytest.raises(ShapeError, match=message):
        model(tokens(2, 1), full)
    with pytest.raises(ShapeError, match=message):
        model.step(tokens(2, 1)[:, 0], full)
    packed = tokens(1, 20)
    model(packed, segment_ids=torch.arange(20)[None] // 10)
    model(packed, mask=torch.arange(20)[None] >= 8)
    with pytest.raises(ShapeError, match=message):
        model(packed, segment_ids=torch.arange(20)[None] // 13)


def test_cost_names_and_refusals():
    made = build_model(spec(), device="meta")
    assert spec().cost(7).params == made.n_params
    assert made.stem.position_embedding.weight.shape == (LIMIT, 8)
    assert made(torch.zeros(1, LIMIT, dtype=torch.long, device="meta")).logits.shape[1] == LIMIT
    plain = spec(stem=Tokens(11))
    assert spec().cost(7).params - plain.cost(7).params == LIMIT * 8
    assert spec().cost(7).state_bytes == build_model(spec())(tokens(1, 7)).state.nbytes
    with pytest.raises(SpecError, match=r"stem.max_positions: 0 is not positive"):
        spec(stem=Tokens(11, 0)).check()
    again = ModelSpec.from_dict(spec().to_dict())
    assert again == spec()


def test_parity_with_gpt2():
    """The whole model of transformers; its Conv1D weights are ours transposed."""
    pytest.importorskip("transformers", reason="parity with transformers: it is not installed")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=LIMIT, n_embd=8, n_layer=2, n_head=2)
    theirs = GPT2LMHeadModel(config).double().eval()
    weights = theirs.state_dict()
    for name in weights:
        weights[name] += 0.1 * torch.randn(weights[name].shape).double()
    ours = build_model(spec(), dtype=torch.float64)
    state = {
        "stem.embedding.weight": weights["transformer.wte.weight"],
        "stem.position_embedding.weight": weights["transformer.wpe.weight"],
    }
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = weights[f"transformer.ln_f.{part}"]
        for i in range(2):
            layer = f"transformer.h.{i}."
            block = f"blocks.{i}."
            state[f"{block}mixer_norm.{part}"] = weights[f"{layer}ln_1.{part}"]
            state[f"{block}channel_norm.{part}"] = weights[f"{layer}ln_2.{part}"]
            for name, qkv in zip(
                "qkv", weights[f"{layer}attn.c_attn.{part}"].chunk(3, -1), strict=True
            ):
                state[f"{block}mixer.{name}_proj.{part}"] = qkv.T if qkv.ndim == 2 else qkv
            for a, b in (
                ("mixer.o_proj", "attn.c_proj"),
                ("channel.up_proj", "mlp.c_fc"),
                ("channel.down_proj", "mlp.c_proj"),
            ):
                w = weights[f"{layer}{b}.{part}"]
                state[f"{block}{a}.{part}"] = w.T if w.ndim == 2 else w
    theirs.load_state_dict(weights)
    ours.load_state_dict(state)
    x = tokens(2, LIMIT)
    with torch.no_grad():
        assert_close(ours(x).logits, theirs(x).logits)
