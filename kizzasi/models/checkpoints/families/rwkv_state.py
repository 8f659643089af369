"""State tuning: an initial memory that RWKV-LM trained in place of weights, as a state of ours.

    blocks.#.att.time_state   (h, n, n), indexed [value, key]; versions 5, 6 and 7

It may stand in a file of its own, or in the model's. A model has no place for it: it is given to
calls, as any state is.
"""

from __future__ import annotations

import os
from pathlib import Path

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints.storage.files import open_file
from kizzasi.models.checkpoints.storage.stored import FLOATS
from kizzasi.models.mixers.rwkv5 import RWKV5State
from kizzasi.models.mixers.rwkv6 import RWKV6State
from kizzasi.models.mixers.rwkv7 import RWKV7State
from kizzasi.models.model import SequenceModel
from kizzasi.models.state import BlockState, ModelState

NAME = "blocks.{}.att.time_state"


def tuned_state(path: str | os.PathLike[str], model: SequenceModel, batch: int = 1) -> ModelState:
    """The initial state that a file holds: `model(ids, tuned_state(path, model))`.

    Args:
        path: a .pth or .safetensors file.
        model: of RWKV-5, 6 or 7 layers; the state is on its device.
        batch: how many rows begin with it.

    Raises:
        CheckpointError: a layer of the model holds no such memory, or the file none for it, or
            one of another shape.
    """
    path = Path(path)
    stored, state, blocks = open_file(path), model.init_state(batch), []
    for i, block in enumerate(state.blocks):
        before, name = block.mixer if isinstance(block, BlockState) else None, NAME.format(i)
        if not isinstance(before, (RWKV5State, RWKV6State, RWKV7State)):
            rule = "only RWKV-5, 6 and 7 begin with a memory; give a model of these"
            raise CheckpointError(f"{path}: blocks[{i}]: {rule}")
        found, wanted = stored.get(name), tuple(before.wkv.shape[1:])
        if found is None or found.shape != wanted or found.dtype not in FLOATS:
            given = "is missing" if found is None else f"is {found.shape} {found.dtype}"
            raise CheckpointError(f"{path}: {name} {given}; the model needs {wanted} of floats")
        memory = found.read().to(before.wkv)
        memory = memory if isinstance(before, RWKV7State) else memory.mT
        wkv = memory.expand_as(before.wkv).clone()
        blocks.append(block._replace(mixer=before._replace(wkv=wkv)))
    return state._replace(blocks=tuple(blocks))
