"""Mixture of experts for use outside a sequence model, and tools for models that hold some.

`MixtureOfExperts(MoEConfig(...))` mixes vectors: any modules as experts, one vector or many at a
time. Inside a sequence model use the channel `MoESpec` of this package instead.

Tools: `watch_routing`, `revive_dead_experts`, `convert_experts`, `upcycle`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import cast

import torch
from torch import Tensor, nn

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models.channels.moe import MoE, MoESpec, Report
from kizzasi.models.channels.moe_layouts import convert_experts
from kizzasi.models.channels.moe_router import RouterSpec
from kizzasi.models.channels.moe_routers import (
    ExpertChoice,
    Hash,
    NoisyTopK,
    Sinkhorn,
    Softmax,
    TopK,
)
from kizzasi.models.channels.moe_telemetry import (
    LayerUsage,
    RoutingUsage,
    revive_dead_experts,
    watch_routing,
)
from kizzasi.models.mixer import LayerContext
from kizzasi.models.model import SequenceModel, build_model

__all__ = [
    "ExpertChoice",
    "Hash",
    "LayerUsage",
    "MixtureOfExperts",
    "MoE",
    "MoEConfig",
    "MoESpec",
    "NoisyTopK",
    "Router",
    "RoutingStrategy",
    "RoutingUsage",
    "Sinkhorn",
    "Softmax",
    "TopK",
    "convert_experts",
    "revive_dead_experts",
    "upcycle",
    "watch_routing",
]


class RoutingStrategy(Enum):
    """How `MixtureOfExperts` routes: all experts, the top k, or the top k under trained noise."""

    SOFTMAX = "Softmax"
    TOP_K = "Top-K"
    NOISY_TOP_K = "Noisy Top-K"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class MoEConfig:
    """What a `MixtureOfExperts` is made of.

    Args:
        num_experts, top_k: how many there are, and how many work on a vector.
        input_dim, output_dim: widths of vectors going in and out.
        routing_strategy: see `RoutingStrategy`.
        load_balance_coeff: weight of `load_balance_loss`: importance CV^2 for softmax, Switch for
            top-k, importance CV^2 + load CV^2 for noisy top-k.
        expert_dropout: in training, chance that an expert cannot be chosen by a vector.
        noise_std: factor on the trained noise.
    """

    num_experts: int = 8
    top_k: int = 2
    input_dim: int = 256
    output_dim: int = 256
    routing_strategy: RoutingStrategy = RoutingStrategy.TOP_K
    load_balance_coeff: float = 0.01
    expert_dropout: float = 0.0
    noise_std: float = 1.0

    def to_spec(self) -> MoESpec:
        """The channel spec that routes and balances likewise.

        Raises:
            SpecError: a field breaks a rule.
        """
        strategy, coeff = self.routing_strategy, self.load_balance_coeff
        softmax = strategy is RoutingStrategy.SOFTMAX
        noisy = strategy is RoutingStrategy.NOISY_TOP_K
        router: RouterSpec = TopK()
        if softmax:
            router = Softmax()
        elif noisy:
            router = NoisyTopK(noise_std=self.noise_std)
        spec = MoESpec(
            n_experts=self.num_experts,
            top_k=self.num_experts if softmax else self.top_k,
            router=router,
            normalize="all" if self.top_k == 1 else "topk",
            expert_dropout=self.expert_dropout,
            balance_weight=coeff if strategy is RoutingStrategy.TOP_K else 0.0,
            importance_weight=0.0 if strategy is RoutingStrategy.TOP_K else coeff,
            load_weight=coeff if noisy else 0.0,
            z_loss_weight=0.0,
        )
        if min(self.input_dim, self.output_dim) < 1:
            raise SpecError(
                f"input_dim, output_dim: {self.input_dim}, {self.output_dim}; give >= 1"
            )
        spec.check(self.input_dim, "")
        return spec


class Router:
    """Chooses experts for single vectors: the router of a `MixtureOfExperts`, seen alone."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        self.mixture = mixture

    @property
    def weights(self) -> Tensor:
        """(input_dim, num_experts)."""
        return cast(Tensor, self.mixture.layer.gate.weight).T

    @torch.no_grad()
    def route(self, x: Tensor) -> tuple[list[int], list[float]]:
        """The chosen experts of one vector (input_dim,), best first, and their weights.

        Raises:
            ShapeError: another width.
        """
        self.mixture.check(x)
        to = self.mixture.layer.gate(x.reshape(1, 1, -1)).to
        return to.expert.tolist(), to.weight.tolist()


