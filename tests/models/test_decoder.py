"""States written in place: no copy of the cache per token, forks, padding, other rows."""

from itertools import pairwise

import pytest
import torch

from kizzasi.errors import GenerateError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.attention.cache import AttentionState
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.decoding.decoder import Decoder
from kizzasi.models.decoding.own_cache import SPARE, OwnCache
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "ring"])
def model(request):
    attention = AttentionSpec(n_heads=2, window=request.param)
    blocks = (BlockSpec(attention, MLPSpec()),) * 2
    return build_model(ModelSpec(16, blocks, Tokens(11)), seed=3, dtype=torch.float64)


def ids(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def test_the_store_is_made_once_and_grows_by_doubling(model):
    decoder, x = Decoder(model), ids(1, 3 + 2 * SPARE)
    decoder.read(x[:, :3])
    stores = []
    for token in x[:, 3:].unbind(1):
        decoder.step(token)
        stores.append(decoder._line.blocks[0].mixer.store.slots)
    places = [store.data_ptr() for store in stores]
    changes = sum(a != b for a, b in pairwise(places))
    assert changes == (0 if model.spec.blocks[0].mixer.window else 1)


def test_generate_writes_in_place_and_gives_back_a_value(model):
    seen = []
    model.blocks[0].mixer.register_forward_hook(lambda _, __, out: seen.append(out.state))
    out = model.generate(ids(2, 5), 6, temperature=0, return_state=True)
    assert [type(state) for state in seen] == [AttentionState] + 6 * [OwnCache]
    assert len({state.store.k.data_ptr() for state in seen[1:]}) == 1
    assert type(out.state.blocks[0].mixer) is AttentionState
    seen.clear()
    model.generate(ids(2, 5), 3, step=lambda token, state: model.step(token, state))
    assert {type(state) for state in seen} == {AttentionState}


def test_padding_and_gathered_rows_decode_as_values_do(model):
    x, mask = ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    decoder = Decoder(model)
    torch.testing.assert_close(decoder.read(x, mask), model(x, mask=mask).logits[:, -1])
    state, order = model(x, mask=mask).state, torch.tensor([1, 0, 0])
    for round_ in range(2):
        for token in ids(3, len(state.position), seed=round_):
            out = model.step(token, state)
            state = out.state
            torch.testing.assert_close(decoder.step(token), out.logits)
        decoder.gather(order)
        state = state.gather(order)
    later, pad = ids(3, 4, seed=7), torch.tensor([[1] * 4, [0, 1, 1, 1], [0, 0, 0, 1]])
    made = decoder.read(later, pad)
    for row, n in enumerate((4, 3, 1)):
        alone = model(later[row : row + 1, 4 - n :], state.gather(torch.tensor([row])))
        torch.testing.assert_close(made[row], alone.logits[0, -1])


def test_a_decoder_starts_with_a_step_or_a_prompt_and_keeps_modes(model):
    model.train()
    decoder, x = Decoder(model), ids(2, 3)
    for wish in (decoder.fork, lambda: decoder.gather(torch.tensor([0]))):
        with pytest.raises(GenerateError, match="no token was read yet"):
            wish()
    logits = torch.stack([decoder.step(token) for token in x.unbind(1)], 1)
    torch.testing.assert_close(logits, model(x).logits)
    assert model.training
    model(x, decoder.fork()).loss(x).backward()  # no inference tensors
    model.zero_grad()
    model.eval()


def test_a_compiled_step_decodes_the_same(model, monkeypatch):
    if model.spec.blocks[0].mixer.window is None:
        with pytest.raises(SpecError, match="the state grows"):
            Decoder(model, compile="default")
        return
    asked, x, whole = [], ids(1, 8), torch.compile

    def traced(step, mode):
        asked.append(mode)
        return whole(step, backend="eager", dynamic=False, fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    state = model(x[:, :3]).state.detach()
    fast, plain = Decoder(model, state, compile="default"), Decoder(model, state)
    for token in x[:, 3:].unbind(1):
        torch.testing.assert_close(fast.step(token), plain.step(token))
    fast.gather(torch.tensor([0, 0]))
    assert fast.fork().position.tolist() == [8, 8]
    assert asked == ["default"]
    assert type(fast.fork().blocks[0].mixer) is AttentionState


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_step_in_machine_code_decodes_the_same():
    spec = ModelSpec(16, (BlockSpec(MambaSpec(d_state=3)),), Tokens(11))
    model, x = build_model(spec, seed=1), ids(1, 6)
    fast, plain = Decoder(model, compile="default"), Decoder(model)
    for token in x.unbind(1):
        torch.testing.assert_close(fast.step(token), plain.step(token))
