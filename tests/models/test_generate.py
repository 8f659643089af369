"""Sampling: greedy equals argmax of the parallel form, filters keep what they say, rows differ."""

import itertools

import pytest
import torch

from kizzasi.errors import ShapeError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.decoding.generate import Seen, pick, sampled_from
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec


@pytest.fixture(scope="module")
def model():
    block = BlockSpec(AttentionSpec(n_heads=2), MLPSpec())
    made = build_model(ModelSpec(16, (block, block), Tokens(11)), seed=3)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
    return made


def test_greedy_is_the_argmax_of_the_parallel_form(model):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model.generate(prompt, 8, temperature=0)
    assert out.shape == (2, 11)
    assert torch.equal(out[:, :3], prompt)
    expected = model(out).logits[:, 2:-1].argmax(-1)
    assert torch.equal(out[:, 3:], expected)


def test_seed_decides_and_one_row_comes_back_flat(model):
    prompt = torch.tensor([1, 2])
    a, b, c = (model.generate(prompt, 12, seed=s) for s in (1, 1, 2))
    assert a.shape == (14,)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_left_padded_rows_continue_as_if_alone(model):
    short, long = torch.tensor([7, 3]), torch.tensor([1, 2, 3, 4, 5])
    batch = torch.stack([torch.cat([torch.zeros(3, dtype=torch.long), short]), long])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    out = model.generate(batch, 6, temperature=0, mask=mask)
    assert torch.equal(out[0, 5:], model.generate(short, 6, temperature=0)[2:])
    assert torch.equal(out[1, 5:], model.generate(long, 6, temperature=0)[5:])


def test_rows_stop_at_eos_and_are_filled_with_it(model):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = model.generate(prompt, 20, temperature=0)[:, 3:]
    eos = int(free[0, 4])
    out = model.generate(prompt, 20, temperature=0, eos=eos)[:, 3:]
    for row, unstopped in zip(out.tolist(), free.tolist(), strict=True):
        if eos in unstopped:
            end = unstopped.index(eos)
            assert row[:end] == unstopped[:end]
            assert set(row[end:]) == {eos}


def test_filters_keep_what_they_say():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)

    def shares(**kwargs):
        sampling = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None} | kwargs
        return torch.bincount(pick(logits, generator=generator, **sampling), minlength=4) / 4000

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    torch.testing.assert_close(
        shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0
    )
    assert shares(top_p=0.79)[2:].sum() == 0
    assert shares(top_p=0.81)[2] > 0
    assert shares(top_p=0.81)[3] == 0
    assert shares(min_p=0.31)[2:].sum() == 0
    assert shares(min_p=0.29)[2] > 0
    assert shares(min_p=0.29)[3] == 0
    assert shares(temperature=0).tolist() == [1, 0, 0, 0]
    assert shares(temperature=0.1)[0] > 0.98


@pytest.mark.parametrize("n_beams", [1, 3])
def test_another_step_may_decode(model, n_beams):
    prompt, calls = torch.tensor([[1, 2, 3]]), []

    def step(ids, state):
        calls.append(ids)
        return model.step(ids, state)

    settings = {"temperature": 0, "n_beams": n_beams}
    out = model.generate(prompt, 6, step=step, **settings)
    assert torch.equal(out, model.generate(prompt, 6, **settings))
    assert len(calls) == 5


def test_training_mode_is_given_back(model):
    model.train()
    model.generate(torch.tensor([1]), 1)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"n_beams": 0},
        {"n_beams": 2, "temperature": 1.0},
        {"decode": None, "stop": ["a"]},
        {"max_new_tokens": 0},
    ],
)
def test_bad_arguments_are_named(model, bad):
    arguments = {"max_new_tokens": 3, **bad}
    with pytest.raises(ShapeError, match=next(iter(bad))):
        model.generate(torch.tensor([1]), **arguments)


@pytest.mark.parametrize(
    "prompt", [torch.zeros(1, 0, dtype=torch.long), torch.zeros(2), torch.zeros(1, 2, 3).long()]
)
def test_bad_prompts_show_their_shape(model, prompt):
    with pytest.raises(ShapeError, match="expected token ids"):
        model.generate(prompt, 2)


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 4, "top_p": 0.8},
        {"min_p": 0.3, "temperature": 1.7},
        {"repetition_penalty": 1.6, "top_k": 6, "temperature": 0.6},
    ],
)
def test_filters_together_leave_what_transformers_leaves(sampling):
    peers = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(1, 12, generator=torch.Generator().manual_seed(5))
    prompt = torch.tensor([[1, 3, 3, 8]])
    expected = logits
    for name, peer, value in (
        ("repetition_penalty", peers.RepetitionPenaltyLogitsProcessor, 1.0),
        ("temperature", peers.TemperatureLogitsWarper, 1.0),
        ("top_k", peers.TopKLogitsWarper, None),
        ("top_p", peers.TopPLogitsWarper, None),
        ("min_p", peers.MinPLogitsWarper, None),
    ):
        given = sampling.get(name, value)
        if given is not None:
            expected = peer(given)(prompt, expected)
    seen = Seen(prompt, None, 12, sampling.get("repetition_penalty", 1.0))
    settings = {n: sampling.get(n) for n in ("top_k", "top_p", "min_p")}
    p = sampled_from(seen.penalize(logits), sampling.get("temperature", 1.0), **settings)
    torch.testing.assert_close(p, expected.softmax(-1))


