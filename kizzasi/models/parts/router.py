"""What a router of a mixture is: its tensors, and the contract of specs that say how it decides.

Symbols: b batch, t time, d d_model, e experts, k = top_k choices per token.
    weight        (e, d) W_g; logits h = W_g x, in at least float32 also under autocast
    noise_weight  (e, d) W_noise
    bias          (e,) b, added to the scores when choosing, never when weighing
    logit_bias    (e,) c, learned: logits h = W_g x + c
    planes        (d, n_bits), frozen
    table         (2^n_bits,) int64, the expert of every code
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.adaptive import Adaptive, Tally
from kizzasi.models.cost import Cost
from kizzasi.models.cost import linear as linear_cost
from kizzasi.models.norm import KeepFloat32, full_precision, without_autocast
from kizzasi.models.ops import routing as ops
from kizzasi.models.ops.routing import Assignments, Normalize
from kizzasi.strict import Registered, join, require

Mask: TypeAlias = Tensor | None


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


class Router(KeepFloat32, Adaptive):
    """The tensors of a router; its spec says which, and what becomes of them."""

    float32_parameters = ("weight", "noise_weight", "bias", "logit_bias", "planes")
    weight: nn.Parameter
    noise_weight: nn.Parameter
    planes: nn.Parameter
    bias: Tensor | None
    logit_bias: nn.Parameter | None
    table: Tensor

    def __init__(self, spec: RouterSpec, choice: Choice) -> None:
        super().__init__()
        self.spec, self.choice = spec, choice
        self.tally: Tally | None = None
        self.register_buffer("bias", None)
        self.register_parameter("logit_bias", None)
        spec.furnish(self, choice)

    def forward(self, x: Tensor, real: Mask = None, starts: Mask = None) -> Routing:
        """Route (b, t, d); tokens where `real` (b, t) is False get nobody, and where `starts`
        (b, t) is True a document begins."""
        return self.spec.route(self, x, real, starts)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.spec.reset(self, generator)

    def take(self) -> Tensor | None:
        return None if self.tally is None else self.tally.take(self.weight.device)

    def after_step(self, counted: Tensor) -> None:
        assert self.bias is not None
        self.spec.move(self.bias, counted)

    def logits(self, x: Tensor) -> Tensor:
        """(b, t, e), in training of an input multiplied by U(1 - jitter, 1 + jitter)."""
        if self.training and self.choice.jitter:
            x = full_precision(x)
            jitter = self.choice.jitter
            x = x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)
        return linear(x, self.weight, self.logit_bias)

    def rank(self, scores: Tensor) -> Tensor:
        """In training each expert is out of the running for a token with p = expert_dropout."""
        scores = scores.detach()
        if not (self.training and self.choice.expert_dropout):
            return scores
        out = torch.rand_like(scores) < self.choice.expert_dropout
        return scores.masked_fill(out, -math.inf)

    def assign(self, scores: Tensor, ranking: Tensor, real: Mask, scale: float = 1) -> Assignments:
        """Jobs for the top_k of a ranking, weighted by their scores."""
        ids, weights = ops.choose(scores, self.choice.top_k, self.choice.normalize, ranking)
        return ops.assign(ids, weights * scale, real)


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

    def furnish(self, router: Router, choice: Choice) -> None:
        """Give a new router its tensors."""
        router.weight = nn.Parameter(torch.empty(choice.n_experts, choice.d_model))

    def reset(self, router: Router, generator: torch.Generator | None) -> None:
        """Initialise them: weight ~ U(-1/sqrt(d), 1/sqrt(d)), bias 0."""
        init.uniform_(router.weight, router.choice.d_model**-0.5, generator)
        for bias in (router.bias, router.logit_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @abstractmethod
    def route(self, router: Router, x: Tensor, real: Mask, starts: Mask) -> Routing:
        """See `Router.forward`."""

    def move(self, bias: Tensor, counted: Tensor) -> None:
        """Change a router's bias in place, after a step; `counted` is from its tally."""

    def n_outputs(self, choice: Choice) -> int:
        """Numbers that a token's d are multiplied into."""
        return choice.n_experts

    def cost(self, choice: Choice, n_tokens: int) -> Cost:
        return linear_cost(n_tokens, choice.d_model, self.n_outputs(choice))

    def n_jobs(self, choice: Choice, seq_len: int) -> int:
        """Jobs that one row of seq_len real tokens makes."""
        return seq_len * choice.top_k


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In at least float32."""
    bias = None if bias is None else full_precision(bias)
    with without_autocast(x):
        return F.linear(full_precision(x), full_precision(weight), bias)


def add_bias(router: Router, n: int) -> None:
    """A bias, and a tally of n numbers."""
    empty = torch.empty(router.choice.n_experts, dtype=router.weight.dtype)
    router.register_buffer("bias", empty)
    router.tally = Tally(n)
