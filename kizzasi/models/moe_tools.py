"""Tools for models with mixtures of experts: watch, revive, balance, upcycle, share.

Symbols: e choices of a layer (experts, null and identity experts), f_i share of jobs of choice i;
p processes, m jobs of this process, m' jobs for its experts, d d_model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kizzasi.errors import DataError, SpecError
from kizzasi.models.adaptive import counts_here
from kizzasi.models.build import build_model
from kizzasi.models.channels.moe import ListedExperts, MoE, MoESpec, PackedExperts
from kizzasi.models.channels.moe_routers import Hash
from kizzasi.models.model import SequenceModel
from kizzasi.models.ops.experts import combine, sort_by_expert
from kizzasi.models.ops.routing import Assignments, count_jobs, entropy
from kizzasi.models.parts.router import Router, Routing


class LayerUsage(NamedTuple):
    """How one mixture was used.

    counts             (e,) int64 jobs done by each choice.
    entropy            -sum f log f, in nats; log e at balance.
    effective_experts  exp(entropy): e at balance, 1 at collapse.
    max_violation      max f / mean f - 1: 0 at balance, e - 1 at collapse (MaxVio).
    dead_fraction      share of choices without a single job.
    drop_rate          share of the wanted jobs that capacity dropped.
    logit_norm         root mean square of the router's logits; NaN for a router without.
    """

    counts: Tensor
    entropy: float
    effective_experts: float
    max_violation: float
    dead_fraction: float
    drop_rate: float
    logit_norm: float


class _Sums:
    """Sums over the forwards of one layer, by hooks on its gate and its experts."""

    def __init__(self, layer: MoE) -> None:
        self.n, self.wanted, self.square, self.n_logits = layer.gate.choice.n_experts, 0, 0.0, 0
        self.counts = torch.zeros(self.n, dtype=torch.int64)
        self.hooks = (
            layer.gate.register_forward_hook(self._see_wishes),
            layer.experts.register_forward_pre_hook(self._see_jobs),
        )

    @torch.no_grad()
    def _see_wishes(self, gate: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        if not counts_here():
            return
        self.wanted += int((routing.to.expert >= 0).sum())
        if routing.logits is not None:
            real = args[1] if len(args) > 1 else None
            logits = routing.logits if real is None else routing.logits[real]
            self.square += float(logits.double().square().sum())
            self.n_logits += logits.numel()

    @torch.no_grad()
    def _see_jobs(self, experts: nn.Module, args: tuple[Any, ...]) -> None:
        if counts_here():
            x, to, *_ = args
            self.counts += count_jobs(to, len(x), 1, self.n)[0].cpu()

    def usage(self) -> LayerUsage:
        counts, total = self.counts, int(self.counts.sum())
        shares = counts.double() / max(total, 1)
        nats = float(entropy(shares))
        return LayerUsage(
            counts,
            nats,
            math.exp(nats),
            float(shares.max() * len(shares)) - 1 if total else 0.0,
            float((counts == 0).double().mean()),
            1 - total / max(self.wanted, total, 1),
            math.sqrt(self.square / self.n_logits) if self.n_logits else math.nan,
        )


class RoutingUsage:
    """The usage of every mixture of a model, by its path in the model."""

    def __init__(self, layers: dict[str, MoE]) -> None:
        self.sums = {name: _Sums(layer) for name, layer in layers.items()}

    def __getitem__(self, name: str) -> LayerUsage:
        return self.sums[name].usage()

    def layers(self) -> dict[str, LayerUsage]:
        """All layers, first to last."""
        return {name: one.usage() for name, one in self.sums.items()}

    def table(self) -> str:
        """One line per layer."""
        lines = [f"{'layer':24} effective  max_violation  dead   dropped  logit_norm"]
        for name, one in self.layers().items():
            effective = f"{one.effective_experts:5.1f}/{len(one.counts):<4}"
            lines.append(
                f"{name:24} {effective}{one.max_violation:11.3f}"
                f"  {one.dead_fraction:8.1%} {one.drop_rate:8.1%} {one.logit_norm:9.3f}"
            )
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write an image: the share of jobs of every choice, a row per layer. Needs matplotlib."""
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

        figure = Figure(figsize=(7, 1 + 0.9 * len(self.sums)), layout="constrained")
        axes = figure.subplots(len(self.sums), squeeze=False)[:, 0]
        for axis, (name, one) in zip(axes, self.layers().items(), strict=True):
            shares = one.counts.double() / one.counts.sum().clamp(min=1)
            axis.bar(range(len(shares)), shares.tolist())
            axis.axhline(1 / len(shares), color="black", linewidth=0.8)
            axis.set_ylabel(name, rotation=0, ha="right", fontsize=7)
        axes[-1].set_xlabel("choice (share of jobs; line: balance)")
        figure.savefig(path)


