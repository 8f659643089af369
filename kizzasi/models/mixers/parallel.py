"""Several mixers side by side on the same tokens, and one output made of theirs.

    sum       y = sum_i y_i                         (Hymba's and Falcon-H1's heads work so)
    weighted  y = sum_i softmax(mix_logits)_i y_i
    concat    y = W_out [y_1, ..., y_n]

Symbols: b batch, t time, d d_model, n mixers.
Source: Dong et al. 2024 (Hymba), arXiv:2411.13676, section 2.1.
Differs: the mixers are whole, each with its own projections, and outputs are not normalised first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.parts.branches import Branches, BranchesOut, settle_all
from kizzasi.models.parts.turns import Taps, common
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class ParallelSpec(MixerSpec):
    """Mixers side by side.

    Args:
        mixers: at least one, of any kinds. An RWKV-7 among them shares v_first with those in other
            layers as if it stood alone.
        combine: "sum"; "weighted", with learned weights that start equal and sum to 1; or "concat",
            with a linear map back to d_model.
    """

    kind: ClassVar[str] = "parallel"
    mixers: tuple[MixerSpec, ...]
    combine: Literal["sum", "weighted", "concat"] = "sum"

    def check(self, d_model: int, path: str) -> None:
        require(len(self.mixers) > 0, join(path, "mixers"), "empty; give at least one mixer")
        for i, mixer in enumerate(self.mixers):
            mixer.check(d_model, join(path, f"mixers[{i}]"))

    def build(self, layer: LayerContext) -> Mixer:
        return Parallel(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n = layer.d_model, len(self.mixers)
        total = Cost()
        if self.combine == "weighted":
            total += dense(n)
        elif self.combine == "concat":
            total += linear(batch * seq_len, n * d, d)
        for mixer in self.mixers:
            total += mixer.cost(layer, seq_len, batch)
        return total

    @property
    def context_window(self) -> float:
        return max(mixer.context_window for mixer in self.mixers)

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


class Parallel(Mixer):
    """See `ParallelSpec`. Its state is the tuple of theirs."""

    float32_parameters = ("mix_logits",)

    def __init__(self, spec: ParallelSpec, layer: LayerContext) -> None:
        super().__init__()
        d, n = layer.d_model, len(spec.mixers)
        self.mixers = Branches(spec.mixers, layer)
        self.mix_logits = nn.Parameter(torch.empty(n)) if spec.combine == "weighted" else None
        self.out_proj = nn.Linear(n * d, d, bias=False) if spec.combine == "concat" else None

    def parallel(self, x: Tensor, state: tuple[Any, ...] | None, call: Call) -> MixerOut:
        return self._combine(self.mixers(x, state, call))

    def recurrent(self, x: Tensor, state: tuple[Any, ...], call: Call) -> MixerOut:
        return self._combine(self.mixers(x, state, call))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        return self.mixers.init_state(batch, device, dtype)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.mixers.reset_parameters(n_layers, generator)
        if self.mix_logits is not None:
            nn.init.zeros_(self.mix_logits)
        if self.out_proj is not None:
            init.linear_(self.out_proj, generator)

    def _combine(self, out: BranchesOut) -> MixerOut:
        if self.out_proj is not None:
            y = self.out_proj(torch.cat(out.ys, -1))
        elif self.mix_logits is not None:
            y = (
                (torch.stack(out.ys, -1) * full_precision(self.mix_logits).softmax(0))
                .sum(-1)
                .to(out.ys[0].dtype)
            )
        else:
            y = torch.stack(out.ys).sum(0)
        return MixerOut(y, out.state, out.aux, out.shared)
