"""Attention whose projections see the whole sequence at once, and how eml-core trains it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kizzasi.eml.core.descent import DESCENT, EndToEndTrainConfig, draw_trials
from kizzasi.eml.core.events import EmlEventLog, Event, Trained
from kizzasi.eml.core.fields import Fields
from kizzasi.eml.core.rng import Lcg, Rng
from kizzasi.eml.core.tree import SafeTree
from kizzasi.errors import CheckpointError, ShapeError

BUFFER_SIZE = 256
MIN_SAMPLES = 4
_INIT_SCALE = 0.05


def numerical_softmax(scores: Tensor) -> Tensor:
    """Compute the softmax over the last dimension: eml-core's name for it."""
    return torch.softmax(scores, -1)


def tree_softmax(scores: Tensor, tree: SafeTree) -> Tensor:
    """Weigh each row of scores by a tree, or numerically where that gives no usable weights."""
    learned = tree(scores)
    learned = torch.where(learned.isfinite() & (learned > 0), learned, 0.0)
    total = learned.sum(-1, keepdim=True)
    usable = learned / total.clamp_min(1e-12)
    return torch.where(total > 1e-12, usable, numerical_softmax(scores))


class FlatAttention(nn.Module):
    """What both of eml-core's attentions are: projections that see the whole sequence at once.

        q, k, v = maps of the flattened x;  C = softmax(q k^T / sqrt(d_k)) v;  y = out(C)

    Made by `ToyEmlAttention` and `BaselineAttention`, which only choose the maps.

    Args:
        name: for events and JSON.
        sizes: d_model, d_k, seq_len.
        trees: name to map, in the order of their parameters: q, k, v, perhaps a softmax, out.
        seed: of the parameters.
        rng: see `rng.py`.
    """

    def __init__(
        self,
        name: str,
        sizes: tuple[int, int, int],
        trees: Mapping[str, SafeTree],
        seed: int,
        rng: Rng,
    ) -> None:
        super().__init__()
        self.name = name
        self.rng: Rng = rng
        self.d_model, self.d_k, self.seq_len = sizes
        self.scale = self.d_k**-0.5
        for key, tree in trees.items():
            setattr(self, key, tree)
        self.trained, self.tree_softmax = False, False
        self.training_rounds, self.last_accepts = 0, 0
        self.samples: deque[tuple[Tensor, Tensor]] = deque(maxlen=BUFFER_SIZE)
        self.events = EmlEventLog()
        _initialise(self.trees(), Lcg(seed ^ self.d_model, rng))

    def trees(self) -> list[SafeTree]:
        """Return the maps in the order of their parameters."""
        return [tree for tree in self.children() if isinstance(tree, SafeTree)]

    @property
    def param_count(self) -> int:
        return sum(tree.param_count for tree in self.trees())

    @property
    def is_trained(self) -> bool:
        return self.trained

    @property
    def buffer_len(self) -> int:
        """How many samples are kept."""
        return len(self.samples)

    def forward(self, x: Tensor) -> Tensor:
        """Map (seq * d_model) or (batch, seq * d_model) to the same shape.

        Raises:
            ShapeError: another shape.
        """
        width = self.seq_len * self.d_model
        if x.ndim not in (1, 2) or x.shape[-1] != width:
            raise ShapeError(
                f"input has shape {tuple(x.shape)}; it must be ({width},) or (batch, {width}), "
                "that is seq_len * d_model values"
            )
        *heads, out = self.trees()
        q, k, v = (tree(x).unflatten(-1, (self.seq_len, -1)) for tree in heads[:3])
        scores = q @ k.transpose(-1, -2) * self.scale
        by_tree = self.tree_softmax
        weights = tree_softmax(scores, heads[3]) if by_tree else numerical_softmax(scores)
        return out((weights @ v).flatten(-2))

    def record(self, x: Tensor | Sequence[float], target: Tensor | Sequence[float]) -> None:
        """Keep one sample for training, (seq * d_model) each; at most 256 are kept.

        Raises:
            ShapeError: another shape.
        """
        width, pair = self.seq_len * self.d_model, []
        for name, given in (("input", x), ("target", target)):
            value = torch.as_tensor(given).detach()
            if value.shape != (width,):
                raise ShapeError(
                    f"{name} has shape {tuple(value.shape)}; it must be ({width},), "
                    "that is seq_len * d_model values"
                )
            pair.append(value.clone())
        self.samples.append((pair[0], pair[1]))

    def train_end_to_end(
        self, config: EndToEndTrainConfig | None = None, batch: int | None = None
    ) -> float:
        """Run one round of coordinate descent over all maps; return the final training error.

        With fewer than 4 samples nothing is tried and the error is inf. Below
        `config.convergence_mse` the model becomes `trained` and a `Trained` event is logged.
        Everything runs on the model's device: on the CPU by a compiled kernel in float64 where
        there is one, elsewhere, or with a softmax tree in use, by tensor operations in the model's
        dtype.

        Args:
            config: None for the defaults.
            batch: how many to try on the guess that all fail, by tensor operations on any device;
                None for the rule above. The path is the same.
        """
        config = config or EndToEndTrainConfig()
        self.training_rounds += 1
        pairs = list(self.samples)[: config.max_samples]
        if len(pairs) < MIN_SAMPLES:
            return math.inf
        stride = max(len(pairs) // min(config.eval_subset, len(pairs)), 1)
        subset = pairs[::stride][: config.eval_subset]
        first = next(self.parameters())
        x, y = (
            torch.stack([each.to(first) for each in part]) for part in zip(*subset, strict=True)
        )
        trials = draw_trials(config, self.training_rounds, self.param_count, self.rng)
        engine = "torch" if self.tree_softmax or batch else "auto"
        descend = DESCENT.pick(engine, first.device)
        before, after, self.last_accepts = descend(self, x, y, *trials, batch=batch)
        if after < config.convergence_mse:
            self.trained = True
            self.tree_softmax = self.rng == "seed" and len(self.trees()) == 5
            count = self.param_count
            self.events.push(Trained(self.name, len(pairs), before, after, True, count))
        return after

    def drain_events(self) -> list[Event]:
        """Return the events so far and forget them."""
        return self.events.drain()

    def get_extra_state(self) -> Tensor:
        """What defines the function beside the parameters, and the rounds, for `state_dict`."""
        return torch.tensor([self.trained, self.tree_softmax, self.training_rounds])

    def set_extra_state(self, state: Tensor) -> None:
        trained, by_tree, self.training_rounds = state.tolist()
        self.trained, self.tree_softmax = bool(trained), bool(by_tree)

    def adopt(self, trees: Mapping[str, SafeTree]) -> None:
        """Replace maps by others of the same sizes.

        Raises:
            CheckpointError: a map has other sizes.
        """
        for name, tree in trees.items():
            expected = getattr(self, name)
            if tree.extra_repr() != expected.extra_repr():
                raise CheckpointError(f"{name} is {tree!r}; the sizes call for {expected!r}")
            setattr(self, name, tree)

    def adopt_tail(self, fields: Fields) -> None:
        """Take scale, trained and training_rounds from eml-core's JSON."""
        if not math.isclose(fields.number("scale"), self.scale, rel_tol=1e-6):
            raise CheckpointError(
                f"scale is {fields.number('scale')}; d_k {self.d_k} calls for {self.scale}"
            )
        self.trained = fields.flag("trained")
        self.training_rounds = fields.whole("training_rounds", high=2**63 - 1)


@torch.no_grad()
def _initialise(trees: list[SafeTree], lcg: Lcg) -> None:
    for tree in trees:
        values = [lcg.signed() * _INIT_SCALE for _ in range(tree.param_count)]
        tree.params.copy_(torch.tensor(values, dtype=torch.float64))
