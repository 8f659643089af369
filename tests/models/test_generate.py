"""Sampling: greedy equals argmax of the parallel form, filters keep what they say, rows differ."""

import pytest
import torch

from kizzasi.errors import ShapeError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.generate import pick
from kizzasi.models.mixers.attention import AttentionSpec


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
        sampling = {"temperature": 1.0, "top_k": None, "top_p": None} | kwargs
        return torch.bincount(pick(logits, generator=generator, **sampling), minlength=4) / 4000

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    torch.testing.assert_close(
        shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0
    )
    assert shares(top_p=0.79)[2:].sum() == 0
    assert shares(top_p=0.81)[2] > 0
    assert shares(top_p=0.81)[3] == 0
    assert shares(temperature=0).tolist() == [1, 0, 0, 0]
    assert shares(temperature=0.1)[0] > 0.98


def test_training_mode_is_given_back(model):
    model.train()
    model.generate(torch.tensor([1]), 1)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"max_new_tokens": 0}]
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
