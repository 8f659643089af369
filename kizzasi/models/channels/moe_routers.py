"""The routers. A spec names one by its kind: {"kind": "top_k", "score": "sigmoid"}.

Symbols as in moe_router.py and ops/routing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.channels.moe_router import (
    Choice,
    LinearRouter,
    Router,
    RouterSpec,
    Routing,
    Tally,
    linear_logits,
)
from kizzasi.models.norm import full_precision
from kizzasi.models.ops import routing as ops
from kizzasi.models.strict import join, register, require


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

    def check(self, choice: Choice, path: str) -> None:
        super().check(choice, path)
        e, k, groups, top = choice.n_experts, choice.top_k, self.n_groups, self.top_groups
        self.require_positive(join(path, "router"), "scale", "n_groups", "top_groups", "group_best")
        require(
            self.bias_rate >= 0, join(path, "router.bias_rate"), f"{self.bias_rate} is negative"
        )
        rule = f"{groups} does not divide the {e} choices; pick a divisor"
        require(e % groups == 0, join(path, "router.n_groups"), rule)
        rule = f"{top} of {groups} groups hold fewer than top_k = {k} experts; raise top_groups"
        require(top <= groups and top * (e // groups) >= k, join(path, "router.top_groups"), rule)

    def build(self, choice: Choice) -> Router:
        return TopKRouter(self, choice)

    def n_params(self, choice: Choice) -> int:
        return super().n_params(choice) + (choice.n_experts if self.bias_rate else 0)


class TopKRouter(LinearRouter):
    """See `TopK`. The bias moves at the first training forward after an optimiser step."""

    def __init__(self, spec: TopK, choice: Choice) -> None:
        super().__init__(choice)
        self.spec = spec
        zeros = torch.empty(choice.n_experts)
        self.bias = nn.Parameter(zeros, requires_grad=False) if spec.bias_rate else None
        self.tally = Tally()  # choices by expert

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        if self.training and self.bias is not None:
            self._move_bias(self.bias)
        logits = self.logits(x)
        scores = logits.softmax(-1) if self.spec.score == "softmax" else logits.sigmoid()
        ranking = self.rank(scores if self.bias is None else scores + self.bias)
        if self.spec.top_groups < self.spec.n_groups:
            ranking = ops.keep_best_groups(
                ranking, self.spec.n_groups, self.spec.top_groups, self.spec.group_best
            )
        ids, weights = ops.choose(scores, self.choice.top_k, self.choice.normalize, ranking)
        weights = weights * self.spec.scale
        to = ops.assign(ids, weights, real)
        if self.training and self.bias is not None and weights.requires_grad:
            weights.register_hook(lambda grad: self._count(to.expert))
        softmax = self.spec.score == "softmax"
        return Routing(to, scores if softmax else scores / scores.sum(-1, keepdim=True), logits)

    def _count(self, expert: Tensor) -> None:
        self.tally.add(torch.bincount(expert[expert >= 0], minlength=self.choice.n_experts))

    @torch.no_grad()
    def _move_bias(self, bias: Tensor) -> None:
        taken = self.tally.take(self.weight)
        if taken is not None:
            load = taken[0].to(bias.dtype)
            direction = torch.sign(load.mean() - load)
            bias.add_(direction - direction.mean(), alpha=self.spec.bias_rate)


@register
@dataclass(frozen=True)
class Softmax(RouterSpec):
    """Every expert works on every token, weighted by softmax(h). top_k must be all of them."""

    kind: ClassVar[str] = "softmax"

    def check(self, choice: Choice, path: str) -> None:
        e, k = choice.n_experts, choice.top_k
        rule = f"the softmax router uses all {e} experts, top_k says {k}; set top_k to {e}"
        require(k == e, join(path, "top_k"), rule)

    def build(self, choice: Choice) -> Router:
        return SoftmaxRouter(choice)


class SoftmaxRouter(LinearRouter):
    """See `Softmax`."""

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        logits = self.logits(x)
        probs = logits.softmax(-1)
        ids = torch.arange(self.choice.n_experts, device=x.device).expand(probs.shape)
        return Routing(ops.assign(ids, probs, real), probs, logits)


@register
@dataclass(frozen=True)
class NoisyTopK(RouterSpec):
    """Top-k of h + N(0, 1) softplus(W_noise x) noise_std: trainable noise, in training only.

    Args:
        noise_std: factor on the deviation.

    Source: Shazeer et al. 2017, arXiv:1701.06538, section 2.1.
    """

    kind: ClassVar[str] = "noisy_top_k"
    noise_std: float = 1.0

    def check(self, choice: Choice, path: str) -> None:
        super().check(choice, path)
        self.require_positive(join(path, "router"), "noise_std")

    def build(self, choice: Choice) -> Router:
        return NoisyTopKRouter(self, choice)

    def n_params(self, choice: Choice) -> int:
        return 2 * super().n_params(choice)

    def flops(self, choice: Choice, n_tokens: int) -> int:
        return 2 * super().flops(choice, n_tokens)


class NoisyTopKRouter(LinearRouter):
    """See `NoisyTopK`. noise_weight starts at zero: noise of deviation softplus(0) everywhere."""

    def __init__(self, spec: NoisyTopK, choice: Choice) -> None:
        super().__init__(choice)
        self.spec = spec
        self.noise_weight = nn.Parameter(torch.empty(choice.n_experts, choice.d_model))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        nn.init.zeros_(self.noise_weight)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        clean = noisy = self.logits(x)
        load = None
        if self.training:
            raw = linear_logits(x, self.noise_weight)
            std = self.spec.noise_std * ops.softplus_std(raw)
            noisy = clean + torch.randn_like(clean) * std
            load = ops.smooth_load(clean, noisy, std, self.choice.top_k)
        probs = noisy.softmax(-1)
        ids, weights = ops.choose(probs, self.choice.top_k, self.choice.normalize, self.rank(probs))
        return Routing(ops.assign(ids, weights, real), probs, clean, load)


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
        bias_rate: of the running mean, per optimiser step.

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

    def build(self, choice: Choice) -> Router:
        return SinkhornRouter(self, choice)

    def n_params(self, choice: Choice) -> int:
        return super().n_params(choice) + choice.n_experts


class SinkhornRouter(LinearRouter):
    """See `Sinkhorn`. The bias moves at the first training forward after an optimiser step; the
    first plans are taken whole."""

    def __init__(self, spec: Sinkhorn, choice: Choice) -> None:
        super().__init__(choice)
        self.spec = spec
        self.bias = nn.Parameter(torch.empty(choice.n_experts), requires_grad=False)
        self.tally = Tally()  # v of every plan

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        if self.training:
            self._move_bias()
        logits = self.logits(x)
        shift = self._plan(logits.detach(), real) if self.training else self.bias
        probs, ranking = logits.softmax(-1), self.rank(logits + shift)
        ids, weights = ops.choose(probs, self.choice.top_k, self.choice.normalize, ranking)
        if self.training and weights.requires_grad:
            weights.register_hook(lambda grad: self.tally.add(shift))
        return Routing(ops.assign(ids, weights, real), probs, logits)

    def _plan(self, logits: Tensor, real: Tensor | None) -> Tensor:
        """(e,): v, with mean zero, of the plan over the real tokens."""
        cold = (logits.flatten(0, 1) if real is None else logits[real]) / self.spec.temperature
        moved = ops.sinkhorn(cold, self.spec.n_iterations) - cold
        v = moved.sum(0) / max(1, len(moved))  # the same for every token, but for u and rounding
        return self.spec.temperature * (v - v.mean())

    @torch.no_grad()
    def _move_bias(self) -> None:
        taken = self.tally.take(self.weight)
        if taken is not None:
            total, passes = taken
            rate = torch.where(self.bias.any(), self.spec.bias_rate, 1.0)
            self.bias.lerp_((total / passes).to(self.bias.dtype), rate.to(self.bias.dtype))


@register
@dataclass(frozen=True)
class ExpertChoice(RouterSpec):
    """Every expert takes its ceil(top_k t / e) best tokens of a row: balanced by construction.

    A token's fate depends on later tokens: not causal, not for streaming or language modelling.
    With top_k 1 there are as many seats as tokens, so wherever a row has more than t / e tokens of
    a kind, or two experts want the same one, some tokens get no expert, and their output is zero.
    top_k 2, the capacity factor of the paper, leaves room for both.

    Source: Zhou et al. 2022, arXiv:2202.09368.
    """

    kind: ClassVar[str] = "expert_choice"
    causal: ClassVar[bool] = False

    def check(self, choice: Choice, path: str) -> None:
        rule = 'expert choice weighs by the softmax over all experts; set it to "all"'
        require(choice.normalize == "all", join(path, "normalize"), rule)

    def build(self, choice: Choice) -> Router:
        return ExpertChoiceRouter(choice)

    def n_jobs(self, choice: Choice, seq_len: int) -> int:
        return choice.n_experts * -(-seq_len * choice.top_k // choice.n_experts)


class ExpertChoiceRouter(LinearRouter):
    """See `ExpertChoice`."""

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        logits = self.logits(x)
        probs = logits.softmax(-1)
        return Routing(ops.expert_choice(probs, self.choice.top_k, real), probs, logits)


@register
@dataclass(frozen=True)
class Hash(RouterSpec):
    """A fixed hash of the token: nothing to learn.

    A hash spreads the codes evenly over the experts, but not the tokens, of which many share a few
    codes. `balance_hashes` deals the codes out by their frequencies, before training. What no hash
    does is let an expert choose what it is good at: it is a baseline for routers that learn.

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

    def build(self, choice: Choice) -> Router:
        return HashRouter(self, choice)

    def n_params(self, choice: Choice) -> int:
        return choice.d_model * self.n_bits

    def flops(self, choice: Choice, n_tokens: int) -> int:
        return 2 * n_tokens * choice.d_model * self.n_bits


