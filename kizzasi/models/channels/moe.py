"""Mixture of experts: a router sends every token to a few of many channel mixers.

    y[t] = sum over the chosen i of w_i(x[t]) expert_i(x[t])  (+ shared expert, + identity experts)

Dropless unless told otherwise. Balance losses are returned in `aux`, in training only, so that the
loss of an evaluated model is its loss on the data.

Experts are a list of modules with plain Linear layers, `experts.3.up_proj.weight`, not stacked
tensors: published checkpoints (Qwen3-MoE, OLMoE) name them so, adapters (LoRA) and quantisers find
Linear layers to wrap, matrix optimisers see matrices, and no indexing of a stacked parameter fills
a gradient of all experts with zeros once per expert.

Symbols: b batch, t time, d d_model, e experts, k = top_k; f_i, P_i as in ops/routing.py.
Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.channels import moe_parallel
from kizzasi.models.channels.moe_router import Choice, Router, RouterSpec, Routing
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.cost import Cost
from kizzasi.models.mixer import ChannelSpec, LayerContext, Mixer, MixerOut
from kizzasi.models.ops import experts as dispatch
from kizzasi.models.ops import routing as ops
from kizzasi.models.ops.experts import SwiGLUWeights
from kizzasi.models.ops.routing import Assignments, Normalize
from kizzasi.models.strict import join, register, require

LOSSES = ("balance", "sequence", "importance", "load", "z_loss")
PASSES_WITHOUT_AUX = 32
PROJECTIONS = tuple(f"{name}_proj" for name in SwiGLUWeights._fields)


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
        shared_gate: multiply the shared expert by sigmoid(w x), as in Qwen2-MoE.
        jitter: in training, the router's input is multiplied by U(1 - jitter, 1 + jitter).
        expert_dropout: in training, chance that an expert cannot be chosen by a token.
        capacity_factor: in training, an expert serves at most ceil(factor k t / e) jobs of a row,
            and the rest are dropped; 0 drops nothing.
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
        require(not self.shared_gate or self.shared_hidden > 0, join(path, "shared_gate"), rule)
        self._check_experts(d_model, path)

    def _check_experts(self, d_model: int, path: str) -> None:
        if not self.experts:
            return
        n, rule = len(self.experts), "give it to each of `experts` and leave it out here"
        require(self.hidden is None, join(path, "hidden"), rule)
        rule = f"{self.n_experts}, but `experts` lists {n}; make them equal"
        require(n == self.n_experts, join(path, "n_experts"), rule)
        for i, expert in enumerate(self.experts):
            where = join(path, f"experts[{i}]")
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
        active = sum(p.params for p in parts) * self.top_k // choice.n_experts
        gate = self.router.n_params(choice)
        total = Cost(
            gate + sum(p.params for p in parts),
            gate + active,
            self.router.flops(choice, n) + work,
        )
        if self.shared_hidden:
            total += self.shared_spec().cost(layer, seq_len, batch)
        if self.shared_gate:
            total += Cost(layer.d_model, layer.d_model, 2 * n * layer.d_model)
        return total

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

    def relative_costs(self, choice: Choice) -> list[float]:
        """Parameters of every choice, divided by their mean."""
        layer, n = LayerContext(choice.d_model), choice.n_experts
        params = [e.cost(layer, 1, 1).params for e in self.expert_specs(choice.d_model)]
        return [p * n / sum(params) for p in params] + [0.0] * (n - len(params))

    def shared_spec(self) -> ChannelSpec:
        return ChannelSpec.registry["swiglu"](hidden=self.shared_hidden)


class Report(NamedTuple):
    """What a listener hears after every forward; see moe_telemetry.py.

    routing  the router's decisions, before jobs over capacity were dropped.
    counts   (b, e) jobs done, by row and choice.
    wanted   jobs there would be if none had been dropped.
    real     (b, t) bool, False for padding; None if there was none.
    """

    routing: Routing
    counts: Tensor
    wanted: int
    real: Tensor | None


class MoE(Mixer):
    """See `MoESpec`. Its state is the empty tuple.

    backend: "torch" follows the rule in ops/experts.py; "reference" is "masked".

    Args:
        experts: modules from (m, d) to (m, d_out) in place of those that the spec describes. They
            come initialised, and the spec's cost does not describe them.
    """

    backends = ("torch", "reference", "masked", "sorted", "grouped", "padded", "dense")

    def __init__(
        self, spec: MoESpec, layer: LayerContext, experts: Sequence[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.gate: Router = spec.router.build(spec.choice(layer.d_model))
        specs = spec.expert_specs(layer.d_model)
        self.experts = nn.ModuleList(experts or [expert.build(layer) for expert in specs])
        self.shared_expert = spec.shared_spec().build(layer) if spec.shared_hidden else None
        self.shared_expert_gate: nn.Linear | None = None
        if spec.shared_gate:
            self.shared_expert_gate = nn.Linear(layer.d_model, 1, bias=False)
        self._listeners: list[Callable[[Report], None]] = []
        built_swiglus = experts is None and all(expert.kind == "swiglu" for expert in specs)
        self._swiglu = type(self.experts[0]) if built_swiglus else None
        self._group: dist.ProcessGroup | None = None
        self._passes = 0
        self._aux_used = False

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.gate.reset_parameters(generator)
        for expert in (*self.experts, self.shared_expert):
            if isinstance(expert, Mixer):
                expert.reset_parameters(n_layers, generator)
        if self.shared_expert_gate is not None:
            init.linear_(self.shared_expert_gate, generator)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[()]:
        return ()

    def parallel(self, x: Tensor, state: tuple[()] | None, call: Call) -> MixerOut:
        """Padding gets no expert and does not enter the losses."""
        (b, t), real, spec, n_choices = (
            x.shape[:2],
            call.real,
            self.spec,
            self.gate.choice.n_experts,
        )
        routing = self.gate(x, real)
        to = routing.to
        if self.training and spec.capacity_factor:
            to = ops.drop_over_capacity(to, t, n_choices, spec.capacity_factor)
        y = self._mix(x.flatten(0, 1), to).unflatten(0, (b, t))
        if self.shared_expert is not None:
            extra = self.shared_expert(x).y
            if self.shared_expert_gate is not None:
                extra = extra * torch.sigmoid(self.shared_expert_gate(x))
            y = y + extra
        if not (self._listeners or self.training):
            return MixerOut(y, ())
        counts = ops.count_jobs(routing.to, t, b, n_choices)
        for hear in self._listeners:
            done = ops.count_jobs(to, t, b, n_choices)
            hear(Report(routing, done, int(counts.sum()), real))
        if not self.training:
            return MixerOut(y, ())
        aux = self._losses(routing, counts, real)
        self._watch_aux(y, aux)
        return MixerOut(y, (), aux)

    def recurrent(self, x: Tensor, state: tuple[()], call: Call) -> MixerOut:
        if not self.spec.causal:
            raise SpecError(
                f"router: {self.spec.router.kind!r} compares all tokens of a sequence and cannot "
                'run one token at a time; use "top_k" in a model that steps or generates'
            )
        return super().recurrent(x, state, call)

    def listen(self, hear: Callable[[Report], None]) -> Callable[[], None]:
        """Have `hear` called after every forward; returns what ends it."""
        self._listeners.append(hear)
        return partial(self._listeners.remove, hear)

    def share_experts(self, group: dist.ProcessGroup) -> None:
        """Keep this process's share of the experts only; see moe_parallel.py. For good."""
        self.experts = moe_parallel.share_of(self.experts, group)
        self._group = group

    def _mix(self, x: Tensor, to: Assignments) -> Tensor:
        if self._group is None:
            y = self._run(x, to)
        else:
            n = self.spec.n_experts
            y = moe_parallel.mix_over_processes(x, to, n, self._group, self._run)
        if self.spec.n_identity:
            first = self.spec.n_experts + self.spec.n_null
            weight = torch.where(to.expert >= first, to.weight, 0)
            share = weight.new_zeros(len(x)).index_add(0, to.token, weight)
            y = y + (x * share[:, None]).to(y.dtype)
        return y

    def _run(self, x: Tensor, to: Assignments) -> Tensor:
        decoding = len(x) == 1 and x.is_cpu and not torch.is_grad_enabled()
        if decoding and self.backend == "torch" and not torch.compiler.is_compiling():
            return dispatch.mix_one(x, to, [partial(_call, one) for one in self.experts])
        weights = self._swiglu_weights()
        backend = "masked" if self.backend == "reference" else self.backend
        if backend == "torch":
            backend = dispatch.choose_backend(x.device, x.dtype, weights is not None)
        if weights is None:
            return dispatch.mix(x, to, [partial(_call, one) for one in self.experts], backend)
        return dispatch.mix_swiglu(x, to, weights, backend)

    def _swiglu_weights(self) -> SwiGLUWeights | None:
        """The matrices, if all experts are SwiGLUs of one width whose Linear layers have no bias
        and no hooks: a layer of another type, an adapter's say, must be called, not read."""
        layers: list[list[nn.Linear]] = []
        for expert in self.experts:
            if type(expert) is not self._swiglu or not _plain(expert):
                return None
            layers.append([getattr(expert, name) for name in PROJECTIONS])
            if not all(type(p) is nn.Linear and p.bias is None and _plain(p) for p in layers[-1]):
                return None
        weights = SwiGLUWeights(*([p.weight for p in part] for part in zip(*layers, strict=True)))
        return weights if len({w.shape for w in weights.gate}) == 1 else None

    def _losses(self, routing: Routing, counts: Tensor, real: Tensor | None) -> dict[str, Tensor]:
        """The balance losses with a weight, already weighted, by name."""
        spec, probs, logits = self.spec, routing.probs, routing.logits
        if logits is None:
            return {}
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

    def _watch_aux(self, y: Tensor, aux: Mapping[str, Tensor]) -> None:
        """Warn once if gradients keep coming through y and never through aux."""
        if self._aux_used or not aux or not y.requires_grad or torch.compiler.is_compiling():
            return  # a traced graph has no memory from one pass to the next
        for loss in aux.values():
            if loss.requires_grad:
                loss.register_hook(self._use_aux)
        y.register_hook(self._count_pass)

    def _use_aux(self, grad: Tensor) -> None:
        self._aux_used = True

    def _count_pass(self, grad: Tensor) -> None:
        self._passes += 1
        if self._passes == PASSES_WITHOUT_AUX and not self._aux_used:
            self._aux_used = True
            warnings.warn(
                f"a mixture's balance losses were computed {PASSES_WITHOUT_AUX} times and never "
                "trained on; add sum(output.aux.values()) to the loss, as ModelOutput.loss does, "
                "or set their weights to 0",
                stacklevel=2,
            )


def _call(expert: nn.Module, rows: Tensor) -> Tensor:
    return expert(rows[None]).y[0] if isinstance(expert, Mixer) else expert(rows)


def _plain(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return not (forward or module._backward_hooks or module._backward_pre_hooks)
