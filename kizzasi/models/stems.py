"""Stems: how inputs enter the residual stream and how logits leave it.

Symbols: b batch, t time, d d_model, v vocab_size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kizzasi.errors import ShapeError
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, normal_
from kizzasi.models.ops.devices import answers
from kizzasi.models.ops.linear import LINEAR
from kizzasi.strict import Registered, added, join, register, require

EMBEDDING_STD = 0.02


class Stem(nn.Module, ABC):
    """Both ends of a model: `embed` and `head`.

    n_out: width of what `head` returns.
    max_positions: how many positions of a document `embed` knows; None if it reads none.
    """

    n_out: int
    max_positions: int | None = None
    roles: ClassVar[Mapping[str, Literal["embedding", "head"]]] = {}  # of parameters, by name

    @abstractmethod
    def check(self, inputs: Tensor, *, time: bool) -> None:
        """Raise ShapeError unless inputs fit; with `time` they have a time dimension."""

    @abstractmethod
    def embed(self, inputs: Tensor, position: Tensor) -> Tensor:
        """Inputs to (..., d). position: (...) int64, from 0 in every document, -1 at padding."""

    def placed(self, x: Tensor, position: Tensor) -> Tensor:
        """Embeddings (..., d) that were made elsewhere, with what `embed` adds for positions."""
        return x

    @abstractmethod
    def head(self, x: Tensor) -> Tensor:
        """(..., d) to logits (..., v), or to predicted frames (..., n_out)."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None: ...


class StemSpec(Registered):
    """Base of stem specs."""

    registry: ClassVar[dict[str, type]] = {}

    @abstractmethod
    def check(self, path: str, tie_head: bool) -> None:
        """Raise SpecError for every rule that the fields break."""

    @abstractmethod
    def build(self, d_model: int, tie_head: bool, head: bool = True) -> Stem:
        """The modules; without `head` there is no way out."""

    @abstractmethod
    def cost(self, d_model: int, tie_head: bool, n_tokens: int, head: bool = True) -> Cost:
        """What both ends cost for n_tokens inputs."""


@register
@dataclass(frozen=True)
class Tokens(StemSpec):
    """Integer ids in, logits over the same vocabulary out.

    Args:
        vocab_size: how many ids there are.
        max_positions: positions with a learned embedding, added to the token's (GPT-2): the longest
            document. None adds nothing; positions are then the mixers' concern.
        head_bias: add a learned number to every logit; a tied head has none.
    """

    kind: ClassVar[str] = "tokens"
    vocab_size: int
    max_positions: int | None = None
    head_bias: bool = added(False)

    def check(self, path: str, tie_head: bool) -> None:
        self.require_positive(path, "vocab_size")
        rule = "a tied head has no bias; set it, or tie_head, to false"
        require(not (self.head_bias and tie_head), join(path, "head_bias"), rule)
        if self.max_positions is not None:
            self.require_positive(path, "max_positions")

    def build(self, d_model: int, tie_head: bool, head: bool = True) -> Stem:
        return TokenStem(self, d_model, tie_head or not head)

    def cost(self, d_model: int, tie_head: bool, n_tokens: int, head: bool = True) -> Cost:
        positions = dense((self.max_positions or 0) * d_model)
        if not head:
            return positions + dense(self.vocab_size * d_model)
        table = dense(0 if tie_head else self.vocab_size * d_model)
        return positions + table + linear(n_tokens, d_model, self.vocab_size, bias=self.head_bias)


@register
@dataclass(frozen=True)
class Signal(StemSpec):
    """Frames of n_in real channels in, frames of n_out real channels out.

    Args:
        n_in: channels of a frame that comes in.
        n_out: channels of a frame that goes out.
    """

    kind: ClassVar[str] = "signal"
    n_in: int
    n_out: int

    def check(self, path: str, tie_head: bool) -> None:
        self.require_positive(path, "n_in", "n_out")
        require(not tie_head, "tie_head", "a signal stem has no embedding to tie; set it to false")

    def build(self, d_model: int, tie_head: bool, head: bool = True) -> Stem:
        return SignalStem(self.n_in, self.n_out if head else None, d_model)

    def cost(self, d_model: int, tie_head: bool, n_tokens: int, head: bool = True) -> Cost:
        enter = linear(n_tokens, self.n_in, d_model, bias=True)
        return enter if not head else enter + linear(n_tokens, d_model, self.n_out, bias=True)