@contextmanager
def watch_routing(model: nn.Module) -> Iterator[RoutingUsage]:
    """Count what every mixture in `model` does inside the with block, in training or evaluation.

    Raises:
        DataError: there is no mixture in the model.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
    if not layers:
        raise DataError(f"{type(model).__name__} has no mixture of experts to watch")
    usage = RoutingUsage(layers)
    try:
        yield usage
    finally:
        for sums in usage.sums.values():
            for hook in sums.hooks:
                hook.remove()


@torch.no_grad()
def revive_dead_experts(
    model: nn.Module, usage: RoutingUsage, *, noise: float = 0.1, seed: int = 0
) -> dict[str, list[int]]:
    """Turn every expert that had no job into a noisy copy of the busiest one of its form.

    Its row of the router's weight is copied too, with the same relative noise, so that the two
    share the work of the one. Optimiser state of the overwritten parameters should be dropped.

    Args:
        model: as watched.
        usage: what `watch_routing` saw.
        noise: deviation, as a share of each tensor's root mean square.
        seed: of the noise.

    Returns:
        The indices of the revived experts by layer; layers without any are left out. So are experts
        that share their tensors' shapes with none that had jobs: they stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    revived: dict[str, list[int]] = {}
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, MoE)):
        experts = layer.experts
        counts = usage[name].counts[: len(experts)].tolist()
        forms = [[t.shape for t in experts.tensors(i)] for i in range(len(experts))]
        for i in (i for i, count in enumerate(counts) if not count):
            alike = [j for j, form in enumerate(forms) if form == forms[i] and counts[j]]
            if not alike:
                continue
            busiest = max(alike, key=lambda j: counts[j])
            pairs = zip(experts.tensors(i), experts.tensors(busiest), strict=True)
            weight = getattr(layer.gate, "weight", None)
            routes = [] if weight is None else [(weight[i], weight[busiest])]
            for target, source in (*pairs, *routes):
                target.copy_(_perturb(source, noise, 0.0, generator))
            revived.setdefault(name, []).append(i)
    return revived


@torch.no_grad()
def balance_hashes(model: nn.Module, run: Callable[[], Any]) -> None:
    """Balance every hash router in a model by what reaches it while `run` calls the model.

    Deeper ones see what the balanced ones before them send on. Do it once, before training.

    Args:
        model: whose hash routers.
        run: calls the model on a sample of the data, as in `lambda: model(batch)`.
    """

    def look(router: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(router, Router)
        if isinstance(router.spec, Hash):
            router.spec.balance(router, *args[:2])

    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_pre_hook(look) for router in routers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


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
    blocks = list(dense.spec.plain_blocks)
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
    old, generator = dense.state_dict(), torch.Generator().manual_seed(seed)
    kept = old.keys() & model.state_dict().keys()
    model.load_state_dict({name: old[name] for name in kept}, strict=False)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            if blocks[i] != dense.spec.plain_blocks[i]:
                channel = dense.blocks[i].get_submodule("channel")
                _copy(channel, block.get_submodule("channel.experts"), noise, reinit, generator)
    return model.to(parameter.device).train(dense.training)


def _copy(
    channel: nn.Module,
    experts: nn.Module,
    noise: float,
    reinit: float,
    generator: torch.Generator,
) -> None:
    """Make every expert a perturbed copy of a channel."""
    assert isinstance(experts, (PackedExperts, ListedExperts))
    for i in range(len(experts)):
        if isinstance(experts, ListedExperts):
            experts[i].load_state_dict(channel.state_dict())
        for target, source in zip(experts.tensors(i), channel.parameters(), strict=True):
            target.copy_(_perturb(source.cpu(), noise, reinit, generator))


def _perturb(source: Tensor, noise: float, share: float, generator: torch.Generator) -> Tensor:
    scale = source.float().square().mean().sqrt()
    draw, fresh = (torch.randn(source.shape, generator=generator).to(source) for _ in range(2))
    if noise:
        source = source + noise * scale * draw
    if share:
        anew = torch.rand(source.shape, generator=generator).to(source.device) < share
        source = torch.where(anew, scale * fresh, source)
    return source


def share_experts(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Keep this process's share of the experts of every mixture only, for good.

    Call it in every process, then train as before. Each process routes its own tokens; rows are
    exchanged by all-to-all before and after the experts. A call of the model is collective: all
    processes of the group must make it, even one without jobs for another's experts.

    Raises:
        SpecError: the processes do not divide the experts of a mixture.
    """
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        layer.register_module("experts", SharedExperts(layer.experts, group))


class SharedExperts(nn.Module):
    """e / p consecutive experts of a mixture, and the way to the others. Gradients of an expert are
    summed over the tokens of all processes."""

    def __init__(self, experts: PackedExperts | ListedExperts, group: dist.ProcessGroup) -> None:
        super().__init__()
        n, world, rank = len(experts), dist.get_world_size(group), dist.get_rank(group)
        if n % world:
            raise SpecError(f"n_experts: {n} cannot be shared by {world} processes; use a multiple")
        self.n, self.group, share = n, group, n // world
        self.own = experts.part(rank * share, (rank + 1) * share)

    def forward(self, x: Tensor, to: Assignments, engine: str = "auto") -> Tensor:
        """(n, d) to (n, d), with experts numbered over all processes."""
        order, counts = sort_by_expert(to, self.n)
        world = dist.get_world_size(self.group)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        leave = counts.view(world, -1).sum(1).tolist()
        arrive = arriving.view(world, -1).sum(1).tolist()
        order = order[: sum(leave)]
        token = to.token[order]
        rows = _exchange(x[token], arrive, leave, self.group)
        local = torch.arange(len(counts) // world, device=x.device).repeat(world)
        here = Assignments(
            torch.arange(len(rows), device=x.device),
            local.repeat_interleave(arriving),
            torch.ones(len(rows), dtype=to.weight.dtype, device=x.device),
        )
        back = _exchange(self.own(rows, here, engine), leave, arrive, self.group)
        return combine(back, token, to.weight[order], x)


class _Exchange(torch.autograd.Function):
    """all_to_all_single whose gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arrive: list[int], leave: list[int], group: Any) -> Tensor:  # pyright: ignore
        ctx.back = leave, arrive, group
        out = x.new_empty(sum(arrive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), arrive, leave, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        return _exchange(grad, *ctx.back), None, None, None


def _exchange(x: Tensor, arrive: list[int], leave: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of all processes for this one; `arrive` and `leave` say how many of each."""
    return _Exchange.apply(x, arrive, leave, group)  # pyright: ignore
