"""Sampling: greedy equals argmax of the parallel form, filters keep what they say, rows differ."""

import inspect
import itertools
from contextlib import nullcontext

import pytest
import torch

from kizzasi.errors import GenerateError, ShapeError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.decoding.sampling import DRAWN_AT_ONCE, Draws, Sampling, Seen, invert
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec
from kizzasi.models.state import named_leaves


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

    def shares(**settings):
        ids, sound = Sampling(**settings).pick(logits, Draws(0, 4000, logits.device))
        assert sound.all()
        return torch.bincount(ids, minlength=4) / 4000

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


def test_a_draw_never_falls_on_weight_zero():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    top = 1 - 2**-24
    for u, wanted in ((0.0, 1), (0.2499, 1), (0.25, 3), (top, 3)):
        ids, sound = invert(p, torch.tensor([u]))
        assert (int(ids), bool(sound)) == (wanted, True)
    ids, sound = invert(torch.tensor([[0.5, torch.nan]]), torch.tensor([0.9]))
    assert not sound
    assert 0 <= int(ids) < 2


def test_draws_come_in_blocks_of_one_stream_and_a_generator_is_advanced(model):
    n = DRAWN_AT_ONCE + 3
    draws = Draws(5, 2, torch.device("cpu"))
    found = torch.stack([draws.next() for _ in range(n)])
    whole = torch.rand(2 * DRAWN_AT_ONCE, 2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(found, whole[:n])
    generator = torch.Generator().manual_seed(1)
    first, second = (model.generate([1, 2], 12, seed=generator) for _ in range(2))
    assert torch.equal(first, model.generate([1, 2], 12, seed=1))
    assert not torch.equal(first, second)


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


@pytest.mark.parametrize("n_beams", [1, 2])
@pytest.mark.parametrize("breaks", [False, True])
def test_every_module_keeps_its_own_mode(model, n_beams, breaks):
    model.train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}

    def step(ids, state):
        assert not any(module.training for module in model.modules())
        if breaks:
            raise RuntimeError("broken off")
        return model.step(ids, state)

    with pytest.raises(RuntimeError) if breaks else nullcontext():
        model.generate(torch.tensor([1]), 2, temperature=0, n_beams=n_beams, step=step)
    assert before == {name: module.training for name, module in model.named_modules()}
    model.eval()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"n_beams": 0},
        {"n_beams": 2, "temperature": 1.0},
        {"n_beams": 2, "temperature": 0, "on_token": print},
        {"n_beams": 2, "temperature": 0, "return_logprobs": True},
        {"decode": None, "stop": ["a"]},
        {"stop": [""], "decode": str},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"eos": 11},
        {"eos": [3, -1]},
        {"eos": "end"},
        {"n_drafted": 0},
        {"mask": torch.zeros(1, 1)},
        {"mask": torch.ones(1, 2)},
    ],
)
def test_bad_arguments_are_named(model, bad):
    arguments = {"max_new_tokens": 3, **bad}
    with pytest.raises(GenerateError, match=next(iter(bad))):
        model.generate(torch.tensor([1]), **arguments)


def test_a_misspelt_argument_is_refused_and_the_signature_is_real(model):
    with pytest.raises(TypeError, match="temprature"):
        model.generate(torch.tensor([1]), 3, temprature=0)
    assert {"state", "eos", "process", "draft"} <= inspect.signature(
        model.generate
    ).parameters.keys()


@pytest.mark.parametrize("prompt", ["text", b"text", [[1, 2], [3]], [1, "a"], [], [[]]])
def test_what_is_no_prompt_is_refused_in_words(model, prompt):
    with pytest.raises(GenerateError, match="prompt: "):
        model.generate(prompt, 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_prompts_of_any_integers_and_lists_give_the_same_int64_ids(model, dtype):
    expected = model.generate(torch.tensor([[1, 2, 3]]), 4, temperature=0)
    assert expected.dtype == torch.int64
    given = model.generate(torch.tensor([[1, 2, 3]]).to(dtype), 4, temperature=0)
    assert given.dtype == torch.int64
    assert torch.equal(given, expected)
    assert torch.equal(model.generate([1, 2, 3], 4, temperature=0), expected[0])
    assert torch.equal(model.generate([[1, 2, 3]], 4, temperature=0), expected)


def test_a_model_of_frames_is_told_what_continues_it():
    signal = build_model(ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Signal(3, 3)))
    with pytest.raises(GenerateError, match=r"model\.forecast"):
        signal.generate(torch.randn(1, 4, 3), 2)


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
    ours = Sampling(**sampling)
    p = ours.probabilities(ours.logits(logits, Seen.begin(ours, prompt, None, 12)))
    torch.testing.assert_close(p, expected.softmax(-1))