class TokenStem(Stem):
    engine: str = "auto"
    roles = {"lm_head.weight": "head"}  # noqa: RUF012 (read-only by contract)

    def __init__(self, spec: Tokens, d_model: int, tie_head: bool) -> None:
        super().__init__()
        self.vocab_size = self.n_out = spec.vocab_size
        self.max_positions = spec.max_positions
        self.embedding = nn.Embedding(spec.vocab_size, d_model)
        self.position_embedding = (
            None if spec.max_positions is None else nn.Embedding(spec.max_positions, d_model)
        )
        self.lm_head = None
        if not tie_head:
            self.lm_head = nn.Linear(d_model, spec.vocab_size, bias=spec.head_bias)

    def check(self, inputs: Tensor, *, time: bool) -> None:
        wanted = "(b, t)" if time else "(b,)"
        if not isinstance(inputs, Tensor):
            raise ShapeError(f"expected token ids {wanted}, got {_no_tensor(inputs)}")
        whole = not (inputs.is_floating_point() or inputs.is_complex())
        fits = inputs.ndim == 1 + time and inputs.numel() > 0
        if not (fits and whole and inputs.dtype != torch.bool):
            given = f"{tuple(inputs.shape)} {inputs.dtype}"
            raise ShapeError(f"expected token ids {wanted} of an integer dtype, got {given}")
        if answers(inputs):
            self._check_ids(inputs.long())

    def _check_ids(self, ids: Tensor) -> None:
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise ShapeError(
                f"inputs: id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.vocab_size} (0 to {self.vocab_size - 1}); use the tokenizer that belongs "
                "to the model, and a mask for padding"
            )

    def embed(self, inputs: Tensor, position: Tensor) -> Tensor:
        # torch.embedding reads int32 and int64 alone; bytes come as uint8, memory maps as uint16.
        narrow = inputs.dtype not in (torch.int32, torch.int64)
        return self.placed(self.embedding(inputs.long() if narrow else inputs), position)

    def placed(self, x: Tensor, position: Tensor) -> Tensor:
        if self.position_embedding is None:
            return x
        return x + self.position_embedding(position.clamp(min=0))

    def head(self, x: Tensor) -> Tensor:
        if self.lm_head is None:
            return LINEAR.pick(self.engine, x.device)(x, self._table(x))
        return self.lm_head(x)

    def _table(self, x: Tensor) -> Tensor:
        """The (v, d) embedding. What stands in place of that layer, an adapter say, or lies
        elsewhere, offloaded or sharded, is asked for every row."""
        table = self.embedding
        if type(table) is nn.Embedding and table.weight.device == x.device:
            return table.weight
        return table(torch.arange(self.vocab_size, device=x.device))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for part in (self.embedding, self.lm_head, self.position_embedding):
            if part is not None:
                normal_(part.weight, EMBEDDING_STD, generator)
        if self.lm_head is not None and self.lm_head.bias is not None:
            nn.init.zeros_(self.lm_head.bias)


class SignalStem(Stem):
    roles = {"in_proj.weight": "embedding", "out_proj.weight": "head"}  # noqa: RUF012

    def __init__(self, n_in: int, n_out: int | None, d_model: int) -> None:
        super().__init__()
        self.n_in, self.n_out = n_in, n_out or 0
        self.in_proj = nn.Linear(n_in, d_model)
        self.out_proj = None if n_out is None else nn.Linear(d_model, n_out)

    def check(self, inputs: Tensor, *, time: bool) -> None:
        wanted = f"(b, t, {self.n_in})" if time else f"(b, {self.n_in})"
        if not isinstance(inputs, Tensor):
            raise ShapeError(f"expected frames {wanted}, got {_no_tensor(inputs)}")
        ok = inputs.ndim == 2 + time and inputs.shape[-1] == self.n_in and inputs.numel() > 0
        if not (ok and inputs.is_floating_point()):
            given = f"{tuple(inputs.shape)} {inputs.dtype}"
            remedy = "" if inputs.is_floating_point() else "; convert them by .float()"
            raise ShapeError(f"expected frames {wanted} of a floating dtype, got {given}{remedy}")

    def embed(self, inputs: Tensor, position: Tensor) -> Tensor:
        frames = torch.where(position[..., None] < 0, 0.0, inputs)  # padding may hold NaN
        return self.in_proj(frames.to(next(self.in_proj.parameters()).dtype))

    def head(self, x: Tensor) -> Tensor:
        assert self.out_proj is not None, "built without a head"
        return self.out_proj(x)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        linear_(self.in_proj, generator)
        if self.out_proj is not None:
            linear_(self.out_proj, generator)


def _no_tensor(value: object) -> str:
    """What was given in place of a tensor, and how to turn it into one."""
    if isinstance(value, (str, bytes)):
        way = "encode it first: tokenizer.encode, or list(text.encode()) for bytes"
    else:
        way = "convert it by torch.tensor"
    return f"{value!r:.40} of type {type(value).__name__}; {way}"
