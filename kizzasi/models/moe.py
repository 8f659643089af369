"""Mixture of experts for use outside a sequence model, and tools for models that hold some.

`MixtureOfExperts(MoEConfig(...))` mixes vectors: any modules as experts, one vector or many at a
time. Inside a sequence model use the channel `MoESpec` of this package instead, which knows more
routers.

Tools: `after_step`, `after_every_step`, `watch_routing`, `revive_dead_experts`, `balance_hashes`,
`convert_experts`, `upcycle`, `share_experts`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models.adaptive import after_every_step, after_step, counts_here
from kizzasi.models.channels.moe import ListedExperts, MoE, MoESpec
from kizzasi.models.channels.moe_routers import (
    ExpertChoice,
    Hash,
    NoisyTopK,
    Sinkhorn,
    Softmax,
    TopK,
)
from kizzasi.models.checkpoints.experts import convert_experts
from kizzasi.models.decoding.reading import evaluating
from kizzasi.models.mixer import LayerContext
from kizzasi.models.moe_tools import (
    LayerUsage,
    RoutingUsage,
    balance_hashes,
    revive_dead_experts,
    share_experts,
    upcycle,
    watch_routing,
)
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.routing import count_jobs, cv_squared
from kizzasi.models.parts.router import Router as Gate
from kizzasi.models.parts.router import RouterSpec, Routing
from kizzasi.strict import coerce, field_types, require, unknown_name

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
    "after_every_step",
    "after_step",
    "balance_hashes",
    "convert_experts",
    "revive_dead_experts",
    "share_experts",
    "upcycle",
    "watch_routing",
]
FORWARDS_WITHOUT_LOSS = 32


class RoutingStrategy(Enum):
    """How `MixtureOfExperts` routes: all experts, the top k, or the top k under trained noise.

    A name or value in any spelling gives the member: RoutingStrategy("TopK").
    """

    SOFTMAX = "Softmax"
    TOP_K = "Top-K"
    NOISY_TOP_K = "Noisy Top-K"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> RoutingStrategy:
        spellings = {_letters(one.value): one for one in cls}
        rule = f"{value!r} is none of {[str(one) for one in cls]}"
        require(_letters(value) in spellings, "routing_strategy", rule)
        return spellings[_letters(value)]


@dataclass(frozen=True)
class MoEConfig:
    """What a `MixtureOfExperts` is made of.

    Args:
        num_experts, top_k: how many there are, and how many work on a vector.
        input_dim, output_dim: widths of vectors going in and out.
        routing_strategy: see `RoutingStrategy`; its text is taken too.
        load_balance_coeff: weight of `load_balance_loss`: importance CV^2 for softmax, Switch for
            top-k, importance CV^2 + load CV^2 for noisy top-k.
        expert_dropout: in training, chance that an expert cannot be chosen by a vector.
        noise_std: factor on the trained noise.

    Raises:
        SpecError: a value of a wrong type, or no routing strategy.
    """

    num_experts: int = 8
    top_k: int = 2
    input_dim: int = 256
    output_dim: int = 256
    routing_strategy: RoutingStrategy = RoutingStrategy.TOP_K
    load_balance_coeff: float = 0.01
    expert_dropout: float = 0.0
    noise_std: float = 1.0

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            strategy = hint is RoutingStrategy
            value = RoutingStrategy(value) if strategy else coerce(value, hint, name)
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the strategy is written as "Softmax", "TopK" or "NoisyTopK"."""
        strategy = str(self.routing_strategy).replace("-", "").replace(" ", "")
        return asdict(self) | {"routing_strategy": strategy}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MoEConfig:
        """Read plain data. Raises SpecError for an unknown key or a wrong value."""
        known = [field.name for field in fields(cls)]
        for key in data:
            require(key in known, str(key), unknown_name(key, known))
        return cls(**data)

    def to_spec(self) -> MoESpec:
        """The channel spec that routes and balances likewise.

        With top_k = 1 a vector's weight is the probability of its expert, not 1, so that the
        router learns from the task too.

        Raises:
            SpecError: a field breaks a rule.
        """
        self._check()
        coeff = self.load_balance_coeff
        k, importance = self.top_k, {"balance_weight": 0.0, "importance_weight": coeff}
        noise: RouterSpec = NoisyTopK(noise_std=self.noise_std)
        strategies: dict[RoutingStrategy, dict[str, Any]] = {
            RoutingStrategy.TOP_K: {"balance_weight": coeff},
            RoutingStrategy.SOFTMAX: importance | {"router": Softmax(), "top_k": self.num_experts},
            RoutingStrategy.NOISY_TOP_K: importance | {"router": noise, "load_weight": coeff},
        }
        shared = {"top_k": k, "normalize": "all" if k == 1 else "topk", "z_loss_weight": 0.0}
        own = shared | strategies[self.routing_strategy]
        return MoESpec(n_experts=self.num_experts, expert_dropout=self.expert_dropout, **own)

    def _check(self) -> None:
        for name in ("num_experts", "top_k", "input_dim", "output_dim", "noise_std"):
            value = getattr(self, name)
            require(value > 0, name, f"{value} is not positive")
        rule = f"{self.top_k} is more than the {self.num_experts} of num_experts"
        require(self.top_k <= self.num_experts, "top_k", rule)
        coeff, dropout = self.load_balance_coeff, self.expert_dropout
        require(coeff >= 0, "load_balance_coeff", f"{coeff} is negative; give 0 or more")
        require(0 <= dropout < 1, "expert_dropout", f"{dropout} is outside [0, 1)")