def test_repetition_penalty_counts_prompt_and_continuation_but_not_padding(model):
    prompt, mask = torch.tensor([[9, 4, 5]]), torch.tensor([[0, 1, 1]])
    seen = Seen.begin(Sampling(repetition_penalty=2.0), prompt, mask, 11)
    before, seen = seen, seen.add(torch.tensor([7]))
    assert before.penalize(torch.ones(1, 11))[0, 7] == 1
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


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_any_of_several_eos_ends_a_row_and_the_first_fills_it(model, kind):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = model.generate(prompt, 20, temperature=0)[:, 3:].tolist()
    ends = [free[0][4], free[1][7]]
    out = model.generate(prompt, 20, temperature=0, eos=kind(ends))[:, 3:].tolist()
    lengths = [min(i for i, t in enumerate(row) if t in ends) + 1 for row in free]
    assert len(out[0]) == max(lengths)
    for row, unstopped, n in zip(out, free, lengths, strict=True):
        assert row == unstopped[:n] + [ends[0]] * (max(lengths) - n)


def test_beams_end_with_any_of_several_eos(model):
    settings = {"temperature": 0, "n_beams": 3}
    free = model.generate([1, 2], 8, **settings)[2:].tolist()
    one, same = (model.generate([1, 2], 8, eos=e, **settings) for e in (free[2], [free[2]]))
    assert torch.equal(one, same)
    assert free[2] in one[2:]
    both = model.generate([1, 2], 8, eos=[10, free[2]], **settings)
    assert set(both[2:].tolist()) & {10, free[2]}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"temperature": 0, "n_beams": 2}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_mean_nothing_are_an_error(settings, value):
    spec = ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Tokens(11))
    broken = build_model(spec)
    with torch.no_grad():
        broken.norm.weight.fill_(value)
    with pytest.raises(GenerateError, match="row 0: its logits are NaN"):
        broken.generate(torch.tensor([[1, 2], [3, 4]]), 3, **settings)


def test_the_row_that_breaks_is_named_even_if_the_break_comes_late(model):
    calls = []

    def step(ids, state):
        out = model.step(ids, state)
        calls.append(ids)
        if len(calls) == 3:
            out.logits[1] = torch.nan
        return out

    with pytest.raises(GenerateError, match=r"row 1: .* at new token 4"):
        model.generate(torch.tensor([[1, 2], [3, 4]]), 9, step=step)


@pytest.mark.parametrize("n_beams", [1, 3])
def test_prefill_makes_the_last_logits_only(n_beams):
    model = build_model(ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Tokens(50_000)))
    sizes = []
    model.stem.lm_head.register_forward_hook(lambda _, __, out: sizes.append(out.nbytes))
    prompt = torch.randint(50_000, (1, 600), generator=torch.Generator().manual_seed(0))
    model.generate(prompt, 3, temperature=0, n_beams=n_beams)
    assert len(sizes) == 3
    assert max(sizes) == n_beams * 4 * 50_000 < 2**20


