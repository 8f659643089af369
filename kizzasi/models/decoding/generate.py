"""Autoregressive decoding: one prefill with the parallel form, then one step per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kizzasi.errors import ShapeError
from kizzasi.models.decoding.beams import search_beams

if TYPE_CHECKING:
    from kizzasi.models.model import ModelOutput, SequenceModel
    from kizzasi.models.state import ModelState


def generate(
    model: SequenceModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    n_beams: int = 1,
    length_penalty: float = 1.0,
    eos: int | None = None,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    step: Callable[[Tensor, ModelState], ModelOutput] | None = None,
    seed: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Continue a prompt.

    Args:
        model: a model with a token stem; it is put into eval mode for the call.
        prompt: ids (b, t) or (t,), t >= 1.
        max_new_tokens: how many tokens to add at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probability reaches p (Holtzman et al. 2020,
            arXiv:1904.09751).
        min_p: sample among tokens at least p times as likely as the most likely one (Nguyen et al.
            2024, arXiv:2407.01082).
        repetition_penalty: positive logits of tokens seen before, in the prompt too, are divided by
            it, negative ones multiplied (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing.
        n_beams: above 1, look for the likeliest continuation; see `search_beams`. It takes
            temperature 0.
        length_penalty: beams are compared by log likelihood / length ** length_penalty.
        eos: a row that has produced this id is finished and filled up with it.
        stop: a row whose continuation contains one of these strings is finished and filled up with
            eos, or with 0 if there is none. Needs `decode`.
        decode: a tokenizer's ids -> text.
        on_token: called with each new (b,) ids as soon as they are chosen.
        step: what decodes in place of `model.step`, such as `torch.compile(model.step)`.
        seed: of the sampling, drawn on the CPU: the same on every device up to rounding of logits.
        mask: (b, t), False for left padding of prompts of unequal length.

    Returns:
        (b, t + n) prompt and continuation, n <= max_new_tokens; (t + n,) for a prompt (t,).

    Raises:
        ShapeError: an argument is out of range, or two of them exclude each other.
    """
    beams_ask_for = temperature == 0 and not stop and on_token is None
    for name, ok, rule in (
        ("max_new_tokens", max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature >= 0, "at least 0"),
        ("top_k", top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p is None or 0 < top_p <= 1, "in (0, 1]"),
        ("min_p", min_p is None or 0 <= min_p <= 1, "in [0, 1]"),
        ("repetition_penalty", repetition_penalty > 0, "above 0"),
        ("n_beams", n_beams >= 1, "at least 1"),
        ("n_beams", n_beams == 1 or beams_ask_for, "1 unless temperature is 0, without callbacks"),
        ("decode", not stop or decode is not None, "given, to find stop strings in the text"),
    ):
        if not ok:
            raise ShapeError(f"generate: {name} must be {rule}")
    rows = prompt[None] if prompt.ndim == 1 else prompt
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        return pick(logits, temperature, top_k, top_p, min_p, generator)

    def finished(tokens: list[Tensor]) -> Tensor:
        ended = tokens[-1].cpu() == (-1 if eos is None else eos)
        if decode is not None and stop:
            texts = [decode(row) for row in torch.stack(tokens, 1).tolist()]
            ended |= torch.tensor([any(s in text for s in stop) for text in texts])
        return ended

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            out = model(rows, mask=mask)
            begun = Begun(step or model.step, out.logits[:, -1], out.state)
            seen = Seen(rows, mask, out.logits.shape[-1], repetition_penalty)
            if n_beams > 1:
                new = search_beams(begun, seen, max_new_tokens, n_beams, length_penalty, eos)
            else:
                new = _sample(begun, seen, max_new_tokens, draw, finished, eos or 0, on_token)
    finally:
        model.train(training)
    full = torch.cat([rows, new.to(rows)], dim=1)
    return full[0] if prompt.ndim == 1 else full


def _sample(
    begun: Begun,
    seen: Seen,
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    finished: Callable[[list[Tensor]], Tensor],
    fill: int,
    on_token: Callable[[Tensor], object] | None,
) -> Tensor:
    """Draw tokens until all rows have finished. Returns (b, n) ids."""
    step, logits, state = begun
    tokens: list[Tensor] = []
    done = torch.zeros(len(logits), dtype=torch.bool)
    while True:
        chosen = draw(seen.penalize(logits.float().cpu())).masked_fill(done, fill)
        tokens.append(chosen.to(logits.device))
        if on_token is not None:
            on_token(tokens[-1])
        done = done | finished(tokens)
        if len(tokens) == max_new_tokens or done.all():
            return torch.stack(tokens, dim=1)
        seen.add(chosen)
        logits, state, _ = step(tokens[-1], state)


class Begun(NamedTuple):
    """A model that has read the prompts: its step, logits (b, v) of the next token, its state."""

    step: Callable[[Tensor, ModelState], ModelOutput]
    logits: Tensor
    state: ModelState


class Seen:
    """The tokens that each row holds so far, and the penalty on saying them again."""

    def __init__(self, rows: Tensor, mask: Tensor | None, n_tokens: int, penalty: float) -> None:
        self.penalty = penalty
        self.rows = torch.zeros(len(rows), n_tokens, dtype=torch.bool)
        if penalty != 1:
            real = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.bool()
            for row, ids, kept in zip(self.rows, rows.cpu(), real.cpu(), strict=True):
                row[ids[kept]] = True

    def add(self, ids: Tensor) -> None:
        self.rows.scatter_(1, ids[:, None].long(), True)

    def gather(self, order: Tensor) -> None:
        self.rows = self.rows[order]

    def penalize(self, logits: Tensor) -> Tensor:
        if self.penalty == 1:
            return logits
        less = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(self.rows, less, logits)


def pick(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Draw one id per row of logits (b, v) on the CPU. Returns (b,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    p = sampled_from(logits, temperature, top_k, top_p, min_p)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def sampled_from(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The (b, v) probabilities that `pick` draws from; each filter works on what the one before
    it left, in the order of the arguments."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    if min_p is not None:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits.softmax(-1)
