"""Continuous batching: endings, waiting, cancelling, failing rows, conversations."""

import pytest
import torch

from kizzasi.errors import GenerateError, ShapeError, StateError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model, join_states
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.decoding.batcher import Batcher
from kizzasi.models.decoding.sampling import Sampling
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    blocks = (BlockSpec(AttentionSpec(n_heads=2), MLPSpec()), BlockSpec(MambaSpec(d_state=4)))
    made = build_model(ModelSpec(16, blocks, Tokens(11)), seed=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def alone(model, prompt, n, **settings):
    return model.generate(prompt, n, temperature=0, **settings)


def test_requests_may_come_while_others_are_decoded_and_leave_by_their_own_ending(model):
    free = alone(model, [1, 2], 30)[2:].tolist()
    last = max(free, key=free.index)  # the latest to appear
    end = free.index(last) + 1
    assert end > 3
    batcher = Batcher(model, max_rows=2)
    first = batcher.add([1, 2], 30, sampling=GREEDY, eos=[*{*range(11)} - {*free}, last])
    told = [batcher.step() for _ in range(2)]
    assert told == [{first: free[0]}, {first: free[1]}]
    decode = lambda ids: "".join("abcdefghijk"[i] for i in ids)  # noqa: E731
    other = alone(model, [4, 5, 6], 12)[3:].tolist()
    stop = decode(other[2:4])
    second = batcher.add(torch.tensor([[4, 5, 6]]), 12, sampling=GREEDY, stop=stop, decode=decode)
    third = batcher.add([7], 3, sampling=GREEDY)
    assert batcher.step() == {first: free[2], second: other[0]}  # the third waits
    made = batcher.run()
    assert made.keys() == {first, second, third}
    assert made[first].ids.tolist() == [1, 2, *free[:end]]
    n = decode(other).find(stop) + len(stop)
    assert made[second].ids.tolist() == [[4, 5, 6, *other[:n]]]
    assert torch.equal(made[third].ids, alone(model, [7], 3))
    assert batcher.step() == batcher.run() == {}


def test_a_slot_is_given_back_when_its_row_leaves(model):
    """A long row that leaves does not burden those that come after it."""
    batcher = Batcher(model, max_rows=2)
    batcher.add([1] * 50, 2, sampling=GREEDY)
    batcher.add([2], 30, sampling=GREEDY)
    for _ in range(4):
        batcher.step()
    batcher.add([3], 30, sampling=GREEDY)
    batcher.step()
    assert batcher._state.blocks[0].mixer.k.shape[2] == 1 + 4


def test_cancelled_requests_leave_and_the_others_do_not_notice(model):
    batcher = Batcher(model, max_rows=2)
    tickets = [batcher.add([i, i], 6, sampling=GREEDY) for i in range(4)]
    batcher.step()
    for gone in (tickets[0], tickets[3]):  # one in work, one waiting
        batcher.cancel(gone)
    assert batcher.n_rows == 1
    made = batcher.run()
    assert made.keys() == {1, 2}
    for ticket in made:
        assert torch.equal(made[ticket].ids, alone(model, [ticket, ticket], 6))
    with pytest.raises(GenerateError, match="ticket: must be of a request in work, not 0"):
        batcher.cancel(0)


def test_a_row_that_fails_does_not_take_the_others_along(model):
    calls = []

    def forbid(ids, logits):
        calls.append(ids)
        return logits if ids.shape[1] < 4 else torch.full_like(logits, -torch.inf)

    batcher = Batcher(model)
    bad = batcher.add([1, 2], 6, sampling=Sampling(temperature=0, process=forbid))
    good = batcher.add([3, 4], 6, sampling=GREEDY)
    with pytest.raises(GenerateError, match="request 0: row 0: its logits are NaN"):
        batcher.run()
    assert batcher.failed.keys() == {bad}
    assert torch.equal(batcher.finished[good].ids, alone(model, [3, 4], 6))


def test_modes_stay_and_conversations_go_on(model):
    model.train()
    batcher = Batcher(model)
    batcher.add([1, 2], 3, sampling=GREEDY, return_state=True, return_logprobs=True)
    (first,) = batcher.run().values()
    assert model.training
    assert first.logprobs.shape == (3,)
    batcher.add([5], 4, sampling=GREEDY, state=first.state)
    batcher.add([9, 9, 9], 4, sampling=GREEDY)
    second = batcher.run()[1]
    whole = [*first.ids.tolist(), 5]
    assert second.ids.tolist()[1:] == alone(model, whole, 4).tolist()[len(whole) :]
    model(first.ids[None], first.state).loss(first.ids[None]).backward()  # no inference tensors
    model.zero_grad()
    model.eval()


def test_what_does_not_fit_is_refused_when_it_is_added(model):
    batcher = Batcher(model)
    for bad, message in (
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"eos": 11}, "eos"),
        ({"sampling": Sampling(top_p=2.0)}, "top_p"),
        ({"stop": "a"}, "decode"),
        ({"prompt": [[1], [2]]}, "prompt: must be one row, not 2"),
    ):
        with pytest.raises(GenerateError, match=message):
            batcher.add(**{"prompt": [1], "max_new_tokens": 3, **bad})
    with pytest.raises(ShapeError, match="expected token ids"):
        batcher.add(torch.zeros(3), 3)
    assert batcher.run() == {}
    with pytest.raises(GenerateError, match="max_rows"):
        Batcher(model, max_rows=0)
    with pytest.raises(GenerateError, match="reads frames"):
        Batcher(build_model(ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Signal(3, 3))))


def test_states_of_two_models_are_not_joined():
    states = []
    for theta in (1e4, 1e6):
        spec = ModelSpec(16, (BlockSpec(AttentionSpec(n_heads=2, rope_theta=theta)),), Tokens(11))
        states.append(build_model(spec)(torch.tensor([[1, 2]])).state)
    with pytest.raises(StateError, match="join those of one model only"):
        join_states(states)
