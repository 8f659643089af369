"""A plan made into a model: a spec whose layers name the chosen mixers, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models import SequenceModel
from kizzasi.models.build import skeleton
from kizzasi.nas.distil.trials import OWN, Trials


def assemble(model: SequenceModel, trials: Trials, names: Sequence[str]) -> SequenceModel:
    """A model of its own: nothing of it is shared with the one that it is made of.

    Args:
        model: the teacher.
        trials: whose weights the new mixers have.
        names: for every layer a candidate's, or "own".

    Returns:
        On the teacher's device and in its dtype, in evaluation mode; it is saved and loaded like
        any other.

    Raises:
        SpecError: not a name for each layer, or one that was not tried there.
        CheckpointError: the weights of a trial cannot be read.
    """
    blocks = list(model.spec.plain_blocks)
    if len(names) != len(blocks):
        raise SpecError(f"names: {len(names)} for {len(blocks)} layers; give one for each")
    state: dict[str, Tensor] = dict(model.state_dict())
    first = next(model.stem.parameters())
    for i, name in enumerate(names):
        if name == OWN:
            continue
        trial = trials.find(i, name)
        blocks[i] = replace(blocks[i], mixer=trial.spec)
        place = f"blocks.{i}.mixer."
        state = {k: v for k, v in state.items() if not k.startswith(place)}
        state |= {place + k: v for k, v in trials.weights(trial).items()}
    made = skeleton(model.spec.replace(blocks=tuple(blocks)), first.device).to(first.dtype)
    like = made.state_dict()
    own = {k: v.detach().to(first.device, like[k].dtype, copy=True) for k, v in state.items()}
    made.load_state_dict(own, strict=True, assign=True)
    return made.eval()
