"""A stack that runs several times on shared weights: recurrent depth.

    e      the stream that enters, the output of the layers before (the prelude)
    s_i    the stream after i iterates
    r      how many iterates

    s_0     = noise, or e for the adapter "identity"
    s_{i+1} = body(adapter(s_i, e)),    i = 0 ... r - 1
    y       = norm(s_r)

    identity       s                 Dehghani et al. 2018, arXiv:1807.03819 (Universal Transformer)
    residual       s + e
    concat_linear  W [s, e]          Geiping et al. 2025, arXiv:2502.05171 (Huginn)

The layers after it are the coda. Parameters exist once; work is done r times. Every iterate of
every layer has a state of its own; or all read the keys and values of the first (Bae et al. 2025,
arXiv:2507.10524). A token's later iterates then leave nothing that others
read, so that each token may stop by itself when it changes no more.

Differs: noise is a function of seed, position and channel, where Huginn draws it anew; caches that
iterates share as a ring, as Huginn's may, make a step another function than a call, and are not
here.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models import init
from kizzasi.models.adaptive import Adaptive
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, linear, norm
from kizzasi.models.layers.layer import LayerModule, LayerSpec, cost_of, depth_of, window_of
from kizzasi.models.layers.stack import Stack
from kizzasi.models.mixer import LayerContext, MixerOut, MixerSpec, add_losses
from kizzasi.models.norm import Norm, NormKind
from kizzasi.models.ops.devices import answers
from kizzasi.models.ops.noise import noise_of
from kizzasi.strict import added, join, register, require


@register
@dataclass(frozen=True)
class LoopSpec(LayerSpec):
    """A body that runs n_loops times on the same weights.

    Args:
        body: the layers of one iterate.
        n_loops: iterates; the most, with a tolerance.
        n_train: n, iterates in training, or what their mean follows if they are drawn; None means
            n_loops.
        schedule: of training: "fixed", n iterates, or "poisson_lognormal": 1 + Poisson(u), u
            lognormal of mean n, drawn anew for every call from torch's generator.
        sigma: of log u.
        min_loops, max_loops: bounds of what is drawn; None means none.
        curriculum: n grows from 1 to its full value: "linear", 1 + (n - 1) s / w after s of w
            optimiser steps (`model.after_step()`), "sqrt", with the root of s / w; "none", it does
            not. Rounded where the schedule is fixed.
        warmup_steps: w.
        adapter: what an iterate reads of s and e; see above.
        noise_std: of s_0 (added to e for the adapter "identity"), cut at three deviations.
        seed: of the noise.
        n_backprop: in training only the last so many iterates have gradients; None means all.
        keys: whose keys and values an iterate reads: those of "each" are its own, or all read the
            "first"'s, for a body of attention alone, whose cache is then that of one iterate.
        tolerance: in evaluation a token stops when |s_{i+1} - s_i| <= tolerance |s_{i+1}|, and
            n_loops is the most; for keys of the first. 0 lets none stop.
        norm: kind of the norm after the last iterate; None means none.
    """

    kind: ClassVar[str] = "loop"
    body: tuple[LayerSpec, ...]
    n_loops: int
    adapter: Literal["identity", "residual", "concat_linear"] = "identity"
    schedule: Literal["fixed", "poisson_lognormal"] = "fixed"
    sigma: float = 0.5
    max_loops: int | None = None
    noise_std: float = 0.0
    seed: int = 0
    n_backprop: int | None = None
    norm: NormKind | None = None
    keys: Literal["each", "first"] = "each"
    tolerance: float = 0.0
    n_train: int | None = added(None)
    min_loops: int = added(1)
    curriculum: Literal["none", "linear", "sqrt"] = added("none")
    warmup_steps: int = added(0)

    def check(self, d_model: int, path: str) -> None:
        super().check(d_model, path)
        self.require_positive(path, "n_loops", "min_loops")
        for name in ("max_loops", "n_backprop", "n_train"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)
        for name in ("sigma", "noise_std", "tolerance"):
            value = getattr(self, name)
            require(value >= 0, join(path, name), f"{value} is negative; give 0 or more")
        self._check_training(path)
        through = self.adapter != "identity" or self.n_backprop is None
        rule = "the layers before would have no gradient; give an adapter that reads them again"
        require(through, join(path, "n_backprop"), rule)
        rule = "a token stops where its later iterates leave no keys; set keys to 'first'"
        require(self.keys == "first" or not self.tolerance, join(path, "tolerance"), rule)
        if self.keys == "first":
            self._check_first(d_model, path)

    def _check_training(self, path: str) -> None:
        drawn = self.schedule != "fixed"
        rule = "the number of iterates is fixed; leave it out, or give another schedule"
        require(drawn or self.max_loops is None, join(path, "max_loops"), rule)
        require(drawn or self.min_loops == 1, join(path, "min_loops"), rule)
        rule = f"{self.min_loops} is more than max_loops {self.max_loops}; give less"
        require(self.min_loops <= (self.max_loops or math.inf), join(path, "min_loops"), rule)
        grows = self.curriculum != "none"
        rule = f"{self.warmup_steps} is not positive; say over how many steps iterates grow"
        require(self.warmup_steps > 0 or not grows, join(path, "warmup_steps"), rule)
        rule = "there is no curriculum; leave it out, or give 'linear' or 'sqrt'"
        require(self.warmup_steps == 0 or grows, join(path, "warmup_steps"), rule)
        rule = "a single iterate cannot grow; leave it out"
        require(self.trained > 1 or not grows, join(path, "curriculum"), rule)

    def _check_first(self, d_model: int, path: str) -> None:
        rule = "the first iterate's keys would have no gradient; leave one of the two out"
        require(self.n_backprop is None, join(path, "n_backprop"), rule)
        for i, layer in enumerate(self.body):
            where = f"{join(path, 'body')}[{i}]"
            rule = "has no keys and values of its own that iterates could read"
            lends = layer.lends(d_model) is not None and not layer.sources
            require(lends, where, f"{rule}; set keys to 'each'")
            for name, part in layer.parts(where):
                rule = "remembers more than keys and values; set keys to 'each'"
                plain = isinstance(part, MixerSpec) or part.context_window == 1
                require(plain, name, rule)

    def build(self, context: LayerContext, eps: float, dropout: float) -> Loop:
        return Loop(self, context, eps, dropout)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n = context.d_model, self.n_loops
        once = cost_of(self.body, context, seq_len, batch)
        again = once
        if self.keys == "first":
            again = cost_of(tuple(b.reading(0) for b in self.body), context, seq_len, batch)
        again = Cost(flops=again.flops, state_bytes=again.state_bytes)
        total = once + Cost(flops=(n - 1) * again.flops, state_bytes=(n - 1) * again.state_bytes)
        if self.adapter == "concat_linear":
            adapter = linear(seq_len * batch, 2 * d, d)
            total += adapter._replace(flops=n * adapter.flops)
        total += Cost(state_bytes=8 * batch if self.noise_std else 0)
        return total if self.norm is None else total + norm(self.norm, d)

    @property
    def trained(self) -> int:
        """n of the end of training."""
        return self.n_loops if self.n_train is None else self.n_train

    def in_training(self) -> LoopSpec:
        """With as many iterates as training runs on average, bounds and curriculum aside."""
        n = self.trained + (self.schedule != "fixed")
        return replace(super().in_training(), n_loops=n)

    @property
    def depth(self) -> int:
        return self.n_loops * depth_of(self.body)

    @property
    def context_window(self) -> float:
        return window_of(self.body, self.n_loops)


class LoopState(NamedTuple):
    """iterates  for each, or for the first if all read its keys, a state per layer of the body.
    position  (b,) int64, place of the next token in its document, where noise asks; else ()."""

    iterates: tuple[tuple[Any, ...], ...]
    position: Tensor | tuple[()]


class Loop(LayerModule, Adaptive):
    """See `LoopSpec`.

    In training with drawn iterates, one that a state has not seen goes on from the last that it
    has; what a call leaves out keeps the state of the last that ran.
    """

    def __init__(self, spec: LoopSpec, context: LayerContext, eps: float, dropout: float) -> None:
        super().__init__()
        d = context.d_model
        self.spec = spec
        self.n_kept = spec.n_loops if spec.keys == "each" else 1
        place = replace(context, lends=spec.keys == "first")
        self.body = Stack.of(spec.body, place, eps, dropout)
        linear = spec.adapter == "concat_linear"
        self.adapter = nn.Linear(2 * d, d, bias=False) if linear else None
        self.norm = None if spec.norm is None else Norm(spec.norm, d, eps)
        grows = spec.curriculum != "none"
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64) if grows else None)

    steps: Tensor | None

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.body.reset_parameters(n_layers, generator)
        if self.adapter is not None:
            init.linear_(self.adapter, generator)
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.steps is not None:
            self.steps.zero_()

    def take(self) -> Tensor | None:
        return torch.zeros(1) if self.steps is not None and self.training else None

    def after_step(self, counted: Tensor) -> None:
        assert self.steps is not None, "asked"
        self.steps += 1

    def parallel(self, x: Tensor, state: LoopState | None, call: Call) -> MixerOut:
        s, position = self._start(x, state, call)
        r, before = self._n_loops(), None if state is None else state.iterates
        blind = 0 if self.spec.n_backprop is None or not self.training else r - self.spec.n_backprop
        iterates: list[tuple[Any, ...]] = []
        out, first, live = MixerOut(s, ()), None, None
        for i in range(r):
            memory = None if before is None else before[min(i, len(before) - 1)]
            memory, lent = (memory, None) if first is None else (first.state, first.lent)
            with torch.no_grad() if i < blind else nullcontext():
                ran = self.body(self._adapt(out.y, x), memory, call, borrowed=lent)
            s, live = self._stop(out.y, ran.x, live)
            aux = add_losses(out.aux, {name: loss / r for name, loss in ran.aux.items()})
            out = MixerOut(s, (), aux, ran.shared)
            iterates.append(ran.state)
            first = ran if self.spec.keys == "first" and first is None else first
            if live is not None and answers(live) and not live.any():
                break
        iterates += [iterates[-1]] * (self.n_kept - len(iterates))
        after = LoopState(tuple(iterates[: self.n_kept]), position)
        y = out.y if self.norm is None else self.norm(out.y)
        return out._replace(y=y, state=after)

    def _stop(self, s: Tensor, new: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The stream after an iterate, and which tokens go on; None for all."""
        if self.training or not self.spec.tolerance:
            return new, None
        new = new if live is None else torch.where(live.unsqueeze(-1), new, s)
        moved, size = ((z.detach() ** 2).sum(-1) for z in (new - s, new))
        return new, moved > self.spec.tolerance**2 * size

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LoopState:
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        one = tuple(self.body.init_state(batch, device, dtype) for _ in range(self.n_kept))
        return LoopState(one, zeros if self.spec.noise_std else ())

    def _start(
        self, x: Tensor, state: LoopState | None, call: Call
    ) -> tuple[Tensor, Tensor | tuple[()]]:
        """s_0, and the position of the next token."""
        s = x if self.spec.adapter == "identity" else torch.zeros_like(x)
        if not self.spec.noise_std:
            return s, ()
        start = x.new_zeros(len(x), dtype=torch.int64)
        if state is not None:
            assert isinstance(state.position, Tensor), "of a loop with noise"
            start = state.position
        position = call.places(start)[1]
        noise = self.spec.noise_std * noise_of(self.spec.seed, position, x.shape[-1]).to(x)
        if call.real is not None:
            position = position.masked_fill(~call.real, -1)
        return s + (noise[:, 0] if call.step else noise), position[:, -1] + 1

    def _n_loops(self) -> int:
        spec = self.spec
        if not self.training:
            return spec.n_loops
        drawn = spec.schedule != "fixed"
        if torch.compiler.is_compiling() and (drawn or self.steps is not None):
            raise SpecError(
                "loop: a graph cannot hold a number of iterates that is drawn for every call, or "
                "grows; compile what is inside the loop, or train with schedule 'fixed' and no "
                "curriculum"
            )
        n = self._mean()
        if not drawn:
            return round(n)
        log_mean = math.log(n) - spec.sigma**2 / 2
        u = torch.empty(1).log_normal_(log_mean, spec.sigma) if spec.sigma else n
        r = 1 + int(torch.poisson(torch.as_tensor(u, dtype=torch.float32).reshape(1)))
        r = max(r, spec.min_loops)
        return r if spec.max_loops is None else min(r, spec.max_loops)

    def _mean(self) -> float:
        """n as far as it has grown."""
        n = self.spec.trained
        if self.steps is None:
            return n
        share = min(1.0, int(self.steps) / self.spec.warmup_steps)
        return 1 + (n - 1) * (share if self.spec.curriculum == "linear" else math.sqrt(share))

    def _adapt(self, s: Tensor, e: Tensor) -> Tensor:
        if self.adapter is not None:
            return self.adapter(torch.cat([s, e], -1))
        return s if self.spec.adapter == "identity" else s + e
