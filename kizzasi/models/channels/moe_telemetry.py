"""What the routers of a model did, counted while you look: `with watch_routing(model) as usage:`.

Symbols: e choices of a layer (experts, null and identity experts), f_i share of jobs of choice i.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.errors import DataError
from kizzasi.models.channels.moe import MoE, Report
from kizzasi.models.ops.routing import entropy


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


class _Tally:
    """Sums over the forwards of one layer."""

    def __init__(self) -> None:
        self.counts, self.wanted, self.square, self.n_logits = torch.zeros(1), 0, 0.0, 0

    @torch.no_grad()
    def add(self, report: Report) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a recomputation under activation checkpointing: counted already
        self.counts = self.counts + report.counts.sum(0).cpu()
        self.wanted += report.wanted
        logits = report.routing.logits
        if logits is not None:
            logits = logits if report.real is None else logits[report.real]
            self.square += float(logits.double().square().sum())
            self.n_logits += logits.numel()

    def usage(self) -> LayerUsage:
        counts = self.counts.long()
        total = int(counts.sum())
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

    def __init__(self, names: list[str]) -> None:
        self.tallies = {name: _Tally() for name in names}

    def __getitem__(self, name: str) -> LayerUsage:
        return self.tallies[name].usage()

    def layers(self) -> dict[str, LayerUsage]:
        """All layers, first to last."""
        return {name: tally.usage() for name, tally in self.tallies.items()}

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

        figure = Figure(figsize=(7, 1 + 0.9 * len(self.tallies)), layout="constrained")
        axes = figure.subplots(len(self.tallies), squeeze=False)[:, 0]
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
    usage = RoutingUsage(list(layers))
    stops = [layer.listen(usage.tallies[name].add) for name, layer in layers.items()]
    try:
        yield usage
    finally:
        for stop in stops:
            stop()


@torch.no_grad()
def revive_dead_experts(
    model: nn.Module, usage: RoutingUsage, *, noise: float = 0.1, seed: int = 0
) -> dict[str, list[int]]:
    """Turn every expert that had no job into a noisy copy of the busiest one of its layer.

    Its row of the router's weight is copied too, with the same relative noise, so that the two
    share the work of the one. Optimiser state of the overwritten parameters should be dropped.

    Args:
        model: as watched.
        usage: what `watch_routing` saw.
        noise: deviation, as a share of each tensor's root mean square.
        seed: of the noise.

    Returns:
        The indices of the revived experts by layer; layers without any are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    revived: dict[str, list[int]] = {}
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, MoE)):
        counts = usage[name].counts[: layer.spec.n_experts]
        dead, busiest = (counts == 0).nonzero()[:, 0].tolist(), int(counts.argmax())
        if not dead or not counts.any():
            continue
        revived[name] = dead
        for i in dead:
            targets, sources = layer.experts[i].parameters(), layer.experts[busiest].parameters()
            for target, source in zip(targets, sources, strict=True):
                target.copy_(_shake(source, noise, generator))
            weight = getattr(layer.gate, "weight", None)
            if weight is not None:
                weight[i] = _shake(weight[busiest], noise, generator)
    return revived


def _shake(source: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    random = torch.randn(source.shape, generator=generator).to(source)
    return source + noise * source.square().mean().sqrt() * random
