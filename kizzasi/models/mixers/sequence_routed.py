"""Every document chooses a few of several mixers, which then make its output together.

    p = softmax(W_g s / temperature),   s the document's first token, or the mean of its tokens
    y = sum over the top_k largest p_i of p_i y_i                       ties: the one listed first
    loss = balance_weight n sum_i f_i P_i,   f_i share of all choices, P_i mean of p_i, by document

The choice holds for the whole document, so a mixer's memory of it has no holes, and a mixer runs
only on those rows of the batch in which a document chose it: top_k of n mixers' work, where
`routed`, which chooses for every token, must run them all. A mixer that no row chose does not run;
its parameters then get a gradient of zero.

While a graph is traced (torch.compile, torch.export) every mixer runs on all rows: only there do no
shapes depend on who chose whom. The results are the same.

Symbols: b batch, t time, d d_model, n mixers, k = top_k.
Source: Kudugunta et al. 2021, arXiv:2110.03742, section 3, where a task's or a sentence's tokens
share their experts. Loss and weights: Fedus et al. 2021, arXiv:2101.03961, section 2.
Differs: the experts are whole sequence mixers, and the gate reads a token, or the mean, as it comes
to this layer: what sets documents apart must stand first (a task's tag), or be read on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, linear
from kizzasi.models.mixer import (
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    add_losses,
    state_dtype,
)
from kizzasi.models.norm import WideLinear
from kizzasi.models.ops.devices import eager
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.parts.branches import Branches, settle_alone
from kizzasi.models.parts.gating import balance_loss, check_gate, choose
from kizzasi.models.state import map_state, named_leaves
from kizzasi.strict import join, register


@register
@dataclass(frozen=True)
class SequenceRoutedSpec(MixerSpec):
    """A router of documents to mixers.

    Args:
        mixers: the experts, of any kinds. Each stands alone: it takes nothing from other layers and
            offers nothing to them (an RWKV-7 is always a first one, without v0, v1 and v2).
        top_k: how many make a document's output.
        summary: what the gate reads: "first", the first token, so that the model streams; or
            "mean", the mean over the document, which is not causal.
        temperature: divides the router's logits; low ones make choices sharp.
        balance_weight: of the loss that evens out the choices.
    """

    kind: ClassVar[str] = "sequence_routed"
    mixers: tuple[MixerSpec, ...]
    top_k: int = 1
    summary: Literal["first", "mean"] = "first"
    temperature: float = 1.0
    balance_weight: float = 0.01

    def check(self, d_model: int, path: str) -> None:
        check_gate(self, len(self.mixers), path)
        for i, mixer in enumerate(self.mixers):
            mixer.check(d_model, join(path, f"mixers[{i}]"))

    def build(self, layer: LayerContext) -> Mixer:
        return SequenceRouted(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        """See `Cost`. flops and active_params suppose perfect balance and one document per row:
        exact if top_k is n, or if the mixers are equal and their work grows with the rows alone.
        state_bytes counts all mixers; a cache of tokens stays empty where no row chose it."""
        n, k = len(self.mixers), self.top_k
        total, fixed = Cost(), 0
        for mixer in self.mixers:
            total += mixer.cost(layer, seq_len, batch)
            fixed += mixer.cost(layer, seq_len, 0).flops  # a mixer's own, such as of a filter
        working = min(n, batch * k)
        experts = Cost(
            total.params,
            total.active_params * k // n,
            fixed * working // n + (total.flops - fixed) * k // n,
            total.state_bytes + 4 * batch * n if self.causal else 0,
        )
        return experts + linear(batch, layer.d_model, n)

    def settle(self, offered: bool, path: str = "") -> tuple[MixerSpec, bool]:
        return replace(self, mixers=settle_alone(self.mixers, path)), offered

    @property
    def causal(self) -> bool:
        return self.summary == "first" and all(mixer.causal for mixer in self.mixers)


def firsts(x: Tensor, starts: Tensor) -> Tensor:
    """(b, t, d): for every token of x the first one of its document; starts (b, t)."""
    time = torch.arange(x.shape[1], device=x.device)
    first = torch.where(starts, time, 0).cummax(1).values
    return x.gather(1, first[..., None].expand_as(x))


def document_means(x: Tensor, starts: Tensor) -> Tensor:
    """(b, t, d) in at least float32: for every token of x the mean of its document."""
    b, t, d = x.shape
    row = torch.arange(b, device=x.device)[:, None]
    document = (starts.cumsum(1) + (t + 1) * row).flatten()
    tokens = full_precision(x).flatten(0, 1)
    sums = tokens.new_zeros(b * (t + 1), d).index_add(0, document, tokens)
    length = tokens.new_zeros(b * (t + 1), 1)
    length = length.index_add(0, document, torch.ones_like(tokens[:, :1]))
    return (sums[document] / length[document]).unflatten(0, (b, t))


class SequenceRoutedState(NamedTuple):
    """weights: (b, n) of the open document, 0 where not chosen; all 0 before its first token.
    mixers: their states, of which a row's parts mean nothing where its weight is 0."""

    weights: Tensor
    mixers: tuple[Any, ...]


