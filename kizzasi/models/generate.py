"""Autoregressive sampling: one prefill with the parallel form, then one step per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kizzasi.errors import ShapeError

if TYPE_CHECKING:
    from kizzasi.models.model import SequenceModel


def generate(
    model: SequenceModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
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
        top_p: sample among the fewest tokens whose probability reaches p (Holtzman et al. 2020).
        eos: a row that has produced this id is finished and filled up with it.
        seed: of the sampling, drawn on the CPU: the same on every device up to rounding of logits.
        mask: (b, t), False for left padding of prompts of unequal length.

    Returns:
        (b, t + n) prompt and continuation, n <= max_new_tokens; (t + n,) for a prompt (t,).

    Raises:
        ShapeError: an argument is out of range.
    """
    for name, ok, rule in (
        ("max_new_tokens", max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature >= 0, "at least 0"),
        ("top_k", top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p is None or 0 < top_p <= 1, "in (0, 1]"),
    ):
        if not ok:
            raise ShapeError(f"generate: {name} must be {rule}")
    rows = prompt[None] if prompt.ndim == 1 else prompt
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            out = model(rows, mask=mask)
            logits, state = out.logits[:, -1], out.state
            tokens, done = [], torch.zeros(len(rows), dtype=torch.bool)
            for i in range(max_new_tokens):
                chosen = pick(logits, temperature, top_k, top_p, generator)
                if eos is not None:
                    chosen = chosen.masked_fill(done, eos)
                    done = done | (chosen == eos)
                tokens.append(chosen.to(rows))
                if i == max_new_tokens - 1 or (eos is not None and done.all()):
                    break
                logits, state, _ = model.step(tokens[-1], state)
    finally:
        model.train(training)
    full = torch.cat([rows, torch.stack(tokens, dim=1)], dim=1)
    return full[0] if prompt.ndim == 1 else full


def pick(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Draw one id per row of logits (b, v). Returns (b,) int64 on the CPU."""
    logits = logits.float().cpu()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
