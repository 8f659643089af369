"""Every token chooses a few of several mixers, which then make its output together.

    p = softmax(W_g x / temperature)
    y = sum over the top_k largest p_i of p_i y_i                       ties: the one listed first
    loss = balance_weight n sum_i f_i P_i,   f_i share of all choices, P_i mean of p_i

What is saved depends on the mixer. A sequence mixer must see every token, chosen or not, or its
memory of the sequence would have holes: it runs densely, and only its output is weighted. Channel
mixers without memory run on the tokens that chose them and on no others. `sequence_routed` chooses
once per document, and runs the chosen mixers alone.

Symbols: b batch, t time, d d_model, n experts (mixers, then channels), k = top_k.
Source: Shazeer et al. 2017, arXiv:1701.06538, section 2; the loss and the weights, which keep a
gradient at k = 1: Fedus et al. 2021, arXiv:2101.03961, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, linear
from kizzasi.models.mixer import ChannelSpec, LayerContext, Mixer, MixerOut, MixerSpec, add_losses
from kizzasi.models.norm import WideLinear
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.parts.branches import Branches, BranchesOut, settle_all
from kizzasi.models.parts.gating import balance_loss, check_gate, choose
from kizzasi.models.parts.turns import Taps, common
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class RoutedSpec(MixerSpec):
    """A router over mixers.

    Args:
        mixers: sequence mixers; all run on every token.
        channels: further choices, which run on the tokens that chose them only: stateless channels.
        top_k: how many make a token's output.
        temperature: divides the router's logits; low ones make choices sharp.
        balance_weight: of the loss that evens out the choices.
    """

    kind: ClassVar[str] = "routed"
    mixers: tuple[MixerSpec, ...]
    channels: tuple[ChannelSpec, ...] = ()
    top_k: int = 1
    temperature: float = 1.0
    balance_weight: float = 0.01

    def check(self, d_model: int, path: str) -> None:
        check_gate(self, len(self.experts), path)
        for i, mixer in enumerate(self.mixers):
            mixer.check(d_model, join(path, f"mixers[{i}]"))
        for i, channel in enumerate(self.channels):
            where = join(path, f"channels[{i}]")
            rule = f"{channel.kind!r} looks at several tokens; choose a stateless channel, no moe"
            require(channel.context_window == 1 and channel.kind != "moe", where, rule)
            channel.check(d_model, where)

    def build(self, layer: LayerContext) -> Mixer:
        return Routed(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        """See `Cost`. For the channels flops and active_params suppose perfect balance; they are
        exact where all experts are equal channels."""
        tokens, n, k = batch * seq_len, len(self.experts), self.top_k
        total = linear(tokens, layer.d_model, n)
        for mixer in self.mixers:
            total += mixer.cost(layer, seq_len, batch)
        each = [channel.cost(layer, 1, 1) for channel in self.channels]
        return total + Cost(
            sum(one.params for one in each),
            sum(one.active_params for one in each) * k // n,
            sum(one.flops for one in each) * tokens * k // n,
        )

    @property
    def experts(self) -> tuple[MixerSpec | ChannelSpec, ...]:
        return (*self.mixers, *self.channels)

    @property
    def sparse(self) -> tuple[bool, ...]:
        """For each expert whether it runs only on the tokens that chose it."""
        return (False,) * len(self.mixers) + (True,) * len(self.channels)

    @property
    def context_window(self) -> float:
        return max(expert.context_window for expert in self.experts)

    @property
    def causal(self) -> bool:
        return all(mixer.causal for mixer in self.mixers)

    def taps(self, d_model: int) -> Taps:
        """Of those of its mixers that have some: what they have in common."""
        each = [taps for mixer in self.mixers if (taps := mixer.taps(d_model))]
        return common(each) if each else {}

    def settle(self, offered: bool, path: str = "") -> tuple[MixerSpec, bool]:
        mixers, offered = settle_all(self.mixers, offered, path)
        return replace(self, mixers=mixers), offered


class Routed(Mixer):
    """See `RoutedSpec`. Its state is the tuple of the mixers' states."""

    float32_parameters = ("gate.weight",)

    def __init__(self, spec: RoutedSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        self.gate = WideLinear(layer.d_model, len(spec.experts), bias=False)
        self.mixers = Branches(spec.mixers, layer)
        self.channels = nn.ModuleList(channel.build(layer) for channel in spec.channels)

    def parallel(self, x: Tensor, state: tuple[Any, ...] | None, call: Call) -> MixerOut:
        return self._combine(x, self.mixers(x, state, call), call.real)

    def recurrent(self, x: Tensor, state: tuple[Any, ...], call: Call) -> MixerOut:
        out = self.mixers(x, state, call)
        out = self._combine(x[:, None], out._replace(ys=[y[:, None] for y in out.ys]), None)
        return out._replace(y=out.y[:, 0])

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        return self.mixers.init_state(batch, device, dtype)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        init.linear_(self.gate, generator)
        self.mixers.reset_parameters(n_layers, generator)
        for channel in self.channels:
            channel.reset_parameters(n_layers, generator)  # pyright: ignore[reportCallIssue]

    def extra_repr(self) -> str:
        kinds = [expert.kind for expert in self.spec.experts]
        n = len(self.spec.mixers)
        return f"top_k={self.spec.top_k}, every token: {kinds[:n]}, chosen tokens: {kinds[n:]}"

    def _combine(self, x: Tensor, out: BranchesOut, real: Tensor | None) -> MixerOut:
        """Weighted sum of the outputs (b, t, d), and the loss over tokens where `real`."""
        probs, chosen = choose(self.spec, self.gate, x)
        weights = probs * chosen
        y = torch.zeros_like(full_precision(x))
        for i, one in enumerate(out.ys):
            y = torch.addcmul(y, one, weights[..., i, None])
        for i, channel in enumerate(self.channels, len(out.ys)):
            here = chosen[..., i] if real is None else chosen[..., i] & real
            done = channel(x[here][None]).y[0] * weights[here][:, i, None]
            y = y.index_put(here.nonzero(as_tuple=True), done.to(y.dtype), accumulate=True)
        aux = out.aux
        if self.training:
            aux = add_losses(aux, balance_loss(self.spec, probs, chosen, real))
        return MixerOut(y.to(x.dtype), out.state, aux, out.shared)