def test_last_only_is_the_last_of_all_logits(model):
    x = torch.tensor([[0, 1, 2], [3, 4, 5]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    whole, last = model(x, mask=mask), model(x, mask=mask, last_only=True)
    torch.testing.assert_close(last.logits, whole.logits[:, -1:])
    assert torch.equal(last.state.position, whole.state.position)


def chat(model, turns, **settings):
    """Token by token by the parallel form alone: every turn, each followed by greedy tokens."""
    ids = torch.empty(0, dtype=torch.long)
    for turn, n in turns:
        ids = torch.cat([ids, turn])
        for _ in range(n):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids


@pytest.mark.parametrize("settings", [{}, {"n_beams": 1, "draft": "itself"}])
def test_a_conversation_goes_on_from_the_state_of_the_last_turn(model, settings):
    settings = {name: model if v == "itself" else v for name, v in settings.items()}
    first, second = torch.tensor([1, 2, 3]), torch.tensor([9, 4])
    expected = chat(model, [(first, 5), (second, 6)])
    told = model.generate(first, 5, temperature=0, return_state=True, **settings)
    assert torch.equal(told.ids, expected[:8])
    assert told.state.position.tolist() == [8]
    kept = [leaf.clone() for _, leaf in named_leaves(told.state)]
    more = model.generate(second, 6, state=told.state, temperature=0, **settings)
    assert torch.equal(more, expected[8:])
    for leaf, (_, now) in zip(kept, named_leaves(told.state), strict=True):
        assert torch.equal(leaf, now)
    beams = model.generate(first, 5, temperature=0, n_beams=3, return_state=True)
    assert beams.state.position.tolist() == [8]


def test_rows_of_unequal_length_go_on_from_a_state_too(model):
    prompt, free = torch.tensor([[1, 2, 3], [4, 5, 6]]), None
    free = model.generate(prompt, 9, temperature=0)[:, 3:].tolist()
    eos = next(t for t in free[0] if t not in free[1][: free[0].index(t) + 1])
    told = model.generate(prompt, 9, temperature=0, eos=eos, return_state=True)
    n = [row.index(eos) + 1 if eos in row else 9 for row in free]
    assert n[0] < n[1]
    assert told.state.position.tolist() == [3 + n[0], 3 + n[1]]
    turn, mask = torch.tensor([[7, 8, 1], [0, 0, 2]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    more = model.generate(turn, 4, state=told.state, mask=mask, temperature=0)[:, 3:]
    for i, own in enumerate((turn[0], turn[1, 2:])):
        whole = torch.cat([told.ids[i, : 3 + n[i]], own])
        assert torch.equal(more[i], model.generate(whole, 4, temperature=0)[len(whole) :])


def test_what_comes_back_can_be_trained_on(model):
    heard = []
    out = model.generate(
        torch.tensor([[1, 2]]), 4, on_token=heard.append, return_state=True, return_logprobs=True
    )
    for ids in (out.ids, torch.stack(heard, 1)):
        model(ids, out.state).loss(ids).backward()
    assert not any(t.is_inference() for t in (*heard, out.ids, out.logprobs))
    model.zero_grad()


def test_logprobs_are_the_models_own(model):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    eos = int(model.generate(prompt, 20, temperature=0)[0, 5])
    settings = {"temperature": 0, "repetition_penalty": 1.5, "eos": eos}
    for more in ({}, {"draft": model}):
        out = model.generate(prompt, 9, return_logprobs=True, **settings, **more)
        assert out.state is None
        p = model(out.ids).logits[:, 2:-1].log_softmax(-1)
        p = p.gather(-1, out.ids[:, 3:, None])[..., 0]
        filled = (out.ids[:, 3:] == eos).long().cumsum(1).roll(1, 1) > 0
        filled[:, 0] = False
        torch.testing.assert_close(out.logprobs, p.masked_fill(filled, 0.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0, "n_beams": 4}, {}])
def test_a_processor_sees_each_rows_own_ids_and_decides(model, settings):
    """An id must be one more than the id before, so that any mixing of rows is seen."""
    heads = torch.tensor([[1, 2], [7, 3]])

    def upwards(ids, logits):
        assert torch.equal(ids[:, :2], heads.repeat_interleave(len(ids) // 2, 0))
        wanted = (ids[:, -1:] + torch.tensor([1, 2])) % 11
        return torch.full_like(logits, -torch.inf).scatter(1, wanted, logits.gather(1, wanted))

    out = model.generate(heads, 6, process=upwards, **settings)
    assert set(((out[:, 2:] - out[:, 1:-1]) % 11).flatten().tolist()) <= {1, 2}


@pytest.mark.parametrize("n_beams", [1, 2])
def test_a_processor_that_forbids_everything_or_changes_the_shape_is_an_error(model, n_beams):
    settings = {"temperature": 0, "n_beams": n_beams}
    with pytest.raises(GenerateError, match="process"):
        model.generate([1, 2], 3, process=lambda _, x: torch.full_like(x, -torch.inf), **settings)
    with pytest.raises(GenerateError, match="process: returned"):
        model.generate([1, 2], 3, process=lambda _, x: x[:, :3], **settings)
