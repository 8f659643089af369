"""Autoregressive decoding: one prefill with the parallel form, then one step per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from kizzasi.models.decoding.beams import search_beams
from kizzasi.models.decoding.draft import Guesser, speculate
from kizzasi.models.decoding.inplace import COPIED, CalledLine, Products, begin
from kizzasi.models.decoding.own_cache import disown
from kizzasi.models.decoding.reading import (
    as_mask,
    as_rows,
    check_model,
    evaluating,
    read,
    read_each,
    vocabulary,
)
from kizzasi.models.decoding.sampling import Draws, Process, Sampling, Seen, integer, require
from kizzasi.models.decoding.transcript import Decoded, Run, Stopping, Transcript

if TYPE_CHECKING:
    from kizzasi.models.model import ModelOutput, SequenceModel
    from kizzasi.models.state import ModelState


REPAYS = 32  # tokens for which it pays to lay weights out anew


class Generated(NamedTuple):
    """What `generate` returns if it is asked for more than ids.

    ids        (b, t + n), or (t + n,) for a flat prompt.
    state      after every row's last token, its eos included and what it is filled with left out:
               the next turn of a conversation goes on from it. None unless asked for.
    logprobs   (b, n), or (n,), log p of every new token under the model itself, before penalties,
               `process`, temperature and filters; 0 where a row is filled. None unless asked for.
    """

    ids: Tensor
    state: ModelState | None
    logprobs: Tensor | None


@overload
def generate(  # pyright: ignore[reportOverlappingOverload]
    model: SequenceModel,
    prompt: Tensor | Sequence[Any],
    max_new_tokens: int,
    *,
    return_state: Literal[True],
    **others: Any,
) -> Generated: ...
@overload
def generate(  # pyright: ignore[reportOverlappingOverload]
    model: SequenceModel,
    prompt: Tensor | Sequence[Any],
    max_new_tokens: int,
    *,
    return_logprobs: Literal[True],
    **others: Any,
) -> Generated: ...
@overload
def generate(
    model: SequenceModel, prompt: Tensor | Sequence[Any], max_new_tokens: int, **others: Any
) -> Tensor: ...
def generate(  # pyright: ignore[reportInconsistentOverload]
    model: SequenceModel,
    prompt: Tensor | Sequence[Any],
    max_new_tokens: int,
    *,
    state: ModelState | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    process: Process | None = None,
    n_beams: int = 1,
    length_penalty: float = 1.0,
    draft: SequenceModel | None = None,
    n_drafted: int = 4,
    eos: int | Sequence[int] | Tensor | None = None,
    stop: str | Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    step: Callable[[Tensor, ModelState], ModelOutput] | None = None,
    seed: int | torch.Generator = 0,
    return_state: bool = False,
    return_logprobs: bool = False,
) -> Tensor | Generated:
    """Continue a prompt.

    Every module of the model is in evaluation mode for the call and has its own mode afterwards.

    Args:
        model: a causal model with a token stem.
        prompt: ids (b, t) or (t,), t >= 1, a tensor of any integers or a list.
        max_new_tokens: how many tokens to add at most.
        state: what the prompt continues, such as `Generated.state` of the turn before; None starts
            afresh. It is left as it was.
        mask: (b, t), False for left padding of prompts of unequal length, also after a state.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probability reaches p (Holtzman et al. 2020,
            arXiv:1904.09751).
        min_p: sample among tokens at least p times as likely as the most likely one (Nguyen et al.
            2024, arXiv:2407.01082).
        repetition_penalty: positive logits of tokens seen before, in the prompt too, are divided by
            it, negative ones multiplied (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing.
            What a given state has read is not counted.
        process: process(ids, logits) -> logits (b, v), after the penalty and before the
            temperature: a grammar, allowed ids, a bias. ids (b, t) are each row's own prompt and
            continuation so far, also of every beam and every drafted token; -inf forbids a token.
        n_beams: above 1, look for the likeliest continuation; see `search_beams`. It takes
            temperature 0.
        length_penalty: beams are compared by log likelihood / length ** length_penalty.
        draft: a smaller model of the same vocabulary. It guesses n_drafted tokens at a time, which
            the model reads at once and takes or replaces: tokens are distributed as without it, and
            equal at temperature 0. See `speculate`.
        n_drafted: how many.
        eos: a row that has produced this id, or one of these, is finished and filled up with it,
            with the first of several.
        stop: a row whose continuation contains this text, or one of these, is finished and filled
            up with eos, or with 0 if there is none. Needs `decode`.
        decode: a tokenizer's ids -> text.
        on_token: called with each new (b,) ids as soon as they are chosen.
        step: what decodes in place of `model.step`, such as `torch.compile(model.step)`.
        seed: of the sampling, or a generator, which is then advanced. The same seed gives the same
            tokens on every device, up to rounding of logits.
        return_state, return_logprobs: return `Generated`, with these.

    Returns:
        (b, t + n) int64 prompt and continuation, n <= max_new_tokens; (t + n,) for a prompt (t,).

    Raises:
        GenerateError: an argument is out of range, two of them exclude each other, a row is all
            padding, or logits are NaN or infinite so that nothing can be chosen.
        ShapeError: the prompt does not fit the model, or pads on the right.
        SpecError: the model is not causal.
    """
    check_model(model, "generate")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        process=process,
    )
    sampling.check()
    for name, value in {
        "max_new_tokens": max_new_tokens,
        "n_beams": n_beams,
        "n_drafted": n_drafted,
    }.items():
        require(integer(value) and value >= 1, name, f"an integer from 1 on, not {value!r}")
    greedy = not (temperature or stop or on_token or draft or return_logprobs)
    rule = "1 unless temperature is 0, without stop, on_token, draft and return_logprobs"
    require(n_beams == 1 or greedy, "n_beams", rule)
    require(not (step and draft), "step", "left out with draft, which reads several tokens at once")
    stopping = Stopping.of(eos, stop, decode, vocabulary(model))
    rows, flat = as_rows(prompt)
    mask = None if mask is None else as_mask(mask, rows)
    with evaluating(model), evaluating(draft or nn.Module()):
        logits, read_state = read(model, rows, mask, state)
        run = Run(
            model=model,
            step=step or model.step,
            logits=logits,
            state=read_state,
            seen=Seen.begin(sampling, rows, mask, logits.shape[-1]),
            sampling=sampling,
            draws=Draws(seed, len(rows), logits.device),
            stopping=stopping,
            max_new_tokens=max_new_tokens,
            on_token=on_token,
            with_logprobs=return_logprobs,
        )
        if n_beams > 1:
            out = search_beams(run, n_beams, length_penalty)
        elif draft is not None:
            out = speculate(run, Guesser.begin(draft, model, rows, mask), n_drafted)
        else:
            out = _sample(run, return_state)
        after = state_after(run, out) if return_state else None
    made = outcome(rows, out, after, flat)
    return made if return_state or return_logprobs else made.ids


def outcome(rows: Tensor, out: Decoded, state: ModelState | None, flat: bool) -> Generated:
    """Prompts (b, t) and what was decoded, as the caller gets it."""
    ids, p = torch.cat([rows, out.ids.to(rows.device)], dim=1), out.logprobs
    state = None if state is None else disown(state)
    if flat:
        return Generated(ids[0], state, None if p is None else p[0])
    return Generated(ids, state, p)


def _sample(run: Run, with_state: bool) -> Decoded:
    """Draw tokens, one step of the model for each, until all rows have finished."""
    transcript, sampling, seen, logits = Transcript(run), run.sampling, run.seen, run.logits
    given = run.step != run.model.step  # a compiled step, say, takes states as they are
    products = Products(COPIED if run.max_new_tokens >= REPAYS else 0)
    line = CalledLine(run.step, run.state) if given else begin(run.model, run.state, products)
    overheard = run.on_token or sampling.process or run.stopping.decode  # who listens may hook
    while True:
        ids, sound = sampling.pick(sampling.logits(logits, seen), run.draws)
        ids = transcript.add(ids, sound, logits)
        if overheard and not line.holds():
            line = begin(run.model, line.value(), products)
        if transcript.finished:
            out = transcript.decoded()
            if with_state and min(out.lengths) == len(transcript.ids):
                line.step(ids)
                out = out._replace(after=line.value())
            return out
        seen = seen.add(ids)
        logits = line.step(ids)


def state_after(run: Run, out: Decoded) -> ModelState:
    """The state after every row's own last token."""
    n = out.ids.shape[1]
    if out.after is not None:
        return out.after
    if out.state is not None and min(out.lengths) == n:
        return run.step(out.ids[:, -1], out.state).state
    pieces = [ids[:length] for ids, length in zip(out.ids, out.lengths, strict=True)]
    return read_each(run.model, pieces, run.state)[1]
