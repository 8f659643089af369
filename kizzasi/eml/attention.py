"""EML attention proper: any length, heads, masks; every projection ends in EML operators.

    b, t, s, d   batch, queries, keys, d_model
    h, r         heads, head_dim
    z            scores, (b, h, t, s)
    chain        per output channel and level: c0, c1, c2 of v <- eml_soft(v c0 + c1, v + c2)
    slot         one remembered key and value; document -1 marks a dead slot

Queries and keys are normalised per head and start out equal, so that a position attends first to
itself; the projections are shared by all positions, so the layer is equivariant under permutation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.eml.operator import eml_chain, soft_node
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.mixer import (
    NO_DECAY,
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    state_dtype,
)
from kizzasi.models.ops.attention import shielded
from kizzasi.strict import join, register, require

# With these, v <- eml_soft(v c0 + c1, v + c2) maps 0 to 0 with slope 1 and curvature 0.4.
_NEUTRAL = (0.5, 0.89451042, 9.85156299)
_GAIN = 0.3
_NORM_EPS = 1e-6


def _set_neutral(chain: Tensor) -> None:
    with torch.no_grad():
        chain.copy_(chain.new_tensor(_NEUTRAL).expand_as(chain))


class EmlProjection(nn.Module):
    """An affine map followed by a chain of EML operators per output: (..., n_in) to (..., n_out).

    It starts as the affine map to first order: the chain maps 0 to 0 with slope 1.
    """

    param_rules: ClassVar = {"chain": NO_DECAY}

    def __init__(self, n_in: int, n_out: int, depth: int) -> None:
        super().__init__()
        self.affine = nn.Linear(n_in, n_out)
        self.chain = nn.Parameter(torch.empty(n_out, depth, 3))

    def reset_parameters(self, generator: torch.Generator | None, scale: float = 1.0) -> None:
        """Draw an orthogonal matrix, small enough for the chain to be nearly linear at first.

        Random square matrices have tiny singular values, through which a search would have to
        amplify the chain's curvature; orthogonal ones have none.
        """
        nn.init.orthogonal_(self.affine.weight, _GAIN * scale, generator=generator)
        nn.init.zeros_(self.affine.bias)
        _set_neutral(self.chain)

    def forward(self, x: Tensor) -> Tensor:
        return eml_chain(self.affine(x), self.chain, soft_node)


@register
@dataclass(frozen=True)
class EmlAttentionSpec(MixerSpec):
    """EML attention.

    Args:
        n_heads: heads.
        head_dim: width of a head; None means d_model / n_heads.
        depth: EML operators per projection; 0 leaves the affine twin.
        softmax: "numerical", or "trained": scores pass a chain of EML operators per head first.
        causal: whether a position sees only itself and what came before.
        temperature: initial factor on the cosine of query and key.
    """

    kind: ClassVar[str] = "eml_attention"
    n_heads: int = 1
    head_dim: int | None = None
    depth: int = 3
    softmax: Literal["numerical", "trained"] = "numerical"
    causal: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]
    temperature: float = 10.0

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "temperature")
        if self.head_dim is not None:
            self.require_positive(path, "head_dim")
        require(self.depth >= 0, join(path, "depth"), f"{self.depth} is below 0; 3 is usual")
        require(
            self.head_dim is not None or d_model % self.n_heads == 0,
            join(path, "n_heads"),
            f"d_model {d_model} is not divisible by {self.n_heads} heads; "
            "give a divisor of d_model, or head_dim",
        )

    def build(self, layer: LayerContext) -> EmlAttention:
        return EmlAttention(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n, d_v = layer.d_model, batch * seq_len, self.n_heads * self.width(layer.d_model)
        total = dense(
            self.n_heads + 3 * self.depth * (3 * d_v + d),
            flops=2 * (2 * n * seq_len * d_v),  # q k^T and weights v, hidden keys included
            state_bytes=batch * seq_len * (2 * d_v * 4 + 8),  # float32 pairs, int64 documents
        )
        if self.softmax == "trained":
            total += dense(3 * self.depth * self.n_heads)
        for n_in, n_out in ((d, d_v), (d, d_v), (d, d_v), (d_v, d)):
            total += linear(n, n_in, n_out, bias=True)
        return total

    def width(self, d_model: int) -> int:
        """Entries of one head."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim


