"""What exporters want: a model's step over plain tensors. torch.export, ONNX."""

from __future__ import annotations

from torch import Tensor, nn

from kizzasi.models.model import SequenceModel
from kizzasi.models.state import ModelState, map_state, named_leaves


class StepModule(nn.Module):
    """`model.step` with the state as a flat list of tensors.

        logits, *after = StepModule(model)(inputs, *before)

    Recurrent states keep their shapes, so that an exported step serves a stream of any length. The
    cache of attention grows: its exported step is good for one length, unless the exporter is given
    `dynamic_shapes`.

    Args:
        model: put into evaluation mode.
        batch_size: rows of the initial state.

    Attributes:
        state_names: a name per tensor of the state, such as "state.blocks.0.mixer.ssm".
    """

    def __init__(self, model: SequenceModel, batch_size: int = 1) -> None:
        super().__init__()
        self.model = model.eval()
        self.start = model.init_state(batch_size)
        self.state_names = [name for name, _ in named_leaves(self.start)]

    def forward(self, inputs: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Token ids (b,) or frames (b, n_in), then the state; logits, then the state after."""
        order = iter(state)
        out = self.model.step(inputs, map_state(lambda _: next(order), self.start))
        return out.logits, *self.flat(out.state)

    def flat(self, state: ModelState | None = None) -> list[Tensor]:
        """The tensors of a state, in the order of `state_names`; by default of the initial one."""
        return [leaf for _, leaf in named_leaves(self.start if state is None else state)]
