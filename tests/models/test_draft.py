"""Speculative decoding: tokens are distributed as the model's own, and fewer passes are made."""

import itertools

import pytest
import torch

from kizzasi.errors import GenerateError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec

V, N = 3, 3


def tokens_model(seed, mixer, vocab=V):
    made = build_model(ModelSpec(16, (BlockSpec(mixer, MLPSpec()),) * 2, Tokens(vocab)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return made


def exact(model, prompt, temperature):
    """log p of every continuation of N tokens, by the parallel form."""
    every = torch.tensor(list(itertools.product(range(V), repeat=N)))
    logits = model(torch.cat([prompt.expand(len(every), -1), every[:, :-1]], 1)).logits
    p = (logits[:, len(prompt) - 1 :] / temperature).log_softmax(-1)
    return p.gather(-1, every[..., None])[..., 0].sum(1)


@torch.no_grad()
def test_tokens_are_distributed_as_without_a_draft():
    model, draft = tokens_model(1, AttentionSpec(n_heads=2)), tokens_model(2, MambaSpec(d_state=4))
    prompt, temperature, generator = torch.tensor([1, 2]), 0.7, torch.Generator().manual_seed(0)
    expected = exact(model, prompt, temperature).exp()
    assert (expected - exact(draft, prompt, temperature).exp()).abs().sum() > 0.5
    counts, runs, rows = torch.zeros(V**N), 300, 4
    place = torch.tensor([V**2, V, 1])
    for _ in range(runs):
        settings = {"temperature": temperature, "draft": draft, "n_drafted": 2, "seed": generator}
        made = model.generate(prompt.expand(rows, -1), N, **settings)[:, 2:]
        counts += torch.bincount(made @ place, minlength=V**N)
    n = runs * rows
    chi_square = float(((counts - n * expected).square() / (n * expected)).sum())
    assert chi_square < 60, chi_square  # 26 degrees of freedom: passed by chance, 1 in 6,000


def rounds(draft, ids, start, n_drafted):
    """How many rounds of guesses reach the end of `ids`, if a draft always reads what was right."""
    place, found = start + 1, 0
    while place < len(ids):
        n = min(n_drafted, len(ids) - place)
        guess = draft.generate(ids[:place], n, temperature=0)[place:]
        place += int((guess == ids[place : place + n]).long().cumprod(0).sum()) + 1
        found += 1
    return found


def test_a_draft_saves_passes_of_the_model_and_forgets_wrong_guesses():
    model, passes = tokens_model(1, MambaSpec(d_state=4), vocab=30), []
    model.stem.lm_head.register_forward_hook(lambda _, __, out: passes.append(out.shape[1] > 1))
    near = tokens_model(1, MambaSpec(d_state=4), vocab=30)
    with torch.no_grad():
        near.stem.lm_head.weight[::2] *= 1.1
    plain = model.generate([1, 2, 3], 40, temperature=0)
    for draft, few in ((tokens_model(1, MambaSpec(d_state=4), vocab=30), 8), (near, 30)):
        passes.clear()
        out = model.generate([1, 2, 3], 40, temperature=0, draft=draft, n_drafted=4)
        assert torch.equal(out, plain)
        assert sum(passes) == rounds(draft, plain, 3, 4) <= few


def test_penalty_processor_and_listener_act_on_drafted_tokens_too():
    model, draft = (tokens_model(s, MambaSpec(d_state=4), vocab=30) for s in (1, 2))

    def upwards(ids, logits):
        wanted = (ids[:, -1:] + torch.tensor([1, 2, 3])) % 30
        return torch.full_like(logits, -torch.inf).scatter(1, wanted, logits.gather(1, wanted))

    prompt, heard = torch.tensor([[1, 2], [7, 3]]), []
    settings = {"temperature": 0, "process": upwards, "repetition_penalty": 5.0}
    plain = model.generate(prompt, 25, **settings)
    out = model.generate(prompt, 25, draft=draft, on_token=heard.append, **settings)
    assert torch.equal(out, plain)
    assert torch.equal(torch.stack(heard, 1), out[:, 2:])
    sampled = model.generate(prompt, 25, draft=draft, process=upwards)
    assert set(((sampled[:, 2:] - sampled[:, 1:-1]) % 30).flatten().tolist()) <= {1, 2, 3}


def test_drafts_that_do_not_fit_are_refused():
    model = tokens_model(1, MambaSpec(d_state=4), vocab=30)
    other = tokens_model(1, MambaSpec(d_state=4), vocab=31)
    with pytest.raises(GenerateError, match="draft: must be of the model's vocabulary 30, not 31"):
        model.generate([1], 3, draft=other)
    with pytest.raises(GenerateError, match="step: must be left out with draft"):
        model.generate([1], 3, draft=model, step=model.step)
    broken = tokens_model(2, MambaSpec(d_state=4), vocab=30)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(GenerateError, match="draft: its logits are NaN"):
        model.generate([1], 3, draft=broken)
    with pytest.raises(GenerateError, match="row 0: its logits are NaN"):
        broken.generate([1], 3, draft=model)
