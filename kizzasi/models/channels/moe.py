"""Mixture of experts: a router sends every token to a few of many channel mixers.

    y[t] = sum over the chosen i of w_i(x[t]) expert_i(x[t])  (+ shared expert, + identity experts)

Dropless unless told otherwise. Balance losses are returned in `aux`, in training only, so that the
loss of an evaluated model is its loss on the data.

SwiGLUs of one width without biases, the usual experts, are packed: one parameter for the gates and
ups of all, one for the downs, named as transformers 5 holds them in memory. Hooks, parametrizations
and adapters act on the module `experts` and on those parameters (PEFT: `target_parameters`); as
there are no Linear layers inside, target_modules finds none. Other experts are a list of modules.

Symbols: b batch, t time, d d_model, e experts, k = top_k; f_i, P_i as in ops/routing.py.
Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.cost import Cost, linear
from kizzasi.models.mixer import ChannelSpec, LayerContext, Mixer, MixerOut
from kizzasi.models.ops import experts as dispatch
from kizzasi.models.ops import routing as ops
from kizzasi.models.ops.routing import Assignments, Normalize
from kizzasi.models.ops.sorted_experts import MIX_SORTED
from kizzasi.models.parts.router import Choice, Router, RouterSpec, Routing
from kizzasi.strict import added, join, register, require

LOSSES = ("balance", "sequence", "importance", "load", "z_loss")
PARTS = ("gate_proj", "up_proj", "down_proj")


@register
@dataclass(frozen=True)
class MoESpec(ChannelSpec):
    """A mixture of experts.

    Args:
        n_experts: experts with parameters.
        top_k: how many work on a token.
        hidden: width of each SwiGLU expert; None means a dense SwiGLU's 8/3 d_model shared among
            the top_k, rounded up to a multiple of 8.
        experts: in place of n_experts equal SwiGLUs, one stateless channel spec per expert.
        router: who decides; see moe_routers.py.
        normalize: what the weights of the chosen are divided by; see `ops.routing.choose`.
        n_null: further choices that do nothing.
        n_identity: further choices that return their input.
        shared_hidden: width of a SwiGLU that works on every token; 0 for none.
        shared: in place of that SwiGLU, any stateless channel spec.
        shared_gate: multiply the shared expert by sigmoid(w x), as in Qwen2-MoE.
        jitter: in training, the router's input is multiplied by U(1 - jitter, 1 + jitter).
        expert_dropout: in training, chance that an expert cannot be chosen by a token.
        capacity_factor: in training, an expert serves at most ceil(factor k t / e) jobs of a
            document, and the rest are dropped; 0 drops nothing.
        balance_weight: of e sum_i f_i P_i over the batch (Switch).
        sequence_weight: of the same loss for each sequence, averaged (DeepSeek-V3).
        importance_weight: of CV^2 of the summed weights (Shazeer).
        load_weight: of CV^2 of the smooth load estimate (Shazeer); noisy_top_k only.
        z_loss_weight: of the mean squared logsumexp of the logits (ST-MoE).
        cost_aware: weigh f_i in the balance losses by the expert's share of parameters, times e.
    """

    kind: ClassVar[str] = "moe"
    n_experts: int = 8
    top_k: int = 2
    hidden: int | None = None
    experts: tuple[ChannelSpec, ...] = ()
    router: RouterSpec = field(default_factory=TopK)
    normalize: Normalize = "topk"
    n_null: int = 0
    n_identity: int = 0
    shared_hidden: int = 0
    shared_gate: bool = False
    jitter: float = 0.0
    expert_dropout: float = 0.0
    capacity_factor: float = 0.0
    balance_weight: float = 0.01
    sequence_weight: float = 0.0
    importance_weight: float = 0.0
    load_weight: float = 0.0
    z_loss_weight: float = 0.001
    cost_aware: bool = False
    shared: ChannelSpec | None = added(None)

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_experts", "top_k")
        if self.hidden is not None:
            self.require_positive(path, "hidden")
        sizes = ("n_null", "n_identity", "shared_hidden", "capacity_factor")
        for name in (*sizes, *(f"{loss}_weight" for loss in LOSSES)):
            value = getattr(self, name)
            require(value >= 0, join(path, name), f"{value} is negative; give 0 or more")
        for name in ("jitter", "expert_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, join(path, name), f"{value} is outside [0, 1)")
        choice = self.choice(d_model)
        rule = f"{self.top_k} is more than the {choice.n_experts} choices; lower it"
        require(self.top_k <= choice.n_experts, join(path, "top_k"), rule)
        self.router.check(choice, path)
        rule = "only the router noisy_top_k estimates its load; use balance_weight"
        noisy = self.router.kind == "noisy_top_k"
        require(noisy or self.load_weight == 0, join(path, "load_weight"), rule)
        rule = "expert choice fills a fixed number of seats; leave it at 0"
        limited = self.causal or self.capacity_factor == 0
        require(limited, join(path, "capacity_factor"), rule)
        rule = "there is no shared expert to gate; set shared_hidden"
        shared = self.shared_spec() is not None
        require(shared or not self.shared_gate, join(path, "shared_gate"), rule)
        rule = "shared_hidden makes one already; leave one of the two out"
        where = join(path, "shared")
        require(self.shared is None or self.shared_hidden == 0, where, rule)
        if self.shared is not None:
            self._check_expert(self.shared, d_model, where)
        self._check_experts(d_model, path)

    def _check_experts(self, d_model: int, path: str) -> None:
        if not self.experts:
            return
        n, rule = len(self.experts), "give it to each of `experts` and leave it out here"
        require(self.hidden is None, join(path, "hidden"), rule)
        rule = f"{self.n_experts}, but `experts` lists {n}; make them equal"
        require(n == self.n_experts, join(path, "n_experts"), rule)
        for i, expert in enumerate(self.experts):
            self._check_expert(expert, d_model, join(path, f"experts[{i}]"))

    def _check_expert(self, expert: ChannelSpec, d_model: int, where: str) -> None:
        rule = f"{expert.kind!r} cannot be an expert; choose a stateless channel that is no moe"
        require(expert.context_window == 1 and expert.kind != self.kind, where, rule)
        expert.check(d_model, where)

    def build(self, layer: LayerContext) -> MoE:
        return MoE(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        """See `Cost`. Without capacity limits and null experts flops do not depend on the data if
        the experts are equal; with unequal ones, they and active_params suppose perfect balance."""
        n, choice = batch * seq_len, self.choice(layer.d_model)
        parts = [expert.cost(layer, 1, 1) for expert in self.expert_specs(layer.d_model)]
        n_jobs = batch * self.router.n_jobs(choice, seq_len) * self.n_experts // choice.n_experts
        work = sum(p.flops for p in parts) * n_jobs // self.n_experts
        params = sum(p.params for p in parts)
        total = self.router.cost(choice, n)
        total += Cost(params, params * self.top_k // choice.n_experts, work)
        shared = self.shared_spec()
        if shared is not None:
            total += shared.cost(layer, seq_len, batch)
        return total + linear(n, layer.d_model, 1) if self.shared_gate else total

    @property
    def context_window(self) -> float:
        return 1 if self.causal else float("inf")

    @property
    def causal(self) -> bool:
        """False if a token's result depends on later tokens: no `step`, no language modelling."""
        return self.router.causal

    def choice(self, d_model: int) -> Choice:
        n_choices = self.n_experts + self.n_null + self.n_identity
        k, jitter, dropout = self.top_k, self.jitter, self.expert_dropout
        return Choice(d_model, n_choices, k, self.normalize, jitter, dropout)

    def expert_specs(self, d_model: int) -> tuple[ChannelSpec, ...]:
        """One spec per expert with parameters."""
        if self.experts:
            return self.experts
        width = self.hidden
        if width is None:
            width = 8 * -(-d_model // (3 * self.top_k))
        return (ChannelSpec.registry["swiglu"](hidden=width),) * self.n_experts

    def packed_width(self, d_model: int) -> int | None:
        """Inner width of experts that are packed; None if they are a list of modules."""
        swiglu = ChannelSpec.registry["swiglu"]
        widths: set[int | None] = {
            expert.width(d_model) if isinstance(expert, swiglu) and expert.plain else None  # pyright: ignore
            for expert in self.expert_specs(d_model)
        }
        return widths.pop() if len(widths) == 1 else None

    def relative_costs(self, choice: Choice) -> list[float]:
        """Parameters of every choice, divided by their mean."""
        layer, n = LayerContext(choice.d_model), choice.n_experts
        params = [e.cost(layer, 1, 1).params for e in self.expert_specs(choice.d_model)]
        return [p * n / sum(params) for p in params] + [0.0] * (n - len(params))

    def shared_spec(self) -> ChannelSpec | None:
        """The expert that works on every token."""
        if self.shared is not None or not self.shared_hidden:
            return self.shared
        return ChannelSpec.registry["swiglu"](hidden=self.shared_hidden)


class PackedExperts(nn.Module):
    """n SwiGLUs of one width.

    gate_up_proj  (n, 2h, d), of every expert the gates, then the ups
    down_proj     (n, d, h)

    State dicts of version 0.1, which name every expert's three matrices, are read too.
    """

    def __init__(self, n: int, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * hidden, d_model))
        self.down_proj = nn.Parameter(torch.empty(n, d_model, hidden))
        self.register_load_state_dict_pre_hook(_pack)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Every expert as a `SwiGLU` by itself."""
        _, d, h = self.down_proj.shape
        out = init.residual_scale(n_layers) / math.sqrt(h)
        for gate_up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            for part in gate_up.split(h):
                init.uniform_(part, 1 / math.sqrt(d), generator)
            init.uniform_(down, out, generator)

    def forward(self, x: Tensor, to: Assignments, engine: str = "auto") -> Tensor:
        """(n, d) to (n, d); engine as in `MoE`."""
        gate_up, down = self.gate_up_proj, self.down_proj
        how = dispatch.dispatch_rule(x, down, engine)
        return dispatch.mix_swiglu(x, to, gate_up, down, how, engine)

    @torch.no_grad()
    def tensors(self, i: int) -> list[Tensor]:
        """Those of the i-th expert, to be read and written: gates, ups and downs."""
        return [*self.gate_up_proj[i].chunk(2), self.down_proj[i]]

    def part(self, first: int, last: int) -> PackedExperts:
        """A copy of experts first .. last - 1."""
        with torch.device("meta"):
            part = PackedExperts(last - first, *self.down_proj.shape[1:])
        for name, parameter in self.named_parameters():
            setattr(part, name, nn.Parameter(parameter.detach()[first:last].clone()))
        return part

    def __len__(self) -> int:
        return len(self.down_proj)

    def extra_repr(self) -> str:
        n, d, h = self.down_proj.shape
        return f"{n} SwiGLUs, {d} -> {h} -> {d}"


class ListedExperts(nn.ModuleList):
    """Any modules from (m, d) to (m, d_out), or mixers, which see every row as a sequence of its
    own."""

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Of mixers; other modules stay as they are."""
        for expert in self:
            if isinstance(expert, Mixer):
                expert.reset_parameters(n_layers, generator)

    def forward(self, x: Tensor, to: Assignments, engine: str = "auto") -> Tensor:
        """(n, d) to (n, d_out); engine as in `MoE`.

        Raises:
            ShapeError: an expert does not take or give such rows.
        """
        how = dispatch.dispatch_rule(x, None, engine)
        return dispatch.mix(x, to, [self.caller(i) for i in range(len(self))], how)

    def caller(self, i: int) -> Callable[[Tensor], Tensor]:
        """The i-th expert as a function of rows."""
        expert = self[i]

        def call(rows: Tensor) -> Tensor:
            if isinstance(expert, Mixer):
                inner = (part for part in expert.modules() if isinstance(part, Mixer))
                some = rows
                if not len(rows) and any(part.ops for part in inner):  # no recurrence takes none
                    some = rows.new_zeros(1, rows.shape[1])
                return expert(some[:, None]).y[: len(rows), 0]
            out = expert(rows)
            if not isinstance(out, Tensor) or out.shape[:-1] != rows.shape[:-1]:
                given = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
                raise ShapeError(
                    f"experts[{i}]: {type(expert).__name__} made {given} of {tuple(rows.shape)}; "
                    "an expert maps (m, d) to a tensor (m, d_out)"
                )
            return out

        return call

    def tensors(self, i: int) -> list[Tensor]:
        """Those of the i-th expert, to be read and written."""
        return list(self[i].parameters())

    def part(self, first: int, last: int) -> ListedExperts:
        """Experts first .. last - 1."""
        return ListedExperts(list(self)[first:last])


