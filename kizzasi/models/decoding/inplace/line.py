"""A whole model that goes on along one line of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.channels.mlp import MLP
from kizzasi.models.channels.moe import MoE
from kizzasi.models.channels.rwkv_channel import RWKVChannel
from kizzasi.models.channels.swiglu import SwiGLU
from kizzasi.models.decoding.inplace.attention import attention_steps
from kizzasi.models.decoding.inplace.base import (
    About,
    Called,
    Products,
    Run,
    Steps,
    alone,
    normed,
    silent_hooks,
    stepped,
    undisturbed,
    wide_dtype,
)
from kizzasi.models.decoding.inplace.channels import mlp_steps, moe_steps, swiglu_steps
from kizzasi.models.decoding.inplace.mamba import mamba2_steps, mamba_steps
from kizzasi.models.decoding.inplace.rwkv4 import rwkv4_steps, rwkv_channel_steps
from kizzasi.models.decoding.own_cache import disown, own
from kizzasi.models.layers.block import Block, BlockSpec
from kizzasi.models.layers.layer import LayerSpec
from kizzasi.models.mixer import Mixer
from kizzasi.models.mixers.attention import Attention
from kizzasi.models.mixers.mamba import Mamba
from kizzasi.models.mixers.mamba2 import Mamba2
from kizzasi.models.mixers.rwkv4 import RWKV4
from kizzasi.models.state import BlockState, ModelState

if TYPE_CHECKING:
    from kizzasi.models.model import SequenceModel

IN_PLACE: Mapping[type[Mixer], Callable[[Any, Any, About], Steps | None]] = {
    Attention: attention_steps,
    MLP: mlp_steps,
    Mamba2: mamba2_steps,
    Mamba: mamba_steps,
    MoE: moe_steps,
    RWKV4: rwkv4_steps,
    RWKVChannel: rwkv_channel_steps,
    SwiGLU: swiglu_steps,
}
READ = ("norm", "norm_at", "parallel", "residual_scale", "stream_scale")  # fields of a block


class Line(ABC):
    """A model and the state that it steps on; no gradients.

    rows: b.
    """

    rows: int

    @abstractmethod
    def step(self, inputs: Tensor) -> Tensor:
        """One token (b,), or frame (b, n_in), of each row. Returns (b, v) logits after it."""

    @abstractmethod
    def value(self) -> ModelState:
        """The state as a value: a copy, which no later step touches."""

    @abstractmethod
    def holds(self) -> bool:
        """Whether nothing has come to act in the model that this line does not know of."""


class CalledLine(Line):
    """A step of states, (inputs, state) to what `SequenceModel.step` returns."""

    def __init__(self, step: Callable[..., Any], state: ModelState) -> None:
        self.call, self.state, self.rows = step, state, len(state.position)

    def step(self, inputs: Tensor) -> Tensor:
        logits, self.state, *_ = self.call(inputs, self.state)
        return logits

    def value(self) -> ModelState:
        return disown(self.state)

    def holds(self) -> bool:
        return True


class InPlaceLine(Line):
    """`SequenceModel.step` without what no token changes."""

    def __init__(
        self, model: SequenceModel, state: ModelState, dtype: torch.dtype, products: Products
    ) -> None:
        self.model, self.device = model, state.position.device
        self.rows = len(state.position)
        about = About(self.rows, dtype, {}, products)
        blocks = zip(model.blocks.layers, model.spec.blocks, state.blocks, strict=True)
        self.blocks = [_block_steps(*parts, about) for parts in blocks]
        self.norm = normed(model.norm, about.rows) or model.norm
        self.position, self.segment = state.position.clone(), state.segment
        self.hooks = silent_hooks(model)
        quiet = all(isinstance(block, BlockSteps) for block in self.blocks)
        self.guard = torch.inference_mode if quiet else torch.no_grad

    def step(self, inputs: Tensor) -> Tensor:
        model, call = self.model, Call((len(inputs), 1), self.device, step=True)
        model._check_positions(self.position)
        with self.guard():
            x = model._embed(inputs, self.position, embedded=False)
            for block in self.blocks:
                x = block(x, call)
            x = self.norm(x)
            self.position.add_(1)
        return model._own_head(x)  # of an inference tensor, but none itself

    def value(self) -> ModelState:
        blocks = tuple(block.value() for block in self.blocks)
        return ModelState(blocks, self.position.clone(), self.segment, self.model._digest)

    def holds(self) -> bool:
        return not (any(self.hooks) or torch.is_autocast_enabled(self.device.type))


class BlockSteps(Steps):
    """`Block.forward` of one token."""

    def __init__(self, block: Block, state: BlockState, about: About) -> None:
        rows = about.rows
        self.mixer = _steps(block.mixer, state.mixer, about)
        self.channel = None
        if block.channel is not None:
            self.channel = _steps(block.channel, state.channel, about)
        self.norms: tuple[Run | None, ...] = tuple(
            normed(norm, rows)
            for norm in (
                block.mixer_norm,
                block.mixer_post_norm,
                block.channel_norm,
                block.channel_post_norm,
            )
        )
        self.beside = block.beside
        self.scales = block.residual_scale, block.stream_scale

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        enter, leave, enter_channel, leave_channel = self.norms
        read = x if enter is None else enter(x)
        y = self._leave(self.mixer(read, call), leave)
        if self.channel is None:
            return self._add(x, y)
        if self.beside is None:
            x = self._add(x, y)
        if self.beside != "shared":
            read = x if enter_channel is None else enter_channel(x)
        z = self._leave(self.channel(read, call), leave_channel)
        return self._add(x, z if self.beside is None else y + z)

    def value(self) -> BlockState:
        return BlockState(self.mixer.value(), () if self.channel is None else self.channel.value())

    def _leave(self, y: Tensor, norm: Run | None) -> Tensor:
        y = y if norm is None else norm(y)
        scale = self.scales[0]
        return y if scale == 1 else scale * y

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.scales[1]
        return x + y if scale == 1 else scale * x + y


def begin(model: SequenceModel, state: ModelState, products: Products | None = None) -> Line:
    """Whatever goes on fastest from a state, which is left as it is.

    products: what lines of the same model and weights may share.
    """
    dtype = wide_dtype(model)
    around = nn.ModuleList(part for part in model.children() if part is not model.blocks)
    plain = (
        not model.spec.heads
        and model.blocks.independent
        and not torch.is_autocast_enabled(state.position.device.type)
        and alone(model)
        and alone(model.blocks)
        and all(undisturbed(part) for part in around)
    )
    if dtype is None or not plain:
        return CalledLine(model.step, own(state))
    return InPlaceLine(model, state, dtype, products or Products())


def _block_steps(block: nn.Module, spec: LayerSpec, state: BlockState, about: About) -> Steps:
    if not isinstance(block, Block) or not isinstance(spec, BlockSpec):
        return Called(block, state)
    read = BlockSpec(spec.mixer, spec.channel, **{name: getattr(spec, name) for name in READ})
    if type(block) is not Block or spec != read or not undisturbed(block):
        return Called(block, state)
    return BlockSteps(block, state, about)


def _steps(mixer: Mixer, state: Any, about: About) -> Steps:
    make = IN_PLACE.get(type(mixer))
    made = None if make is None else make(mixer, state, about)
    return stepped(mixer, state) if made is None else made
