"""Beam search over any model whose states can be gathered: recurrent, attention or hybrid.

Symbols: b prompts, n beams of each, v vocabulary; rows of a prompt's beams lie next to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kizzasi.errors import GenerateError
from kizzasi.models.decoding.transcript import Decoded, Run, unsound


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


def search_beams(run: Run, n_beams: int, length_penalty: float) -> Decoded:
    """Keep the n likeliest hypotheses of each prompt and return the best one.

        score = log p(continuation | prompt) / length ** length_penalty,  eos counted in length

    p is that of `run.sampling.logits`. A hypothesis ends with an eos or at max_new_tokens. A prompt
    is finished as soon as no live hypothesis can enter its n best. With
    n_beams >= v ** (max_new_tokens - 1) the search is exact.

    Returns:
        ids (b, m), m the length of the longest; shorter ones are filled up.

    Raises:
        GenerateError: logits are NaN or infinite.
    """
    logits, state, seen = run.logits, run.state, run.seen
    b, v = logits.shape
    device, stopping = logits.device, run.stopping
    finished = [Finished(n_beams, length_penalty) for _ in range(b)]
    total = torch.zeros(b, 1)  # log likelihood of every live hypothesis
    ids: list[list[int]] = [[] for _ in range(b)]
    for length in range(1, run.max_new_tokens + 1):
        made = run.sampling.logits(logits, seen)
        each = made.log_softmax(-1).masked_fill(
            (made == -torch.inf).all(-1, keepdim=True), -torch.inf
        )
        n_live = total.shape[1]
        joint = (total.to(each)[:, :, None] + each.view(b, n_live, v)).flatten(1)
        best = [part.cpu() for part in joint.topk(min(2 * n_beams, joint.shape[1]), dim=1)]
        last = length == run.max_new_tokens
        ends = None if last else stopping.eos
        rows, chosen, total = _advance(best, v, n_live, n_beams, ids, finished, ends)
        left = range(length + 1, run.max_new_tokens + 1)
        if last or all(f.beats(float(t.max()), left) for f, t in zip(finished, total, strict=True)):
            break
        ids = [
            [*ids[row], token] for row, token in zip(rows.tolist(), chosen.tolist(), strict=True)
        ]
        rows, chosen = rows.to(device), chosen.to(device)
        seen = seen.gather(rows).add(chosen)
        logits, state, *_ = run.step(chosen, state.gather(rows))
    for prompt, hypotheses in enumerate(finished):
        if not hypotheses.best:
            raise GenerateError(f"row {prompt}: `process` forbids every token of every beam")
    answers = [f.best[0][1] for f in finished]
    lengths = [len(answer) for answer in answers]
    padded = [a + [stopping.fill] * (max(lengths) - len(a)) for a in answers]
    return Decoded(torch.tensor(padded, device=device), lengths)


def _advance(
    best: list[Tensor],
    v: int,
    n_live: int,
    n_beams: int,
    ids: list[list[int]],
    finished: list[Finished],
    ends: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the candidates, (b, m) likelihoods and numbers, into ended and live ones.

    Args:
        ends: tokens that end a hypothesis; None if every one does.

    Returns:
        (b n,) the row that each live hypothesis continues, (b n,) its new token, (b, n) its log
        likelihood. A prompt short of candidates repeats its last one at likelihood 0.
    """
    rows, tokens, totals = [], [], []
    for prompt, (values, numbers) in enumerate(zip(*best, strict=True)):
        if values.isnan().any():
            raise unsound(prompt)
        live: list[tuple[int, int, float]] = []
        for rank, (value, number) in enumerate(zip(values.tolist(), numbers.tolist(), strict=True)):
            row, token = prompt * n_live + number // v, number % v
            if ends is None or token in ends:
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
