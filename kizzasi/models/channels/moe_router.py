"""The contract of routers: which experts work on a token, and how much each counts.

Symbols: b batch, t time, d d_model, e experts, k = top_k choices per token.
    weight        (e, d) W_g; logits h = W_g x, in at least float32 also under autocast
    noise_weight  (e, d) W_noise
    bias          (e,) b, added to the scores when choosing, never when weighing
    planes        (d, n_bits), frozen
    table         (2^n_bits,) int64, the expert of every code

The routers themselves are in moe_routers.py.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.norm import KeepFloat32, full_precision
from kizzasi.models.ops.routing import Assignments, Normalize
from kizzasi.models.strict import Registered, join, require

PASSES_WITHOUT_A_STEP = 256


class Routing(NamedTuple):
    """What a router decided about (b, t) tokens.

    to      the jobs of the experts.
    probs   (b, t, e), sums to 1 over e: the P of the balance losses.
    logits  (b, t, e), None for a router that learns nothing.
    load    (b, t, e), probability of being chosen (noisy top-k in training), else None.
    """

    to: Assignments
    probs: Tensor
    logits: Tensor | None = None
    load: Tensor | None = None


class Choice(NamedTuple):
    """What every router is told; see `MoESpec` for the fields of the same names."""

    d_model: int
    n_experts: int
    top_k: int
    normalize: Normalize = "topk"
    jitter: float = 0.0
    expert_dropout: float = 0.0


class Router(KeepFloat32, ABC):
    """Base of all routers."""

    float32_parameters = ("weight", "noise_weight", "bias", "planes")

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice

    @abstractmethod
    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        """Route (b, t, d); tokens where `real` (b, t) is False get nobody."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise; see each router."""


class RouterSpec(Registered):
    """Base of router specs: frozen dataclasses registered under `kind`."""

    registry: ClassVar[dict[str, type]] = {}
    causal: ClassVar[bool] = True  # False: a choice depends on later tokens, so no streaming

    def check(self, choice: Choice, path: str) -> None:
        """Raise SpecError for every rule broken; path is that of the mixture. By default the rule
        of routers that learn a choice of k."""
        learns = choice.top_k > 1 or choice.normalize != "topk"
        rule = 'top_k 1 with "topk" makes every weight 1, and the router learns nothing; use "all"'
        require(learns or choice.n_experts == 1, join(path, "normalize"), rule)

    def build(self, choice: Choice) -> Router:
        raise AssertionError(f"{type(self).__name__} must define build")

    def n_params(self, choice: Choice) -> int:
        return choice.d_model * choice.n_experts

    def flops(self, choice: Choice, n_tokens: int) -> int:
        return 2 * n_tokens * choice.d_model * choice.n_experts

    def n_jobs(self, choice: Choice, seq_len: int) -> int:
        """Jobs that one row of seq_len real tokens makes."""
        return seq_len * choice.top_k


def linear_logits(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(full_precision(x), weight)


class LinearRouter(Router):
    """A router with logits: weight ~ U(-1/sqrt(d), 1/sqrt(d))."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        self.weight = nn.Parameter(torch.empty(choice.n_experts, choice.d_model))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        init.uniform_(self.weight, self.choice.d_model**-0.5, generator)

    def logits(self, x: Tensor) -> Tensor:
        """Logits, in training of an input multiplied by U(1 - jitter, 1 + jitter)."""
        if self.training and self.choice.jitter:
            x = full_precision(x)
            jitter = self.choice.jitter
            x = x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)
        return linear_logits(x, self.weight)

    def rank(self, scores: Tensor) -> Tensor:
        """In training each expert is out of the running for a token with p = expert_dropout."""
        scores = scores.detach()
        if not (self.training and self.choice.expert_dropout):
            return scores
        out = torch.rand_like(scores) < self.choice.expert_dropout
        return scores.masked_fill(out, -math.inf)


class Tally:
    """What training passes report per expert, summed until the optimiser has made a step.

    A step is seen by the change of the router's weight: of its version, which a step of size zero
    raises too, or of its values, as fused optimisers leave the version alone. What is reported when
    a gradient comes back is counted once per forward, with or without activation checkpointing,
    over any number of accumulated batches. Under torch.distributed it is summed over all processes.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None  # (e + 1,): the amounts and, last, the number of passes
        self.passes = 0
        self.version, self.seen = 0, torch.empty(0)  # of the weight, and it, at the last forward

    def add(self, amounts: Tensor) -> None:
        new = torch.cat([amounts, amounts.new_ones(1)])
        self.total = new if self.total is None else self.total + new
        self.passes += 1
        if self.passes == PASSES_WITHOUT_A_STEP:
            warnings.warn(
                f"{self.passes} backward passes and no optimiser step changed the router's "
                "weight, so its balancing bias stands still; train the weight, or choose a "
                "router without a bias",
                stacklevel=2,
            )

    def take(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The amounts (e,) and the number of passes, if there was a step since the last call."""
        version, total = weight._version, self.total
        if version == self.version and torch.equal(self.seen.to(weight), weight):
            return None
        self.version, self.seen = version, weight.detach().clone()
        if total is None:
            return None
        self.total, self.passes = None, 0
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return total[:-1], total[-1]