class EmlAttentionState(NamedTuple):
    """The cache.

    k, v       (b, h, s, r), keys after the norm.
    document   (b, s) int64, 0 for a slot that may be seen, -1 for a dead one.
    """

    k: Tensor
    v: Tensor
    document: Tensor

    def n_alive(self) -> int:
        """The live slots of the row that has most; see `kizzasi.models.state.Cache`."""
        return int((self.document == 0).sum(1).max()) if self.document.numel() else 0

    def packed(self, slots: int) -> EmlAttentionState:
        """The same rows with so many slots, dead ones last."""
        order = self.document.argsort(dim=1, descending=True, stable=True)
        index = order[:, None, :, None].expand_as(self.k)
        spare = slots - self.k.shape[2]  # below 0: slots that are dead in every row
        k, v = (F.pad(leaf.gather(2, index), (0, 0, 0, spare)) for leaf in (self.k, self.v))
        document = F.pad(self.document.gather(1, order), (0, spare), value=-1)
        return EmlAttentionState(k, v, document)


class EmlAttention(Mixer):
    """Multi-head attention of an `EmlAttentionSpec`.

        q, k, v = split(eml(W_q x)), split(eml(W_k x)), split(eml(W_v x))
        z = temperature cos(q, k);    y = eml(W_o concat(softmax(z) v))

    where eml is a chain of soft EML operators, different for every channel.

    Differs: eml-core projects the flattened sequence, has one head and no masks, divides scores by
        sqrt(d_k), and clamps hard at 20.
    """

    float32_parameters = ("log_temperature",)
    param_rules: ClassVar = {"log_temperature": NO_DECAY, "score_chain": NO_DECAY}

    def __init__(self, spec: EmlAttentionSpec, layer: LayerContext) -> None:
        super().__init__()
        d, self.spec, self.head_dim = layer.d_model, spec, spec.width(layer.d_model)
        d_v = spec.n_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            EmlProjection(d, d_v, spec.depth) for _ in range(3)
        )
        self.o_proj = EmlProjection(d_v, d, spec.depth)
        self.log_temperature = nn.Parameter(torch.empty(spec.n_heads))
        trained = spec.softmax == "trained"
        self.score_chain = (
            nn.Parameter(torch.empty(spec.n_heads, spec.depth, 3)) if trained else None
        )

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        for projection in (self.q_proj, self.v_proj):
            projection.reset_parameters(generator)
        self.k_proj.load_state_dict(self.q_proj.state_dict())
        self.o_proj.reset_parameters(generator, 1.0 / math.sqrt(2 * n_layers))
        nn.init.constant_(self.log_temperature, math.log(self.spec.temperature))
        if self.score_chain is not None:
            _set_neutral(self.score_chain)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> EmlAttentionState:
        cache = torch.zeros(batch, self.spec.n_heads, 0, self.head_dim, device=device, dtype=dtype)
        return EmlAttentionState(
            cache, cache, torch.zeros(batch, 0, dtype=torch.int64, device=device)
        )

    def parallel(self, x: Tensor, state: EmlAttentionState | None, call: Call) -> MixerOut:
        b = len(x)
        if state is None:
            state = self.init_state(b, x.device, x.dtype)
        document = call.places(state.document.new_zeros(b))[0]
        q, k, v = self._project(x)
        k = torch.cat([state.k.to(k.dtype), k], dim=2)
        v = torch.cat([state.v.to(v.dtype), v], dim=2)
        key_document = torch.cat([state.document, document], dim=1)
        visible = key_document[:, None] == document[:, :, None]
        if self.spec.causal:
            slots = state.document.shape[1]
            visible = visible & torch.ones_like(visible[0]).tril(slots)
        visible = visible[:, None]
        if call.starts is None or call.real is None:
            y = self._heads(q, k, v, visible)
        else:
            y = shielded(self._heads, q, k, v, visible)
        y = self.o_proj(y.transpose(1, 2).flatten(-2))
        alive = key_document == document[:, -1:]
        if call.real is not None:
            alive = alive & call.real[:, -1:]
            k, v = (slots.masked_fill(~alive[:, None, :, None], 0.0) for slots in (k, v))
        return MixerOut(y, EmlAttentionState(k, v, torch.where(alive, 0, -1)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, h, t, r); the first two of length 1."""
        heads = (self.spec.n_heads, self.head_dim)
        q, k, v = (
            projection(x).unflatten(-1, heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return F.normalize(q, dim=-1, eps=_NORM_EPS), F.normalize(k, dim=-1, eps=_NORM_EPS), v

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = (q @ k.mT).to(state_dtype(q.dtype))
        scores = scores * self.log_temperature.to(scores.dtype).exp()[:, None, None]
        if self.score_chain is not None:
            scores = eml_chain(scores, self.score_chain[:, None, None], soft_node)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        return weights.to(v.dtype) @ v