class Rows(NamedTuple):
    """The rows of a batch that a mixer runs on.

    batch   b.
    chosen  (m,) int64 those rows; None means all.
    valid   (b,) bool if the results of other rows, which ran only for the shape, are to be dropped.
    """

    batch: int
    chosen: Tensor | None
    valid: Tensor | None = None

    def take(self, whole: Tensor) -> Tensor:
        """(b, ...) to (m, ...)."""
        return whole if self.chosen is None else whole.index_select(0, self.chosen)

    def put(self, part: Tensor) -> Tensor:
        """(m, ...) to (b, ...), zero in the rows left out."""
        if self.valid is not None:
            valid = self.valid.view(-1, *[1] * (part.ndim - 1))
            return torch.where(valid, part, torch.zeros_like(part))
        if self.chosen is None:
            return part
        return part.new_zeros(self.batch, *part.shape[1:]).index_copy(0, self.chosen, part)


class SequenceRouted(Mixer):
    """See `SequenceRoutedSpec`. Without a causal spec its state is the empty tuple."""

    float32_parameters = ("gate.weight",)

    def __init__(self, spec: SequenceRoutedSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        self.gate = WideLinear(layer.d_model, len(spec.mixers), bias=False)
        self.mixers = Branches(spec.mixers, layer)

    def parallel(
        self, x: Tensor, state: SequenceRoutedState | tuple[()] | None, call: Call
    ) -> MixerOut:
        before = state or None
        weights, loss = self._weigh(x, before and before.weights, call)
        busy = (weights != 0).any(1)
        if call.real is not None:  # a row without a token leaves every memory as padding does
            busy = busy | ~call.real.any(1, keepdim=True)
        out = self._mix(x, weights, busy, before, call)
        return out._replace(aux=add_losses(out.aux, loss))

    def recurrent(self, x: Tensor, state: SequenceRoutedState, call: Call) -> MixerOut:
        if not self.spec.causal:
            raise SpecError(
                "sequence_routed: a document's choice, or a mixer's result, depends on later "
                'tokens, so there is no step; use summary "first" and causal mixers in a model '
                "that steps or generates"
            )
        weights, loss = self._weigh(x[:, None], state.weights, call)
        weights = weights[:, 0]
        out = self._mix(x, weights, weights != 0, state, call)
        return out._replace(aux=add_losses(out.aux, loss))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SequenceRoutedState | tuple[()]:
        if not self.spec.causal:
            return ()
        n = len(self.spec.mixers)
        weights = torch.zeros(batch, n, device=device, dtype=state_dtype(dtype))
        return SequenceRoutedState(weights, self.mixers.init_state(batch, device, dtype))

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        init.linear_(self.gate, generator)
        self.mixers.reset_parameters(n_layers, generator)

    def extra_repr(self) -> str:
        return f"top_k={self.spec.top_k}, summary={self.spec.summary}"

    def _weigh(
        self, x: Tensor, carried: Tensor | None, call: Call
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Weights (b, t or 1, n) of every token's mixers, 0 where not chosen or at padding, and the
        loss over the documents that begin here. `carried` (b, n) are those of the open ones."""
        starts, real = call.starts, call.real
        if starts is None or real is None:
            mean = self.spec.summary == "mean"
            seen = full_precision(x).mean(1, keepdim=True) if mean else x[:, :1]
            opening = torch.ones_like(seen[..., 0], dtype=torch.bool)
            continuing, real = opening, opening
        else:
            seen = document_means(x, starts) if self.spec.summary == "mean" else firsts(x, starts)
            opening = torch.cat([real[:, :1], starts[:, 1:] & real[:, 1:]], 1)
            continuing = starts.cumsum(1) == 0
        probs, chosen = choose(self.spec, self.gate, seen)
        weights = probs * (chosen & real[..., None])
        if carried is not None:
            continuing = continuing & (carried != 0).any(1, keepdim=True)
            weights = torch.where(continuing[..., None], carried[:, None], weights)
            opening = opening & ~continuing
        loss = balance_loss(self.spec, probs, chosen, opening) if self.training else {}
        return weights, loss

    def _mix(
        self,
        x: Tensor,
        weights: Tensor,
        busy: Tensor,
        state: SequenceRoutedState | None,
        call: Call,
    ) -> MixerOut:
        """Weighted sum of what the mixers make of the rows where they are `busy` (b, n).

        x (b, t, d) and weights (b, t or 1, n), both without t in a step.
        """
        y = torch.zeros_like(full_precision(x))
        states: list[Any] = []
        aux: Mapping[str, Tensor] = {}
        for i, (mixer, rows) in enumerate(zip(self.mixers.mixers, self._rows(busy), strict=True)):
            before = None if state is None else state.mixers[i]
            if rows is None:
                y = y + _nothing(mixer, before, x.device)
                states.append(mixer.init_state(len(x), x.device, x.dtype))
                continue
            memory = None if before is None else map_state(rows.take, before)
            within = call.alone() if rows.chosen is None else call.rows(rows.chosen)
            out = mixer(rows.take(x), memory, call=within)
            y = torch.addcmul(y, rows.put(out.y), weights[..., i, None])
            states.append(map_state(rows.put, out.state))
            aux = add_losses(aux, out.aux)
        last = weights if call.step else weights[:, -1]
        after = SequenceRoutedState(last, tuple(states)) if self.spec.causal else ()
        return MixerOut(y.to(x.dtype), after, aux)

    def _rows(self, busy: Tensor) -> list[Rows | None]:
        """The rows of each mixer, None if there are none."""
        b, n = busy.shape
        if not eager():
            # A row that did not choose a mixer runs as the first that did: their states are alike.
            each, first = torch.arange(b, device=busy.device), busy.int().argmax(0)
            here = busy.unbind(1)
            return [Rows(b, torch.where(h, each, f), h) for h, f in zip(here, first, strict=True)]
        if busy.is_meta:  # nothing to choose by: rows and mixers in turns, as `cost` supposes
            k = self.spec.top_k
            lengths = [sum((i - row * k) % n < k for row in range(b)) for i in range(n)]
            index = [torch.empty(m, dtype=torch.int64, device="meta") for m in lengths]
        else:
            index = [one.nonzero()[:, 0].to(busy.device) for one in busy.cpu().unbind(1)]
        whole = [None if len(one) == b else one for one in index]
        return [Rows(b, w) if len(one) else None for one, w in zip(index, whole, strict=True)]


def _nothing(mixer: Mixer, state: Any, device: torch.device) -> Tensor | int:
    """0, with a gradient of zero to every parameter and to the state, for who waits for one."""
    leaves = [leaf for _, leaf in named_leaves(() if state is None else state)]
    here = [leaf for leaf in (*mixer.parameters(), *leaves) if leaf.device == device]
    waiting = [leaf for leaf in here if leaf.requires_grad]
    return sum(leaf.flatten()[:0].abs().sum() for leaf in waiting)
