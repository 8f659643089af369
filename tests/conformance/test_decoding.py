"""Decoding, for every causal mixer and channel: what is asked of many rows is right row by row."""

import torch
from cases import MIXERS, VOCAB, causal_parts, make, tokens
from tolerance import assert_close
from torch import Tensor

from kizzasi.models.decoding import own_cache
from kizzasi.models.decoding.batcher import Batcher
from kizzasi.models.decoding.decoder import Decoder
from kizzasi.models.decoding.inplace import attention, codes
from kizzasi.models.decoding.sampling import Sampling
from kizzasi.models.state import join_states, map_state
from kizzasi.testing.mixer import assert_same_state


@causal_parts
@torch.no_grad()
def test_states_of_unequal_age_are_joined_gathered_and_joined_again(name):
    model, x, then = make(name), tokens(3, 11), tokens(3, 9, seed=4)
    alone = [model(x[:1]).state, model(x[1:2, :7]).state, model.init_state(1)]
    expected = torch.cat([model(then[i : i + 1], alone[i]).logits for i in range(3)])
    state = join_states(alone)
    assert_close(model(then, state).logits, expected)
    for t in range(3):
        out = model.step(then[:, t], state)
        assert_close(out.logits, expected[:, t])
        state = out.state
    state = join_states([state.gather(torch.tensor([2, 1])), alone[0]])
    for t in range(3, 9):
        out = model.step(torch.stack([then[2, t], then[1, t], then[0, t - 3]]), state)
        wanted = torch.stack([expected[2, t], expected[1, t], expected[0, t - 3]])
        assert_close(out.logits, wanted)
        state = out.state


@torch.no_grad()
def test_joining_drops_slots_that_are_dead_in_every_row():
    model, x = make("attention-mha"), tokens(2, 11)
    old, young = model(x[:1]).state, model(x[1:, :3]).state
    both = join_states([old, young])
    for token in tokens(5, 2):
        both = model.step(token, both).state
    rest = join_states([both.gather(torch.tensor([1])), young])
    assert rest.blocks[0].mixer.k.shape[2] == 3 + 5


@causal_parts
def test_a_draft_changes_no_greedy_token(name):
    """A perfect draft, which is never rolled back, and a strange one, which always is."""
    model, x = make(name, hybrid=name in MIXERS), tokens(2, 7)
    free = model.generate(x, 13, temperature=0)
    eos = int(free[0, 11])
    ended = model.generate(x, 13, temperature=0, eos=eos)
    strange = make("mamba-small")
    for draft, n_drafted in ((model, 3), (strange, 2)):
        settings = {"temperature": 0, "draft": draft, "n_drafted": n_drafted}
        assert torch.equal(model.generate(x, 13, **settings), free)
        assert torch.equal(model.generate(x, 13, eos=eos, **settings), ended)


@causal_parts
def test_every_row_of_a_batcher_is_decoded_as_if_alone(name):
    """Five requests in three rows, so that rows come, go and are mixed at unequal ages."""
    model = make(name)
    batcher = Batcher(model, max_rows=3)
    warm, greedy = Sampling(temperature=0.8, top_k=9), Sampling(temperature=0)
    wanted = {}
    for i, (length, n, sampling) in enumerate(
        [(3, 9, greedy), (11, 2, warm), (1, 5, warm), (7, 6, greedy), (5, 3, warm)]
    ):
        prompt = tokens(1, length, seed=i)[0]
        settings = {"seed": i, "return_state": i == 3}
        ticket = batcher.add(prompt, n, sampling=sampling, **settings)
        settings |= {"temperature": sampling.temperature, "top_k": sampling.top_k}
        wanted[ticket] = model.generate(prompt, n, return_logprobs=True, **settings)
    sizes = []
    while batcher.step():
        sizes.append(batcher.n_rows)
    assert max(sizes) == 3
    assert sizes[-1] == 0
    made = batcher.run()
    for ticket, alone in wanted.items():
        assert torch.equal(made[ticket].ids, alone.ids)
    assert_close(
        model(tokens(1, 4), made[3].state).logits, model(tokens(1, 4), wanted[3].state).logits
    )


@causal_parts
@torch.no_grad()
def test_a_state_written_in_place_decodes_as_a_value_does(name, monkeypatch):
    """Across a store that grows twice, with a fork on the way that nothing later touches."""
    for module in (own_cache, attention, codes):
        monkeypatch.setattr(module, "SPARE", 4)
    model, x = make(name, hybrid=name in MIXERS), tokens(2, 5 + 5 + 10 + 6)
    begun = model(x[:, :5]).state
    kept = map_state(Tensor.clone, begun)
    decoder, state, forks = Decoder(model, begun), begun, []
    for t in range(5, x.shape[1]):
        out = model.step(x[:, t], state)
        state = out.state
        assert_close(decoder.step(x[:, t]), out.logits)
        if t in (6, 15):
            forks.append((t, decoder.fork(), state))
    assert_same_state(decoder.fork(), state)
    assert_same_state(begun, kept)
    for t, fork, wanted in forks:
        assert_same_state(fork, wanted)
        other = (x[:, t] + 1) % VOCAB
        for _ in range(2):  # a fork is a value: it can be gone on from more than once
            assert_close(model.step(other, fork).logits, model.step(other, wanted).logits)