class Router:
    """Chooses experts for vectors: that of a `MixtureOfExperts`, or one by itself.

    Args:
        config: sizes and routing.
        gate: of a mixture; None makes a new one.
        generator: of the new one's weights; None draws from torch's own.
    """

    def __init__(
        self, config: MoEConfig, gate: Gate | None = None, generator: torch.Generator | None = None
    ) -> None:
        if gate is None:
            spec = config.to_spec()
            gate = Gate(spec.router, spec.choice(config.input_dim))
            gate.reset_parameters(generator)
        self.config, self.gate = config, gate

    @property
    def weights(self) -> Tensor:
        """(input_dim, num_experts)."""
        return self.gate.weight.T

    @torch.no_grad()
    def route(self, x: Tensor) -> tuple[list[int], list[float]]:
        """The chosen experts of one vector (input_dim,), and their weights, as in evaluation.

        The best come first; softmax, which takes all, lists them in order.

        Raises:
            ShapeError: another shape.
        """
        check_input(x, self.config, self.gate)
        if x.ndim != 1:
            raise ShapeError(f"router input: expected one vector, got shape {tuple(x.shape)}")
        with evaluating(self.gate):
            to = self.gate(x[None, None]).to
        return to.expert.tolist(), to.weight.tolist()

    def load_balance_loss(self, all_routes: Iterable[Sequence[int]]) -> float:
        """Coefficient of variation of how often experts occur in many routes, times the config's
        coefficient: a measure, which has no gradient."""
        jobs = torch.tensor([i for route in all_routes for i in route], dtype=torch.int64)
        counts = torch.bincount(jobs, minlength=self.config.num_experts).double()
        return self.config.load_balance_coeff * cv_squared(counts).sqrt().item()


