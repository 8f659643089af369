"""Who goes to which expert: scores, choices, weights and balance losses, as pure functions.

Symbols: b batch, t time, e experts (N or E in the papers), k choices per token.
    logits  h(x) = x W_g                scores  s, positive: softmax(h) or sigmoid(h)
    probs   scores divided by their sum over e: P_i is their mean over tokens
    load    f_i, the share of all choices that fell on expert i
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Normalize = Literal["topk", "all", "none"]
TINY = 1e-20


class Assignments(NamedTuple):
    """A list of m jobs: expert[j] works on token[j], and weight[j] of its result counts.

    token   (m,) int64, a row of the flattened input (b t, d).
    expert  (m,) int64; nobody works where it is outside 0 .. e-1: dropped, padding, a null expert.
    weight  (m,) in at least float32.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor


def choose(
    scores: Tensor, k: int, normalize: Normalize, ranking: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Let every token choose its k best experts.

        w_i = s_i / sum over the chosen    normalize="topk": sums to 1 (Mixtral, Shazeer)
        w_i = s_i / sum over all           normalize="all":  keeps a gradient at k = 1 (Switch)
        w_i = s_i                          normalize="none": sigmoid scores as they are (Llama 4)

    Args:
        scores: (..., e), positive.
        k: how many, at most e.
        normalize: what the weights are divided by.
        ranking: (..., e) what decides the choice; None means the scores.

    Returns:
        (..., k) int64 ids, best first, and (..., k) weights.
    """
    ids = (scores if ranking is None else ranking).topk(k, dim=-1).indices
    chosen = scores.gather(-1, ids)
    if normalize == "none":
        return ids, chosen
    whole = chosen if normalize == "topk" else scores
    return ids, chosen / (whole.sum(-1, keepdim=True) + TINY)


def assign(ids: Tensor, weights: Tensor, real: Tensor | None) -> Assignments:
    """Turn choices (b, t, k) into jobs; tokens where `real` (b, t) is False get nobody."""
    if real is not None:
        ids = ids.masked_fill(~real[..., None], -1)
    n_tokens, k = ids.shape[0] * ids.shape[1], ids.shape[2]
    token = torch.arange(n_tokens, device=ids.device)[:, None].expand(-1, k).flatten()
    return Assignments(token, ids.flatten(), weights.flatten())


def keep_best_groups(ranking: Tensor, n_groups: int, top_groups: int, best: int) -> Tensor:
    """Rule out all experts but those of the best groups: ranking becomes -inf there.

    Args:
        ranking: (..., e); experts i and j share a group if i // (e / n_groups) == j // (e / ...).
        n_groups: divides e.
        top_groups: how many groups each token may draw from.
        best: a group's worth is the sum of its `best` highest members: 1 in DeepSeek-V2, 2 in V3.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.2.2; V3, arXiv:2412.19437, section 2.1.2.
    """
    groups = ranking.unflatten(-1, (n_groups, -1))
    worth = groups.topk(min(best, groups.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.zeros_like(worth, dtype=torch.bool)
    kept = kept.scatter(-1, worth.topk(top_groups, dim=-1).indices, True)
    return groups.masked_fill(~kept[..., None], -math.inf).flatten(-2)


def smooth_load(clean: Tensor, noisy: Tensor, std: Tensor, k: int) -> Tensor:
    """Probability that each expert would be chosen if only its own noise were drawn again.

        P(x, i) = Phi((h_i - kth_excluding(noisy, k, i)) / std_i)

    Args:
        clean, noisy, std: (..., e) logits without and with noise, and the noise's deviation.
        k: choices per token.

    Returns:
        (..., e), differentiable. Its sum over tokens is the load estimator.

    Source: Shazeer et al. 2017, arXiv:1701.06538, appendix A.
    """
    if k == clean.shape[-1]:
        return torch.ones_like(clean)
    top = noisy.topk(k + 1, dim=-1).values
    inside, outside = top[..., k - 1 : k], top[..., k:]  # k-th and (k+1)-th highest
    bar = torch.where(noisy >= inside, outside, inside)
    return torch.special.ndtr((clean - bar) / std)


@torch.no_grad()
def sinkhorn(logits: Tensor, n_iterations: int, real: Tensor | None = None) -> Tensor:
    """The log of a plan that gives every token one unit and every expert the same total.

        log plan = logits + u_token + v_expert,  u and v alternately scaled to the marginals

    Args:
        logits: (n, e).
        n_iterations: rounds; 8 leaves the totals within a few per cent of each other.
        real: (n,) bool; tokens where it is False do not count in the totals. None means all do.

    Source: Clark et al. 2022, arXiv:2202.01169, appendix B.2.1.
    """
    plan = logits
    for _ in range(n_iterations):
        counted = plan if real is None else plan.masked_fill(~real[:, None], -math.inf)
        plan = plan - counted.logsumexp(0, keepdim=True)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan


def expert_choice(
    probs: Tensor, per_token: float, starts: Tensor | None, real: Tensor | None
) -> Assignments:
    """Let every expert choose its best tokens, ceil(per_token * length / e) of each document.

    Args:
        probs: (b, t, e).
        per_token: how many experts a token gets on average.
        starts: (b, t) bool, where documents begin; None means that every row is one.
        real: (b, t) bool, False for padding, which nobody may choose; None means all real.

    Source: Zhou et al. 2022, arXiv:2202.09368, section 3.2.
    Differs: the choice is within a document, not within a batch, so that they stay independent.
    """
    batch, length, n_experts = probs.shape
    index = torch.arange(length, device=probs.device)
    time = probs.detach().argsort(dim=1, descending=True, stable=True)  # (b, t, e), best first
    expert = torch.arange(n_experts, device=probs.device).expand_as(time)
    if starts is None:
        seats = math.ceil(length * per_token / n_experts)
        time, expert = time[:, :seats], expert[:, :seats]
    else:
        document = starts.cumsum(1)
        order = document[..., None].expand_as(time).gather(1, time).argsort(dim=1, stable=True)
        time = time.gather(1, order)  # a document takes the places that it has in time
        first = torch.where(starts, index, 0).cummax(1).values
        counted = torch.ones_like(starts) if real is None else real
        size = torch.zeros(batch, length + 1, dtype=torch.int64, device=probs.device)
        size = size.scatter_add(1, document, counted.long()).gather(1, document)
        free = (index - first) < (size * per_token / n_experts).ceil()
        expert = expert.masked_fill(~free[..., None], -1)
    row = torch.arange(batch, device=probs.device)[:, None, None]
    token = row * length + time
    return Assignments(token.flatten(), expert.flatten(), probs.gather(1, time).flatten())


def drop_over_capacity(
    to: Assignments, shape: tuple[int, int], n_experts: int, factor: float, starts: Tensor | None
) -> Assignments:
    """Leave every expert at most ceil(factor * k * real tokens / e) jobs of each document.

    Args:
        to: jobs in the order of their tokens; earlier tokens are served first.
        shape: (b, t).
        n_experts: e.
        factor: capacity factor; 1 is just enough at perfect balance.
        starts: (b, t) bool, where documents begin; None means that every row is one.

    Source: Fedus et al. 2021, arXiv:2101.03961, section 2.2.
    Differs: capacity is counted within a document, so that they stay independent.
    """
    (batch, length), busy = shape, to.expert >= 0
    document, most = to.token // length, batch
    if starts is not None:
        row = torch.arange(batch, device=starts.device)[:, None]
        document = (starts.cumsum(1) + row * (length + 1)).flatten()[to.token]
        most = batch * (length + 1)
    jobs = torch.zeros(most, dtype=torch.int64, device=document.device)
    jobs = jobs.index_add(0, document, busy.long())  # k per real token
    key = torch.where(busy, document * n_experts + to.expert, most * n_experts)
    order = key.argsort(stable=True)
    first = torch.searchsorted(key[order], key)  # where the job's queue begins
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=key.device))
    capacity = (factor * jobs / n_experts).ceil()
    kept = (place - first) < capacity[document]
    return to._replace(expert=torch.where(kept, to.expert, -1))


def count_jobs(to: Assignments, length: int, batch: int, n_experts: int) -> Tensor:
    """(b, e) int64: how many jobs of each row fell on each expert."""
    busy = (to.expert >= 0) & (to.expert < n_experts)
    key = torch.where(busy, to.token // length * n_experts + to.expert, 0)
    counts = torch.zeros(batch * n_experts, dtype=torch.int64, device=key.device)
    return counts.index_add(0, key, busy.long()).view(batch, n_experts)


def cv_squared(amounts: Tensor) -> Tensor:
    """Squared coefficient of variation, var / mean^2, over the last dimension.

    The square keeps the gradient finite (zero) at perfect balance, where that of std / mean is NaN.

    Source: Shazeer et al. 2017, arXiv:1701.06538, section 4 (importance and load losses).
    """
    return amounts.var(-1, unbiased=False) / (amounts.mean(-1).square() + TINY)


def switch_loss(load: Tensor, mean_probs: Tensor) -> Tensor:
    """e * sum_i f_i P_i: 1 at balance, e at total collapse; the gradient flows through P.

    Args:
        load: (..., e) f, sums to 1.
        mean_probs: (..., e) P, sums to 1.

    Returns:
        (...): the loss of a batch, or one per sequence where both are per sequence.

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4-6, with all k choices in f.
    """
    return load.shape[-1] * (load * mean_probs).sum(-1)


def z_loss(logits: Tensor) -> Tensor:
    """log(sum_i exp h_i)^2 per token: keeps router logits small. (..., e) to (...).

    Source: Zoph et al. 2022, arXiv:2202.08906, equation 5.
    """
    return logits.logsumexp(-1).square()


def mean_over(values: Tensor, real: Tensor | None, dims: tuple[int, ...] = (0, 1)) -> Tensor:
    """Mean of (b, t, ...) over real tokens; zero where there are none."""
    if real is None:
        return values.mean(dims)
    mask = real.view(*real.shape, *[1] * (values.ndim - 2)).to(values.dtype)
    return (values * mask).sum(dims) / mask.sum(dims).clamp(min=1)


def entropy(shares: Tensor) -> Tensor:
    """-sum p log p in nats over the last dimension, with 0 log 0 = 0."""
    return -torch.special.xlogy(shares, shares).sum(-1)