class HashRouter(Router):
    """See `Hash`. planes ~ N(0, 1), frozen; every weight is 1/k."""

    table: Tensor

    def __init__(self, spec: Hash, choice: Choice) -> None:
        super().__init__(choice)
        planes = torch.empty(choice.d_model, spec.n_bits)
        self.planes = nn.Parameter(planes, requires_grad=False)
        self.register_buffer("table", torch.empty(2**spec.n_bits, dtype=torch.int64))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        init.normal_(self.planes, 1.0, generator)
        self.table.copy_(ops.hash_table(len(self.table), self.choice.n_experts))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        k, n_experts = self.choice.top_k, self.choice.n_experts
        first = self.table[self._codes(x)]
        ids = (first[..., None] + torch.arange(k, device=x.device)) % n_experts
        weights = torch.full_like(ids, 1 / k, dtype=self.planes.dtype)
        probs = F.one_hot(ids, n_experts).to(weights.dtype).mean(-2)
        return Routing(ops.assign(ids, weights, real), probs)

    @torch.no_grad()
    def balance(self, x: Tensor, real: Tensor | None = None) -> None:
        """Deal the codes out anew, by their frequencies in (b, t, d); arguments as in forward."""
        codes = self._codes(x)
        counts = torch.bincount(codes.flatten() if real is None else codes[real])
        self.table.copy_(ops.deal_out(counts, self.table, self.choice.n_experts))

    def _codes(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return ops.sign_codes(full_precision(x.detach()), self.planes)


@torch.no_grad()
def balance_hashes(model: nn.Module, run: Callable[[], Any]) -> None:
    """Balance every hash router in a model by what reaches it while `run` calls the model.

    Deeper ones see what the balanced ones before them send on. Do it once, before training.

    Args:
        model: whose hash routers.
        run: calls the model on a sample of the data, as in `lambda: model(batch)`.
    """

    def look(router: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(router, HashRouter)
        router.balance(*args)

    routers = [module for module in model.modules() if isinstance(module, HashRouter)]
    hooks = [router.register_forward_pre_hook(look) for router in routers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
