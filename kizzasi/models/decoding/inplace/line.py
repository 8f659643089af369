"""A whole model that goes on along one line of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    CALLED,
    About,
    Called,
    Products,
    Run,
    Steps,
    Unfit,
    alone,
    normed,
    silent_hooks,
    stepped,
    undisturbed,
    wide_dtype,
    write_norm,
)
from kizzasi.models.decoding.inplace.channels import mlp_steps, moe_steps, swiglu_steps
from kizzasi.models.decoding.inplace.conv import short_conv_steps
from kizzasi.models.decoding.inplace.gated_delta import gated_delta_steps
from kizzasi.models.decoding.inplace.gla import gla_steps, retention_steps
from kizzasi.models.decoding.inplace.mamba import mamba2_steps, mamba_steps
from kizzasi.models.decoding.inplace.mamba3 import mamba3_steps
from kizzasi.models.decoding.inplace.rg_lru import rg_lru_steps
from kizzasi.models.decoding.inplace.rwkv4 import rwkv4_steps, rwkv_channel_steps
from kizzasi.models.decoding.inplace.rwkv7 import rwkv7_steps
from kizzasi.models.decoding.inplace.written import Written, in_programs
from kizzasi.models.decoding.own_cache import disown, own
from kizzasi.models.layers.block import Block, BlockSpec
from kizzasi.models.layers.layer import LayerSpec
from kizzasi.models.mixer import Mixer
from kizzasi.models.mixers.attention import Attention
from kizzasi.models.mixers.gated_delta import GatedDelta
from kizzasi.models.mixers.gla import GLA
from kizzasi.models.mixers.mamba import Mamba
from kizzasi.models.mixers.mamba2 import Mamba2
from kizzasi.models.mixers.mamba3 import Mamba3
from kizzasi.models.mixers.retention import Retention
from kizzasi.models.mixers.rg_lru import RGLRU
from kizzasi.models.mixers.rwkv4 import RWKV4
from kizzasi.models.mixers.rwkv7 import RWKV7
from kizzasi.models.mixers.short_conv import ShortConv
from kizzasi.models.norm import Norm
from kizzasi.models.ops.autodiff import observed
from kizzasi.models.ops.steps import STEPS
from kizzasi.models.parts.linear import is_plain
from kizzasi.models.state import BlockState, ModelState
from kizzasi.models.stems import TokenStem

if TYPE_CHECKING:
    from kizzasi.models.model import SequenceModel
    from kizzasi.models.ops.native.steps import Program

IN_PLACE: Mapping[type[Mixer], Callable[[Any, Any, About], Steps | None]] = {
    Attention: attention_steps,
    GLA: gla_steps,
    GatedDelta: gated_delta_steps,
    MLP: mlp_steps,
    Mamba2: mamba2_steps,
    Mamba3: mamba3_steps,
    Mamba: mamba_steps,
    MoE: moe_steps,
    RGLRU: rg_lru_steps,
    Retention: retention_steps,
    RWKV4: rwkv4_steps,
    RWKV7: rwkv7_steps,
    RWKVChannel: rwkv_channel_steps,
    ShortConv: short_conv_steps,
    SwiGLU: swiglu_steps,
}
READ = ("norm", "norm_at", "parallel", "residual_scale", "stream_scale")  # fields of a block


class Line(ABC):
    """A model and the state that it steps on; no gradients.

    rows: b.
    """

    rows: int

    @property
    def engines(self) -> Sequence[str]:
        """What every layer runs on; empty where nobody can tell."""
        return ()

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
        self.rows, self.weights = len(state.position), products.watch(model)
        about = About(self.rows, dtype, {}, products)
        blocks = zip(model.blocks.layers, model.spec.blocks, state.blocks, strict=True)
        self.blocks = [_block_steps(*parts, about) for parts in blocks]
        self.parts = in_programs(
            self.blocks, model.spec.d_model, partial(_program, self.device, dtype, self.rows)
        )
        self.norm = normed(model.norm, about.rows) or model.norm
        self.position, self.segment = state.position.clone(), state.segment
        self.hooks = silent_hooks(model)
        quiet = all(isinstance(block, BlockSteps) for block in self.blocks)
        self.guard = torch.inference_mode if quiet else torch.no_grad
        self.whole = _whole(model, self.parts)

    def step(self, inputs: Tensor) -> Tensor:
        model, whole = self.model, self.whole
        if whole is not None:
            logits = whole(inputs)  # refuses ids that are none before anything moves on
            self.position.add_(1)
            return logits
        call = Call((len(inputs), 1), self.device, step=True)
        model._check_positions(self.position)
        with self.guard():
            x = model._embed(inputs, self.position, embedded=False)
            for part in self.parts:
                x = part(x, call)
            x = self.norm(x)
            self.position.add_(1)
        return model._own_head(x)  # of an inference tensor, but none itself

    def value(self) -> ModelState:
        blocks = tuple(block.value() for block in self.blocks)
        return ModelState(blocks, self.position.clone(), self.segment, self.model._digest)

    def holds(self) -> bool:
        disturbed = any(self.hooks) or torch.is_autocast_enabled(self.device.type)
        return not (disturbed or observed()) and self.weights.same()

    @property
    def engines(self) -> Sequence[str]:
        written = {
            id(block) for part in self.parts if isinstance(part, Written) for block in part.blocks
        }
        return ["native" if id(block) in written else "torch" for block in self.blocks]


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
        self.block, self.beside = block, block.beside
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

    def write(self, program: Program, x: Tensor) -> Tensor:
        """The block written into x itself."""
        block, channel, (by, stream) = self.block, self.channel, self.scales
        parts = [part for part in (block.mixer, block.channel) if part is not None]
        if not all(isinstance(p, Mixer) and p.engine in ("auto", "native") for p in parts):
            raise Unfit

        def normal(norm: Norm | None, x: Tensor, y: Tensor) -> Tensor:
            return x if norm is None else write_norm(norm, program, x, y)

        read, beside = (program.room(name, x.shape[1]) for name in ("read", "read beside"))
        enter = normal(block.mixer_norm, x, read)
        enter_channel = enter
        if self.beside == "separate":
            enter_channel = normal(block.channel_norm, x, beside)
            if enter_channel is x:
                raise Unfit
        y = self.mixer.write(program, enter)
        program.join(x, normal(block.mixer_post_norm, y, y), stream, by)
        if channel is None:
            return x
        if self.beside is None:
            enter_channel = normal(block.channel_norm, x, read)
        y = channel.write(program, enter_channel)
        y = normal(block.channel_post_norm, y, y)
        program.join(x, y, stream if self.beside is None else 1.0, by)
        return x

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
    dtype, products = wide_dtype(model), products or Products()
    around = nn.ModuleList(part for part in model.children() if part is not model.blocks)
    plain = (
        not model.spec.heads
        and model.blocks.independent
        and not torch.is_autocast_enabled(state.position.device.type)
        and not observed()
        and alone(model)
        and alone(model.blocks)
        and all(undisturbed(part) for part in around)
    )
    if dtype is None or not plain:
        return CalledLine(model.step, own(state))
    return InPlaceLine(model, state, dtype, products)


def _program(device: torch.device, dtype: torch.dtype, rows: int) -> Program | None:
    return STEPS.pick("auto", device)(dtype, rows)


def _whole(model: SequenceModel, parts: Sequence[Steps]) -> Callable[[Tensor], Tensor] | None:
    """A whole step of the model as one program: ids (b,) to logits (b, v); None if it is none."""
    stem, spec = model.stem, model.spec
    if len(parts) != 1 or not isinstance(parts[0], Written) or type(stem) is not TokenStem:
        return None
    plain = type(stem.embedding) is nn.Embedding and stem.embedding.max_norm is None
    plain = plain and stem.position_embedding is None and model.embed_norm is None
    plain = plain and spec.embed_scale == 1 and spec.logit_scale == 1 and spec.logit_cap is None
    head = stem.embedding if stem.lm_head is None else stem.lm_head
    if not plain or not (head is stem.embedding or is_plain(head)) or stem.engine != "auto":
        return None
    return parts[0].to_logits(
        stem.embedding.weight, head.weight, getattr(head, "bias", None), model.norm
    )


def _block_steps(block: nn.Module, spec: LayerSpec, state: BlockState, about: About) -> Steps:
    if not isinstance(block, Block) or not isinstance(spec, BlockSpec):
        return _called(block, state, about)
    read = BlockSpec(spec.mixer, spec.channel, **{name: getattr(spec, name) for name in READ})
    if type(block) is not Block or spec != read or not undisturbed(block):
        return _called(block, state, about)
    return BlockSteps(block, state, about)


def _called(block: nn.Module, state: BlockState, about: About) -> Steps:
    about.shared[CALLED] = True
    return Called(block, state)


def _steps(mixer: Mixer, state: Any, about: About) -> Steps:
    make = IN_PLACE.get(type(mixer))
    made = None if make is None else make(mixer, state, about)
    if made is not None:
        return made
    about.shared[CALLED] = True
    return stepped(mixer, state)
