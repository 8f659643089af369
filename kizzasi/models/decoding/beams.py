"""Beam search over any model whose states can be gathered: recurrent, attention or hybrid.

Symbols: b prompts, n beams of each, v vocabulary; rows of a prompt's beams lie next to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kizzasi.models.decoding.generate import Begun, Seen


class Finished:
    """The n best hypotheses of one prompt that have ended, best first."""

    def __init__(self, n: int, length_penalty: float) -> None:
        self.n, self.length_penalty = n, length_penalty
        self.best: list[tuple[float, list[int]]] = []

    def score(self, log_likelihood: float, length: int) -> float:
        return log_likelihood / length**self.length_penalty

    def add(self, log_likelihood: float, ids: list[int]) -> None:
        self.best.append((self.score(log_likelihood, len(ids)), ids))
        self.best.sort(key=lambda pair: -pair[0])
        del self.best[self.n :]

    def beats(self, log_likelihood: float, lengths: range) -> bool:
        """No live hypothesis of this likelihood can enter at any of the lengths still open."""
        if len(self.best) < self.n:
            return False
        hope = max(self.score(log_likelihood, n) for n in (lengths[0], lengths[-1]))
        return self.best[-1][0] >= hope


def search_beams(
    begun: Begun,
    seen: Seen,
    max_new_tokens: int,
    n_beams: int,
    length_penalty: float,
    eos: int | None,
) -> Tensor:
    """Keep the n likeliest hypotheses of each prompt and return the best one.

        score = log p(continuation | prompt) / length ** length_penalty,  eos counted in length

    A hypothesis ends with eos or at max_new_tokens. A prompt is finished as soon as no live
    hypothesis can enter its n best. With n_beams >= v ** (max_new_tokens - 1) the search is exact.

    Args:
        begun: the model, in eval mode, after the prompts.
        seen: tokens of the prompts, for the repetition penalty.
        max_new_tokens, n_beams, length_penalty, eos: as for `generate`.

    Returns:
        (b, m) int64 on the CPU, m the length of the longest; shorter ones are filled with eos.
    """
    step, logits, state = begun
    b, v = logits.shape
    finished = [Finished(n_beams, length_penalty) for _ in range(b)]
    total = torch.zeros(b, 1)  # log likelihood of every live hypothesis
    ids: list[list[int]] = [[] for _ in range(b)]
    for length in range(1, max_new_tokens + 1):
        each = seen.penalize(logits.float().cpu()).log_softmax(-1)
        n_live = total.shape[1]
        joint = (total[:, :, None] + each.view(b, n_live, v)).flatten(1)
        best = joint.topk(min(2 * n_beams, joint.shape[1]), dim=1)
        last = length == max_new_tokens
        rows, chosen, total = _advance(best, v, n_live, n_beams, ids, finished, eos, last)
        left = range(length + 1, max_new_tokens + 1)
        if last or all(f.beats(float(t.max()), left) for f, t in zip(finished, total, strict=True)):
            break
        ids = [
            [*ids[row], token] for row, token in zip(rows.tolist(), chosen.tolist(), strict=True)
        ]
        seen.gather(rows)
        seen.add(chosen)
        logits, state, _ = step(chosen.to(logits.device), state.gather(rows.to(logits.device)))
    answers = [f.best[0][1] for f in finished]
    longest = max(len(answer) for answer in answers)
    fill = 0 if eos is None else eos
    return torch.tensor([a + [fill] * (longest - len(a)) for a in answers])


def _advance(
    best: torch.return_types.topk,
    v: int,
    n_live: int,
    n_beams: int,
    ids: list[list[int]],
    finished: list[Finished],
    eos: int | None,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the candidates into ended and live ones.

    Returns:
        (b n,) the row that each live hypothesis continues, (b n,) its new token, (b, n) its log
        likelihood. A prompt short of candidates repeats its last one at likelihood 0.
    """
    rows, tokens, totals = [], [], []
    for prompt, (values, numbers) in enumerate(zip(best.values, best.indices, strict=True)):
        live: list[tuple[int, int, float]] = []
        for rank, (value, number) in enumerate(zip(values.tolist(), numbers.tolist(), strict=True)):
            row, token = prompt * n_live + number // v, number % v
            if last or token == eos:
                if rank < n_beams and value > float("-inf"):
                    finished[prompt].add(value, [*ids[row], token])
            elif len(live) < n_beams:
                live.append((row, token, value))
        if not live:
            live = [(prompt * n_live, 0, float("-inf"))]
        live += [(*live[-1][:2], float("-inf"))] * (n_beams - len(live))
        rows += [row for row, _, _ in live]
        tokens += [token for _, token, _ in live]
        totals.append([value for _, _, value in live])
    return torch.tensor(rows), torch.tensor(tokens), torch.tensor(totals)
