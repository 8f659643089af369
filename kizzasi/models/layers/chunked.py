"""A stack that sees one token for every chunk, and learns where chunks begin (H-Net).

    e_t    the stream; what stands before the layer in a model is the encoder, what follows the
           decoder
    p_t    how much token t differs from the one before it
    b_t    whether a chunk begins at t
    z      what the body makes of the tokens where chunks begin, one after the other
    h_t    a mean of z over the chunks so far, sharp where p was near 1
    N      rate: tokens to a chunk that the loss asks for

    p_t = (1 - cos(W_q e_{t-1}, W_k e_t)) / 2,    p = 1 at a document's first token
    b_t = p_t > 1/2
    h_t = P_t z_t + (1 - P_t) h_{t-1}  if b_t,  else h_{t-1},    P = p within [1e-4, 1 - 1e-4]
    c_t = p_t if b_t else 1 - p_t
    y_t = h_t (c_t + stop(1 - c_t)) + W_r e_t
    loss = weight N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)),    F = mean b,  G = mean p

W_q and W_k begin as the identity, W_r as zero. The loss is `weight` where one token in N begins a
chunk. Chunks nest: another such layer may stand in the body.

Source: Hwang et al. 2025, arXiv:2507.07955, sections 2.2 and 2.3.
Differs: the body has the width of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, linear
from kizzasi.models.layers.layer import LayerModule, LayerSpec, cost_of, depth_of
from kizzasi.models.layers.ragged import each_length
from kizzasi.models.layers.stack import Stack
from kizzasi.models.mixer import LayerContext, MixerOut, add_losses, state_dtype
from kizzasi.models.norm import WideLinear
from kizzasi.models.ops.decay_scan import DECAY_SCAN, decay_scan_step
from kizzasi.models.ops.precision import full_precision
from kizzasi.strict import join, register, require

SHARPEST = 1e-4


@register
@dataclass(frozen=True)
class ChunkedSpec(LayerSpec):
    """Layers that see one token for every chunk.

    Args:
        body: the layers; they share nothing with layers outside.
        rate: tokens to a chunk that the loss asks for, above 1.
        weight: of the loss.
    """

    kind: ClassVar[str] = "chunked"
    body: tuple[LayerSpec, ...]
    rate: float = 6.0
    weight: float = 0.03

    def check(self, d_model: int, path: str) -> None:
        super().check(d_model, path)
        require(self.rate > 1, join(path, "rate"), f"{self.rate} leaves nothing out; give above 1")
        rule = f"{self.weight} is not positive; without it no rate is learnt"
        require(self.weight > 0, join(path, "weight"), rule)
        rule = "has a part that reads later tokens, which stand for others at a lower rate"
        require(self.causal, join(path, "body"), rule)

    def settle(self, offered: bool, path: str = "") -> tuple[ChunkedSpec, bool]:
        """The body stands alone: what others offer is of all tokens."""
        return super().settle(False, path)[0], offered

    def build(self, context: LayerContext, eps: float, dropout: float) -> Chunked:
        return Chunked(self, context, eps, dropout)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        """As if chunks had the length that is asked for: where they begin is learnt."""
        d, n_inner = context.d_model, max(1, round(seq_len / self.rate))
        total = cost_of(self.body, context, n_inner, batch)
        for _ in range(3):
            total += linear(seq_len * batch, d, d)
        return total + Cost(state_bytes=batch * (8 + 2 * 4 * d))

    @property
    def depth(self) -> int:
        return depth_of(self.body)

    @property
    def fixed_work(self) -> bool:
        return False


class ChunkedState(NamedTuple):
    """position  (b,) int64, place of the next token in its document.
    last      (b, d) the document's last token.
    mean      (b, d) h of it, in at least float32.
    body      a state per layer."""

    position: Tensor
    last: Tensor
    mean: Tensor
    body: tuple[Any, ...]


class Chunked(LayerModule):
    """See `ChunkedSpec`. In a step the body runs for the rows in which a chunk begins."""

    ops = (DECAY_SCAN,)

    def __init__(
        self, spec: ChunkedSpec, context: LayerContext, eps: float, dropout: float
    ) -> None:
        super().__init__()
        d = context.d_model
        self.spec, self.d_model = spec, d
        self.body = Stack.of(spec.body, context, eps, dropout)
        self.q_proj, self.k_proj, self.residual_proj = (
            WideLinear(d, d, bias=False) for _ in range(3)
        )

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.body.reset_parameters(n_layers, generator)
        for part in (self.q_proj, self.k_proj):
            nn.init.eye_(part.weight)
        nn.init.zeros_(self.residual_proj.weight)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ChunkedState:
        position = torch.zeros(batch, dtype=torch.int64, device=device)
        last, mean = (
            torch.zeros(batch, self.d_model, device=device, dtype=kind)
            for kind in (dtype, state_dtype(dtype))
        )
        return ChunkedState(position, last, mean, self.body.init_state(batch, device, dtype))

    def recurrent(self, x: Tensor, state: ChunkedState, call: Call) -> MixerOut:
        out = self.parallel(x[:, None], state, call)
        return out._replace(y=out.y[:, 0])

    def parallel(self, x: Tensor, state: ChunkedState | None, call: Call) -> MixerOut:
        if torch.compiler.is_compiling() and x.shape[1] > 1:
            raise SpecError(
                "chunked: a graph cannot hold rows of unequally many chunks; compile the layers "
                "inside and outside it, or a step"
            )
        memory = None if state is None else state.body
        before = self.init_state(len(x), x.device, x.dtype) if state is None else state
        real, (document, position) = call.real, call.places(before.position)
        if real is not None:
            x = x.masked_fill(~real.unsqueeze(-1), 0.0)
        p = self._differences(x, before.last).masked_fill(position == 0, 1.0)
        due = p > 0.5 if real is None else (p > 0.5) & real

        def inner(index: Tensor, rows: Tensor | None) -> tuple[Tensor, Call]:
            tokens, ids = (v if rows is None else v.index_select(0, rows) for v in (x, document))
            z = tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            segments = None if call.segments is None else ids.gather(1, index)
            return z, Call(z.shape[:2], x.device, segments=segments, step=call.step)  # pyright: ignore[reportArgumentType]

        z, body, aux = each_length(self.body, x, due, inner, memory)
        h = self._means(self._spread(z, due), p, due, before.mean, call)
        c = torch.where(due, p, 1 - p).unsqueeze(-1)
        y = h * (c + (1 - c).detach()) + self.residual_proj(x)
        if not call.step:
            aux = add_losses(aux, {"chunked": self._loss(p, due, real)})
        after, last = position[:, -1] + 1, x[:, -1]
        if real is not None:
            after = after.masked_fill(~real[:, -1], 0)
        return MixerOut(y.to(x.dtype), ChunkedState(after, last, h[:, -1], body), aux)

    def _differences(self, x: Tensor, last: Tensor) -> Tensor:
        """(b, t) p, in at least float32."""
        earlier = torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)
        q, k = self.q_proj(earlier), self.k_proj(x)
        return ((1 - F.cosine_similarity(q, k, dim=-1)) / 2).clamp(0.0, 1.0)

    def _spread(self, z: Tensor, due: Tensor) -> Tensor:
        """(b, t, d): what comes out of the body where chunks begin, zeros elsewhere."""
        z = F.pad(z, (0, 0, 1, 0))
        index = torch.where(due, due.cumsum(1), 0)
        return z.gather(1, index.unsqueeze(-1).expand(-1, -1, self.d_model))

    def _means(self, z: Tensor, p: Tensor, due: Tensor, before: Tensor, call: Call) -> Tensor:
        """(b, t, d) h, in at least float32."""
        share = torch.where(due, p.clamp(SHARPEST, 1 - SHARPEST), 0.0).unsqueeze(-1)
        u = share * full_precision(z)
        if call.step:
            return decay_scan_step(before, 1 - share[:, 0], u[:, 0])[:, None]
        scan = DECAY_SCAN.pick(self.engine, z.device)
        return scan(torch.log1p(-share).expand_as(u), u, before, call.starts)[0]

    def _loss(self, p: Tensor, due: Tensor, real: Tensor | None) -> Tensor:
        n = self.spec.rate
        real = torch.ones_like(due) if real is None else real
        count = real.sum().clamp(min=1)
        begun, wanted = due.sum() / count, torch.where(real, p, 0.0).sum() / count
        loss = (n - 1) * begun * wanted + (1 - begun) * (1 - wanted)
        return self.spec.weight * n / (n - 1) * loss