class MixtureOfExperts(nn.Module):
    """y = sum over the chosen i of w_i expert_i(x).

    Args:
        config: sizes, routing, balancing.
        experts: modules from (n, input_dim) to (n, output_dim), one per expert; None makes two
            Linear layers with SiLU between them, as wide inside as the output. A sequence mixer
            sees every vector as a sequence of its own.
        generator: of the initialisation; None draws from torch's own.

    Raises:
        SpecError: the config breaks a rule, the experts are not num_experts modules, or one mixes
            the vectors that it is given.
        ShapeError: an expert does not map input_dim to output_dim.
    """

    def __init__(
        self,
        config: MoEConfig,
        experts: Iterable[nn.Module] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, spec = config, config.to_spec()
        if experts is None:
            experts = [_expert(config, generator) for _ in range(config.num_experts)]
        experts = list(experts)
        if len(experts) != config.num_experts:
            raise SpecError(f"experts: {len(experts)} given, num_experts is {config.num_experts}")
        for i, expert in enumerate(experts):
            require(isinstance(expert, nn.Module), f"experts[{i}]", f"{expert!r:.60} is no module")
        with torch.device("meta"):
            self.layer = MoE(spec, LayerContext(config.input_dim))
        self.layer.experts = listed = ListedExperts(experts)
        try_experts(listed, config)
        self.layer.gate.to_empty(device=torch.get_default_device()).reset_parameters(generator)
        self.layer.gate.register_forward_hook(self._count)
        self.router = Router(config, self.layer.gate)
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) to (..., output_dim), each vector on its own.

        Raises:
            ShapeError: another width, or no floating tensor of the mixture's precision.
        """
        check_input(x, self.config, self.layer.gate)
        out = self.layer(x.reshape(1, -1, x.shape[-1]))
        if self.training and out.aux and counts_here():
            self._add_loss(sum(out.aux.values()))  # pyright: ignore[reportArgumentType]
        return out.y.reshape(*x.shape[:-1], self.config.output_dim)

    def load_balance_loss(self) -> Tensor:
        """The balance losses of all forwards in training since the last call, weighted, summed and
        differentiable: add it to your loss before its backward. Zero if there were none."""
        loss, self._loss, self._forwards = self._loss, None, 0
        weight = self.layer.gate.weight
        return weight.new_zeros(()) if loss is None else loss

    def expert_usage_stats(self) -> list[int]:
        """Jobs of every expert since the last `clear_routing_history`."""
        return self._usage.tolist()

    def clear_routing_history(self) -> None:
        """Start counting anew."""
        self._usage = torch.zeros(self.config.num_experts, dtype=torch.int64)
        self._loss: Tensor | None = None
        self._forwards = 0

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """`forward` in evaluation mode, without gradients: the streaming face."""
        with evaluating(self):
            return self(x)

    def reset(self) -> None:
        """Forget the history; vectors are mixed one by one, so there is no other state."""
        self.clear_routing_history()

    @property
    def context_window(self) -> int:
        """How many inputs an output depends on: its own."""
        return 1

    def extra_repr(self) -> str:
        config = self.config
        top_k = self.layer.spec.top_k
        return f"{config.num_experts} experts, top_k={top_k}, strategy={config.routing_strategy}"

    def _add_loss(self, loss: Tensor) -> None:
        self._loss = loss if self._loss is None else self._loss + loss
        if torch.compiler.is_compiling():
            return
        self._forwards += 1
        if self._forwards == FORWARDS_WITHOUT_LOSS:
            self._loss = None
            warnings.warn(
                f"{self._forwards} forwards in training without load_balance_loss(), whose losses "
                "are now forgotten; add it to your loss, or set load_balance_coeff to 0",
                stacklevel=2,
            )

    def _count(self, gate: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        if counts_here():
            jobs = count_jobs(routing.to, len(routing.to.token), 1, self.config.num_experts)[0]
            self._usage = self._usage.to(jobs.device) + jobs

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin without the pending loss, whose graph belongs to this module's weights."""
        return {**self.__dict__, "_loss": None, "_forwards": 0}


def check_input(x: object, config: MoEConfig, gate: Gate) -> None:
    """Raise ShapeError unless x is a floating tensor (..., input_dim) of the gate's precision."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(f"router input: expected a floating tensor, got {given}; use x.float()")
    if x.ndim == 0 or x.shape[-1] != config.input_dim:
        raise ShapeError(
            f"router input: expected {config.input_dim} values per vector, "
            f"got shape {tuple(x.shape)}"
        )
    wide = full_precision(gate.weight).dtype
    if full_precision(x).dtype != wide:
        raise ShapeError(f"router input: {x.dtype}, but the router is {wide}; use x.to({wide})")


@torch.no_grad()
def try_experts(experts: ListedExperts, config: MoEConfig) -> None:
    """Refuse experts that do not map two vectors to two vectors, each on its own."""
    for i, expert in enumerate(experts):
        like = next((p for p in expert.parameters() if p.is_floating_point()), torch.empty(0))
        if like.is_meta:
            continue
        n, call = config.input_dim, experts.caller(i)
        rows = torch.linspace(-1, 1, 2 * n, dtype=like.dtype, device=like.device).view(2, n)
        where = f"experts[{i}]: {type(expert).__name__}"
        with evaluating(expert):
            try:
                both, again, first = call(rows), call(rows), call(rows[:1])
            except (RuntimeError, ValueError, IndexError) as error:
                raise ShapeError(f"{where} does not take rows (m, {n}): {error}") from error
        if both.shape[1:] != (config.output_dim,):
            given = tuple(both.shape[1:])
            raise ShapeError(f"{where} gives {given} per vector, output_dim is {config.output_dim}")
        if torch.equal(both, again) and not torch.allclose(both[:1], first, 1e-3, 1e-4):
            raise SpecError(
                f"{where} mixes the vectors that it is given, and those that meet at an expert are "
                "chance; give it one that maps each vector on its own"
            )


def _expert(config: MoEConfig, generator: torch.Generator | None) -> nn.Module:
    n_in, n_out = config.input_dim, config.output_dim
    expert = nn.Sequential(nn.Linear(n_in, n_out), nn.SiLU(), nn.Linear(n_out, n_out))
    for layer, width in ((expert[0], n_in), (expert[2], n_out)):
        for parameter in layer.parameters():
            bound = 1 / math.sqrt(width)
            nn.init.uniform_(parameter, -bound, bound, generator)
    return expert


def _letters(text: object) -> str:
    """Without case and what is no letter."""
    return "".join(letter for letter in str(text).lower() if letter.isalpha())