class MixtureOfExperts(nn.Module):
    """y = sum over the chosen i of w_i expert_i(x).

    Args:
        config: sizes, routing, balancing.
        experts: modules from (n, input_dim) to (n, output_dim), one per expert; None makes two
            Linear layers with SiLU between them, as wide inside as the output.
        seed: of the initialisation.

    Raises:
        SpecError: the config breaks a rule, or the experts are not num_experts.
    """

    def __init__(
        self, config: MoEConfig, experts: Sequence[nn.Module] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.config, spec = config, config.to_spec()
        generator = torch.Generator().manual_seed(seed)
        if experts is None:
            experts = [_expert(config, generator) for _ in range(config.num_experts)]
        if len(experts) != config.num_experts:
            raise SpecError(f"experts: {len(experts)} given, num_experts is {config.num_experts}")
        self.layer = MoE(spec, LayerContext(config.input_dim), experts)
        self.layer.gate.reset_parameters(generator)
        self.layer.listen(self._hear)
        self.router = Router(self)
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) to (..., output_dim), each vector on its own.

        Raises:
            ShapeError: another width.
        """
        self.check(x)
        out = self.layer(x.reshape(1, -1, x.shape[-1]))
        if self.training:
            self._loss = sum(out.aux.values(), torch.zeros((), device=x.device))
        return out.y.reshape(*x.shape[:-1], self.config.output_dim)

    def load_balance_loss(self) -> Tensor:
        """The balance loss of the last forward in training, weighted and differentiable: add it to
        your loss. Zero before any."""
        return self._loss

    def expert_usage_stats(self) -> list[int]:
        """Jobs of every expert since the last `clear_routing_history`."""
        return self._usage

    def clear_routing_history(self) -> None:
        """Start counting anew."""
        self._usage, self._loss = [0] * self.config.num_experts, torch.zeros(())

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """`forward` without gradients: the streaming face."""
        return self(x)

    def reset(self) -> None:
        """Forget the history; vectors are mixed one by one, so there is no other state."""
        self.clear_routing_history()

    @property
    def context_window(self) -> int:
        """How many inputs an output depends on: its own."""
        return 1

    def check(self, x: Tensor) -> None:
        """Raise ShapeError unless x is (..., input_dim)."""
        if x.ndim == 0 or x.shape[-1] != self.config.input_dim:
            raise ShapeError(
                f"router input: expected {self.config.input_dim} values per vector, "
                f"got shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        config = self.config
        return f"{config.num_experts} experts, top_k={config.top_k}, {config.routing_strategy}"

    def _hear(self, report: Report) -> None:
        now = report.counts.sum(0).tolist()
        self._usage = [a + b for a, b in zip(self._usage, now, strict=True)]


def _expert(config: MoEConfig, generator: torch.Generator) -> nn.Module:
    n_in, n_out = config.input_dim, config.output_dim
    expert = nn.Sequential(nn.Linear(n_in, n_out), nn.SiLU(), nn.Linear(n_out, n_out))
    for layer, width in ((expert[0], n_in), (expert[2], n_out)):
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(width), 1 / math.sqrt(width), generator)
    return expert


def upcycle(
    dense: SequenceModel,
    n_experts: int,
    *,
    top_k: int = 2,
    layers: Sequence[int] | None = None,
    noise: float = 0.0,
    reinit: float = 0.0,
    seed: int = 0,
) -> SequenceModel:
    """Turn the channels of a dense model into mixtures whose experts begin as its copies.

    With noise = reinit = 0 the new model gives the dense model's logits, because the weights of
    the chosen sum to 1. The routers begin at random.

    Args:
        dense: a model whose channels are stateless.
        n_experts, top_k: as in `MoESpec`; top_k is at least 2.
        layers: which blocks; None means all that have a stateless channel.
        noise: each expert's tensors get noise of this share of their root mean square.
        reinit: this share of each expert's values is drawn anew (drop-upcycling).
        seed: of routers, noise and re-initialisation.

    Returns:
        A new model on the dense one's device and in its dtype.

    Raises:
        SpecError: a named block has no stateless channel, or a rule of `MoESpec` is broken.

    Source: Komatsuzaki et al. 2022, arXiv:2212.05055; Nakamura et al. 2025, arXiv:2502.19261.
    Differs: dropped values are drawn one by one, from a normal law of the tensor's deviation.
    """
    blocks = list(dense.spec.blocks)
    chosen = range(len(blocks)) if layers is None else layers
    for i in chosen:
        channel = blocks[i].channel
        if channel is None or channel.context_window != 1 or channel.kind == "moe":
            if layers is None:
                continue
            raise SpecError(f"blocks[{i}].channel: {channel} cannot be copied into experts")
        spec = MoESpec(n_experts=n_experts, top_k=top_k, experts=(channel,) * n_experts)
        blocks[i] = replace(blocks[i], channel=spec)
    parameter = next(dense.stem.parameters())
    model = build_model(dense.spec.replace(blocks=tuple(blocks)), seed=seed, dtype=parameter.dtype)
    generator = torch.Generator().manual_seed(seed)
    old, new = dense.state_dict(), model.state_dict()
    for name in new:
        prefix, _, rest = name.partition(".channel.experts.")
        if name in old:
            new[name] = old[name]
        elif rest:
            source = old[f"{prefix}.channel.{rest.partition('.')[2]}"].cpu()
            new[name] = _perturb(source, noise, reinit, generator)
    model.load_state_dict(new)
    return model.to(parameter.device).train(dense.training)


def _perturb(source: Tensor, noise: float, share: float, generator: torch.Generator) -> Tensor:
    scale = source.float().square().mean().sqrt()
    draw, fresh = (torch.randn(source.shape, generator=generator) for _ in range(2))
    if noise:
        source = source + noise * scale * draw
    if share:
        anew = torch.rand(source.shape, generator=generator) < share
        source = torch.where(anew, scale * fresh, source)
    return source