def test_repetition_penalty_counts_prompt_and_continuation_but_not_padding(model):
    prompt, mask = torch.tensor([[9, 4, 5]]), torch.tensor([[0, 1, 1]])
    seen = Seen(prompt, mask, 11, 2.0)
    seen.add(torch.tensor([7]))
    assert seen.penalize(torch.ones(1, 11))[0].tolist() == [1] * 4 + [0.5, 0.5, 1, 0.5, 1, 1, 1]
    assert (seen.penalize(-torch.ones(1, 11))[0, [4, 5, 7]] == -2).all()
    out = model.generate(prompt[0], 7, temperature=0, repetition_penalty=1e6)
    assert len(set(out.tolist())) == 10


def test_a_row_stops_at_its_stop_string_and_the_callback_sees_every_token(model):
    prompt, heard = torch.tensor([[1, 2, 3], [4, 5, 6]]), []
    decode = lambda ids: "".join("abcdefghijk"[i] for i in ids)  # noqa: E731
    free = model.generate(prompt, 20, temperature=0)[:, 3:]
    stop = decode(free[0, 3:5].tolist())
    out = model.generate(
        prompt, 20, temperature=0, stop=[stop], decode=decode, on_token=heard.append
    )[:, 3:]
    assert torch.equal(torch.stack(heard, 1), out)
    for row, unstopped in zip(out.tolist(), free.tolist(), strict=True):
        text = decode(unstopped)
        end = text.find(stop) + len(stop) if stop in text else len(text)
        assert row[:end] == unstopped[:end][: len(row)]
        assert set(row[end:]) <= {0}


def exhaustive(model, prompt, n, length_penalty, eos):
    """The best of all continuations that end with eos or have n tokens, by the parallel form."""
    every = torch.tensor(list(itertools.product(range(11), repeat=n)))
    inputs = torch.cat([prompt.expand(len(every), -1), every[:, :-1]], 1)
    p = model(inputs).logits[:, len(prompt) - 1 :].log_softmax(-1)
    p = p.gather(-1, every[..., None])[..., 0]
    best = (-float("inf"), [])
    for ids, each in zip(every.tolist(), p, strict=True):
        if eos in ids:
            ids = ids[: ids.index(eos) + 1]
        best = max(best, (float(each[: len(ids)].sum()) / len(ids) ** length_penalty, ids))
    return best[1]


@torch.inference_mode()
@pytest.mark.parametrize(("length_penalty", "eos"), [(1.0, None), (0.0, 4), (3.0, 4)])
def test_enough_beams_find_the_best_continuation(model, length_penalty, eos):
    prompts = torch.tensor([[1, 2], [5, 9]])
    settings = {"n_beams": 121, "length_penalty": length_penalty, "eos": eos}
    out = model.generate(prompts, 3, temperature=0, **settings)
    for prompt, row in zip(prompts, out[:, 2:].tolist(), strict=True):
        best = exhaustive(model, prompt, 3, length_penalty, eos)
        assert row == best + [eos] * (len(row) - len(best))


def test_a_beam_of_recurrent_states_is_at_least_as_likely_as_greedy():
    spec = ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)), BlockSpec(RWKV7Spec(8))), Tokens(11))
    model = build_model(spec, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))

    def likelihood(ids):
        p = model(ids[:, :-1]).logits[:, 2:].log_softmax(-1)
        return p.gather(-1, ids[:, 3:, None]).sum((1, 2))

    prompts = torch.tensor([[1, 2, 3], [3, 3, 10]])
    greedy, beams = (model.generate(prompts, 12, temperature=0, n_beams=n) for n in (1, 5))
    assert not torch.equal(greedy, beams)
    assert (likelihood(beams) >= likelihood(greedy)).all()
    alone = model.generate(prompts[1], 12, temperature=0, n_beams=5)
    assert torch.equal(alone, beams[1])
