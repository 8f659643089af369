"""The routers: which experts work on a token, and how much each counts.

A spec names one by its kind: {"kind": "top_k", "score": "sigmoid"}. Symbols: see `parts.router`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.cost import Cost, dense
from kizzasi.models.norm import full_precision
from kizzasi.models.ops import routing as ops
from kizzasi.models.parts.router import Choice, Mask, Router, RouterSpec, Routing, add_bias, linear
from kizzasi.strict import added, join, register, require


@register
@dataclass(frozen=True)
class TopK(RouterSpec):
    """The k highest scores. Covers Mixtral, Switch (top_k 1, "all"), DeepSeek-V2/V3 and Llama 4.

    Args:
        score: s = softmax(h) over all experts, or sigmoid(h) of each.
        scale: factor on the weights.
        bias_rate: above 0, balance without a loss: the choice is by s + b, and after every
            optimiser step b moves by bias_rate towards the experts with too few tokens.
        n_groups, top_groups: choose within the best top_groups of n_groups groups of experts.
        group_best: how many members make a group's worth: 1 in DeepSeek-V2, 2 in V3.
        logit_bias: add a learned number for every expert to the logits (gpt-oss).

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; Wang et al. 2024, arXiv:2408.15664.
    Differs: b's steps have zero mean, so that b does not drift.
    """

    kind: ClassVar[str] = "top_k"
    score: Literal["softmax", "sigmoid"] = "softmax"
    scale: float = 1.0
    bias_rate: float = 0.0
    n_groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    logit_bias: bool = added(False)

    def check(self, choice: Choice, path: str) -> None:
        super().check(choice, path)
        e, k, groups, top = choice.n_experts, choice.top_k, self.n_groups, self.top_groups
        self.require_positive(join(path, "router"), "scale", "n_groups", "top_groups", "group_best")
        rule = f"{self.bias_rate} is negative"
        require(self.bias_rate >= 0, join(path, "router.bias_rate"), rule)
        rule = f"{groups} does not divide the {e} choices; pick a divisor"
        require(e % groups == 0, join(path, "router.n_groups"), rule)
        rule = f"{top} of {groups} groups hold fewer than top_k = {k} experts; raise top_groups"
        require(top <= groups and top * (e // groups) >= k, join(path, "router.top_groups"), rule)

    def furnish(self, router: Router, choice: Choice) -> None:
        super().furnish(router, choice)
        if self.bias_rate:
            add_bias(router, choice.n_experts)
        if self.logit_bias:
            router.logit_bias = nn.Parameter(torch.empty(choice.n_experts))

    def cost(self, choice: Choice, n_tokens: int) -> Cost:
        return super().cost(choice, n_tokens) + dense(self.logit_bias * choice.n_experts)

    def route(self, router: Router, x: Tensor, real: Mask, starts: Mask) -> Routing:
        logits, softmax = router.logits(x), self.score == "softmax"
        scores = logits.softmax(-1) if softmax else logits.sigmoid()
        ranking = router.rank(scores if router.bias is None else scores + router.bias)
        if self.top_groups < self.n_groups:
            ranking = ops.keep_best_groups(ranking, self.n_groups, self.top_groups, self.group_best)
        to = router.assign(scores, ranking, real, self.scale)
        if router.training and router.tally is not None:
            router.tally.add(ops.count_jobs(to, to.token.numel(), 1, scores.shape[-1])[0])
        return Routing(to, scores if softmax else scores / scores.sum(-1, keepdim=True), logits)

    def move(self, bias: Tensor, counted: Tensor) -> None:
        direction = torch.sign(counted.mean() - counted)
        bias.add_((direction - direction.mean()).to(bias.dtype), alpha=self.bias_rate)


@register
@dataclass(frozen=True)
class Softmax(RouterSpec):
    """Every expert works on every token, weighted by softmax(h). top_k must be all of them."""

    kind: ClassVar[str] = "softmax"

    def check(self, choice: Choice, path: str) -> None:
        e, k = choice.n_experts, choice.top_k
        rule = f"the softmax router uses all {e} experts, top_k says {k}; set top_k to {e}"
        require(k == e, join(path, "top_k"), rule)

    def route(self, router: Router, x: Tensor, real: Mask, starts: Mask) -> Routing:
        logits = router.logits(x)
        probs = logits.softmax(-1)
        ids = torch.arange(router.choice.n_experts, device=x.device).expand(probs.shape)
        return Routing(ops.assign(ids, probs, real), probs, logits)


@register
@dataclass(frozen=True)
class NoisyTopK(RouterSpec):
    """Top-k of h + N(0, 1) softplus(W_noise x) noise_std: trainable noise, in training only.

    W_noise starts at zero: noise of deviation softplus(0) everywhere.

    Args:
        noise_std: factor on the deviation.

    Source: Shazeer et al. 2017, arXiv:1701.06538, section 2.1.
    """

    kind: ClassVar[str] = "noisy_top_k"
    noise_std: float = 1.0

    def check(self, choice: Choice, path: str) -> None:
        super().check(choice, path)
        self.require_positive(join(path, "router"), "noise_std")

    def furnish(self, router: Router, choice: Choice) -> None:
        super().furnish(router, choice)
        router.noise_weight = nn.Parameter(torch.empty(choice.n_experts, choice.d_model))

    def reset(self, router: Router, generator: torch.Generator | None) -> None:
        super().reset(router, generator)
        nn.init.zeros_(router.noise_weight)

    def route(self, router: Router, x: Tensor, real: Mask, starts: Mask) -> Routing:
        clean = noisy = router.logits(x)
        load = None
        if router.training:
            std = self.noise_std * (F.softplus(linear(x, router.noise_weight)) + 1e-2)  # above 0
            noisy = clean + torch.randn_like(clean) * std
            load = ops.smooth_load(clean, noisy, std, router.choice.top_k)
        probs = noisy.softmax(-1)
        return Routing(router.assign(probs, router.rank(probs), real), probs, clean, load)

    def n_outputs(self, choice: Choice) -> int:
        return 2 * choice.n_experts


@register
@dataclass(frozen=True)
class Sinkhorn(RouterSpec):
    """In training the choice follows a balanced plan of the batch; else the mean of past plans.

        plan = sinkhorn(h / temperature),   so that   temperature log plan = h + v_expert + u_token

    A token's u moves all its experts alike, so the plan's choice is that of the largest h + v. In
    evaluation, where there may be no batch to balance, it is that of h + b, with b the running
    mean of v.

    The plan gives every expert the same total, but the choice takes each token's largest part. At
    temperature 1 that leaves the choice unbalanced, however many the rounds; the colder the plan,
    the nearer it is to its choice, and the more rounds it needs.

    Args:
        n_iterations: rounds of balancing.
        temperature: divides the logits before.
        bias_rate: of the running mean, per optimiser step; the first mean is taken whole.

    Source: Clark et al. 2022, arXiv:2202.01169, appendix B.2.1.
    Differs: Megatron-LM has no temperature, and its evaluation chooses by h alone, which is neither
        balanced nor the choice that the experts were trained with.
    """

    kind: ClassVar[str] = "sinkhorn"
    n_iterations: int = 8
    temperature: float = 0.3
    bias_rate: float = 0.05

    def check(self, choice: Choice, path: str) -> None:
        super().check(choice, path)
        self.require_positive(join(path, "router"), "n_iterations", "temperature")
        rule = f"{self.bias_rate} is outside (0, 1]; 0.05 averages about 20 steps"
        require(0 < self.bias_rate <= 1, join(path, "router.bias_rate"), rule)

    def furnish(self, router: Router, choice: Choice) -> None:
        super().furnish(router, choice)
        add_bias(router, choice.n_experts + 1)  # the v of plans, and how many there were

    def route(self, router: Router, x: Tensor, real: Mask, starts: Mask) -> Routing:
        logits, shift = router.logits(x), router.bias
        assert shift is not None
        if router.training and router.tally is not None:
            shift = self._plan(logits.detach(), real)
            router.tally.add(torch.cat([shift, torch.ones_like(shift[:1])]))
        probs = logits.softmax(-1)
        return Routing(router.assign(probs, router.rank(logits + shift), real), probs, logits)

    def move(self, bias: Tensor, counted: Tensor) -> None:
        n_plans = counted[-1]
        rate = torch.where(bias.any(), self.bias_rate, 1.0) * (n_plans > 0)
        mean = counted[:-1] / n_plans.clamp(min=1)
        bias.lerp_(mean.to(bias.dtype), rate.to(bias.dtype))

    def _plan(self, logits: Tensor, real: Tensor | None) -> Tensor:
        """(e,): v, with mean zero, of the plan over the real tokens."""
        cold = logits.flatten(0, 1) / self.temperature
        counted = None if real is None else real.flatten()
        moved = ops.sinkhorn(cold, self.n_iterations, counted) - cold
        v = ops.mean_over(moved[None], None if counted is None else counted[None])
        return self.temperature * (v - v.mean())  # the same for every token, but for u, rounding


@register
@dataclass(frozen=True)
class ExpertChoice(RouterSpec):
    """Every expert takes its ceil(top_k t / e) best of a document of t tokens: balanced by design.

    A token's fate depends on later tokens: not causal, not for streaming or language modelling.
    With top_k 1 there are as many seats as tokens, so where two experts want the same one, some get
    no expert, and their output is zero. top_k 2, as in the paper, leaves room.

    Source: Zhou et al. 2022, arXiv:2202.09368.
    """

    kind: ClassVar[str] = "expert_choice"
    causal: ClassVar[bool] = False

    def check(self, choice: Choice, path: str) -> None:
        rule = 'expert choice weighs by the softmax over all experts; set it to "all"'
        require(choice.normalize == "all", join(path, "normalize"), rule)

    def route(self, router: Router, x: Tensor, real: Mask, starts: Mask) -> Routing:
        logits = router.logits(x)
        probs = logits.softmax(-1)
        return Routing(ops.expert_choice(probs, router.choice.top_k, starts, real), probs, logits)

    def n_jobs(self, choice: Choice, seq_len: int) -> int:
        return choice.n_experts * -(-seq_len * choice.top_k // choice.n_experts)


@register
@dataclass(frozen=True)
class Hash(RouterSpec):
    """A fixed hash of the token: nothing to learn, and every weight is 1/k.

    A hash spreads codes evenly over the experts, but not tokens, many of which share a few codes.
    `balance_hashes` deals the codes out by their frequencies, before training. It is a baseline for
    routers that learn: no expert gets what it is good at.

    Args:
        n_bits: length of the code that is hashed. Few bits keep similar tokens together, many can
            be dealt out more evenly.

    Source: Roller et al. 2021, arXiv:2106.04426; balanced hash: section 3.1.
    Differs: a layer sees vectors, not token ids, so the code is the signs of n_bits fixed random
        projections; equal vectors, and mostly similar ones, meet the same experts.
    """

    kind: ClassVar[str] = "hash"
    n_bits: int = 12

    def check(self, choice: Choice, path: str) -> None:
        rule = f"{self.n_bits} is outside 1 .. 16"
        require(1 <= self.n_bits <= 16, join(path, "router.n_bits"), rule)

    def furnish(self, router: Router, choice: Choice) -> None:
        planes = torch.empty(choice.d_model, self.n_bits)
        router.planes = nn.Parameter(planes, requires_grad=False)
        router.register_buffer("table", torch.empty(2**self.n_bits, dtype=torch.int64))

    def reset(self, router: Router, generator: torch.Generator | None) -> None:
        init.normal_(router.planes, 1.0, generator)
        codes = torch.arange(len(router.table), device=router.table.device)
        spread = codes * 2654435761 % 2**32 >> 8  # Knuth's multiplicative hash
        router.table.copy_(spread % router.choice.n_experts)

    def route(self, router: Router, x: Tensor, real: Mask, starts: Mask) -> Routing:
        k, each = router.choice.top_k, torch.arange(router.choice.n_experts, device=x.device)
        first = router.table[self._codes(router, x)]
        ids = (first[..., None] + torch.arange(k, device=x.device)) % len(each)
        weights = torch.full_like(ids, 1 / k, dtype=full_precision(router.planes).dtype)
        probs = (ids[..., None] == each).to(weights.dtype).mean(-2)
        return Routing(ops.assign(ids, weights, real), probs)

    @torch.no_grad()
    def balance(self, router: Router, x: Tensor, real: Tensor | None = None) -> None:
        """Deal the codes out anew, by their frequencies in (b, t, d); arguments as in `route`.

        The most frequent code goes to the expert that has the fewest tokens so far, then the next;
        codes that did not occur stay where they are.
        """
        codes = self._codes(router, x)
        amounts = torch.bincount(codes.flatten() if real is None else codes[real]).tolist()
        load = [(0, expert) for expert in range(router.choice.n_experts)]
        for code in sorted((c for c, n in enumerate(amounts) if n), key=lambda c: -amounts[c]):
            tokens, expert = load[0]
            router.table[code] = expert
            heapq.heapreplace(load, (tokens + amounts[code], expert))

    def _codes(self, router: Router, x: Tensor) -> Tensor:
        """(b, t): the signs of the projections, read as a binary number."""
        signs = linear(x.detach(), router.planes.T) > 0
        return (signs * 2 ** torch.arange(self.n_bits, device=x.device)).sum(-1)

    def n_outputs(self, choice: Choice) -> int:
        return self.n_bits