class MoE(Mixer):
    """See `MoESpec`. Its state is the empty tuple.

    engine: of packed experts, on top of the rule in ops/experts.py.
    """

    matrices = ("experts.gate_up_proj", "experts.down_proj")
    fan_in = {"gate.weight": -1}  # noqa: RUF012 (read-only by contract)
    ops = (MIX_SORTED,)

    def __init__(self, spec: MoESpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Router(spec.router, spec.choice(layer.d_model))
        width = spec.packed_width(layer.d_model)
        self.experts: PackedExperts | ListedExperts = (
            ListedExperts(expert.build(layer) for expert in spec.expert_specs(layer.d_model))
            if width is None
            else PackedExperts(spec.n_experts, layer.d_model, width)
        )
        shared = spec.shared_spec()
        self.shared_expert = None if shared is None else shared.build(layer)
        self.shared_expert_gate: nn.Linear | None = None
        if spec.shared_gate:
            self.shared_expert_gate = nn.Linear(layer.d_model, 1, bias=False)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.gate.reset_parameters(generator)
        self.experts.reset_parameters(n_layers, generator)
        if self.shared_expert is not None:
            self.shared_expert.reset_parameters(n_layers, generator)
        if self.shared_expert_gate is not None:
            init.linear_(self.shared_expert_gate, generator)

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        if not isinstance(self.experts, PackedExperts):
            return {}
        return {"experts.gate_up_proj": (self.experts.gate_up_proj.shape[1] // 2,) * 2}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[()]:
        return ()

    def parallel(self, x: Tensor, state: tuple[()] | None, call: Call) -> MixerOut:
        """Padding gets no expert and does not enter the losses."""
        (b, t), real, spec = x.shape[:2], call.real, self.spec
        routing = self.gate(x, real, call.starts)
        to = routing.to
        if self.training and spec.capacity_factor:
            n, factor = self.gate.choice.n_experts, spec.capacity_factor
            to = ops.drop_over_capacity(to, (b, t), n, factor, call.starts)
        rows = x.flatten(0, 1)
        y = self.experts(rows, to, self.engine)
        if spec.n_identity:
            y = y + self._identities(rows, to).to(y.dtype)
        y = y.unflatten(0, (b, t))
        if self.shared_expert is not None:
            extra = self.shared_expert(x).y
            if self.shared_expert_gate is not None:
                extra = extra * torch.sigmoid(self.shared_expert_gate(x))
            y = y + extra
        return MixerOut(y, (), self._losses(routing, b, t, real) if self.training else {})

    def recurrent(self, x: Tensor, state: tuple[()], call: Call) -> MixerOut:
        if not self.spec.causal:
            raise SpecError(
                f"router: {self.spec.router.kind!r} compares all tokens of a sequence and cannot "
                'run one token at a time; use "top_k" in a model that steps or generates'
            )
        return super().recurrent(x, state, call)

    def _identities(self, x: Tensor, to: Assignments) -> Tensor:
        """What the experts that return their input make of (n, d)."""
        weight = torch.where(to.expert >= self.spec.n_experts + self.spec.n_null, to.weight, 0)
        return x * weight.new_zeros(len(x)).index_add(0, to.token, weight)[:, None]

    def _losses(
        self, routing: Routing, batch: int, length: int, real: Tensor | None
    ) -> dict[str, Tensor]:
        """The balance losses with a weight, already weighted, by name."""
        spec, probs, logits = self.spec, routing.probs, routing.logits
        if logits is None:
            return {}
        counts = ops.count_jobs(routing.to, length, batch, probs.shape[-1])
        jobs = counts.to(probs.dtype)
        if spec.cost_aware:
            jobs = jobs * probs.new_tensor(spec.relative_costs(self.gate.choice))
        n_jobs = counts.sum(-1, keepdim=True)
        losses: dict[str, Tensor] = {}
        if spec.balance_weight:
            load = jobs.sum(0) / n_jobs.sum().clamp(min=1)
            losses["balance"] = ops.switch_loss(load, ops.mean_over(probs, real))
        if spec.sequence_weight:
            each = ops.switch_loss(jobs / n_jobs.clamp(min=1), ops.mean_over(probs, real, (1,)))
            rows = None if real is None else real.any(1, keepdim=True)
            losses["sequence"] = ops.mean_over(each[:, None], rows)
        if spec.importance_weight:
            to, n = routing.to, probs.shape[-1]
            amounts = to.weight.new_zeros(n + 1).index_add(0, to.expert % (n + 1), to.weight)
            losses["importance"] = ops.cv_squared(amounts[:-1])
        if spec.load_weight and routing.load is not None:
            losses["load"] = ops.cv_squared(ops.mean_over(routing.load, real))
        if spec.z_loss_weight:
            losses["z_loss"] = ops.mean_over(ops.z_loss(logits), real)
        return {f"moe_{n}": getattr(spec, f"{n}_weight") * loss for n, loss in losses.items()}


def _pack(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Replace the matrices of single SwiGLUs, as version 0.1 named them, by those of all."""
    parts: list[list[Tensor]] = []
    while all(f"{prefix}{len(parts)}.{part}.weight" in state for part in PARTS):
        parts.append([state.pop(f"{prefix}{len(parts)}.{part}.weight") for part in PARTS])
    if parts:
        gates, ups, downs = (torch.stack(part) for part in zip(*parts, strict=True))
        state[f"{prefix}gate_up_proj"] = torch.cat([gates, ups], dim=1)
        state[f"{prefix}down_proj"] = downs
