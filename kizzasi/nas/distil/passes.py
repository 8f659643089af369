"""A model run layer by layer: the stream before a layer, its mixer, and what comes after it.

Symbols: n windows, t tokens of each, d d_model, v vocabulary. A stream is the residual stream
(n, t, d) after so many layers, held for all windows at once and computed some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, Mixer, MixerSpec, ModelSpec, SequenceModel, Tokens
from kizzasi.models.call import Call
from kizzasi.models.heads import Own

ROWS = 4  # windows that run together


def check_teacher(spec: ModelSpec) -> tuple[BlockSpec, ...]:
    """The blocks of a model whose mixers can be replaced one by one.

    Raises SpecError for a model that is not causal or reads no tokens, or whose layers are no plain
    blocks or read each other.
    """
    blocks = spec.plain_blocks
    if not isinstance(spec.stem, Tokens) or (spec.heads and not isinstance(spec.heads[0], Own)):
        raise SpecError("stem: only models that predict tokens by their own head are distilled")
    if not spec.causal:
        raise SpecError("blocks: a result depends on later tokens; give a causal model")
    for i, (block, settled) in enumerate(zip(blocks, spec.settled(), strict=True)):
        offers = block.mixer.settle(False)[1]
        if block.sources or offers or settled != block:
            raise SpecError(
                f"blocks[{i}].mixer: {block.mixer.kind!r} here shares tensors with other layers, "
                "and cannot be replaced alone; give a model whose layers stand by themselves"
            )
    return blocks


@torch.no_grad()
def embedded(model: SequenceModel, windows: Tensor) -> Tensor:
    """(n, t) ids to the stream before the first layer."""
    return torch.cat([model.hidden(rows, layer=0) for rows in windows.split(ROWS)])


def after(block: nn.Module, x: Tensor) -> Tensor:
    """The stream (b, t, d) after a layer, each row a document from its beginning."""
    return block(x, None, call=Call.of(x)).y


@torch.no_grad()
def advance(block: nn.Module, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer over all windows.

    Args:
        block: a `Block` of the model.
        stream: (n, t, d) before it.

    Returns:
        Three (n, t, d): what its mixer read, what its mixer put out, and the stream after it.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    hook = block.get_submodule("mixer").register_forward_hook(
        lambda _, given, out: seen.append((given[0], out.y))
    )
    try:
        later = torch.cat([after(block, rows) for rows in stream.split(ROWS)])
    finally:
        hook.remove()
    read, made = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return read, made, later


def logits(model: SequenceModel, stream: Tensor, start: int) -> Tensor:
    """(b, t, v) of the stream (b, t, d) before layer `start`, in float32."""
    for block in list(model.blocks)[start:]:
        stream = after(block, stream)
    spec = model.spec
    out = spec.logit_scale * model.stem.head(model.norm(stream)).float()
    return out if spec.logit_cap is None else spec.logit_cap * torch.tanh(out / spec.logit_cap)


@contextmanager
def replaced(model: SequenceModel, index: int, mixer: Mixer) -> Iterator[None]:
    """Another mixer in a layer, for as long as the with block lasts."""
    block = model.blocks[index]
    own = block.get_submodule("mixer")
    block.register_module("mixer", mixer)
    try:
        yield
    finally:
        block.register_module("mixer", own)


def made(spec: MixerSpec, model: SequenceModel, index: int, seed: int) -> Mixer:
    """A new mixer for the place of a layer, as it begins, in float32 on the model's device.

    Raises SpecError if the spec does not fit the model.
    """
    place = {"index": index, "n_layers": len(model.blocks), "seed": seed}
    device = next(model.parameters()).device
    return spec.layer(model.spec.d_model, **place, device=device, dtype=torch.float32).mixer
