"""The path of one trial after another in C, on a CPU; native/eml_walk.c says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kizzasi.eml.search.coordinate import MARGIN
from kizzasi.models.ops.native import library

if TYPE_CHECKING:
    from kizzasi.eml.core.flat import FlatAttention

MOST_POSITIONS = 8  # as in eml_walk.c


def descend(
    model: FlatAttention,
    inputs: Tensor,
    targets: Tensor,
    index: np.ndarray,
    delta: np.ndarray,
    batch: int | None = None,
) -> tuple[float, float, int]:
    """`descent.descend` under the numerical softmax, in float64 whatever the model's dtype.

    Nothing is tried in vain, so `batch` says nothing here.
    """
    trees, real = model.trees(), torch.float64
    q, k, v, *unused, out = (tree.params.detach() for tree in trees)
    assert model.seq_len <= MOST_POSITIONS, "the kernel holds a row of weights in registers"
    n_samples, block = len(inputs), 2 * library.lanes(real)
    padded = -(-n_samples // block) * block
    params = torch.cat([q, k, v, *unused, out]).double()
    rows = [
        torch.nn.functional.pad(each.double().T, (0, padded - n_samples)).contiguous()
        for each in (inputs, targets)
    ]
    trials = [torch.from_numpy(np.ascontiguousarray(each)) for each in (index, delta)]
    result = torch.tensor([0.0, 0.0, 0.0, MARGIN], dtype=real)
    sizes = [n_samples, padded, model.seq_len, model.d_k, *(len(each) for each in rows)]
    sizes += [trees[0].depth, sum(map(len, unused)), len(index)]
    (room,) = library.ask("eml_walk_room", real, 1, *sizes)
    given = [params, *rows, *trials, result, torch.empty(room, dtype=real)]
    library.call("eml_walk", real, given, *sizes)
    with torch.no_grad():
        for tree, part in zip(trees, params.split([len(t.params) for t in trees]), strict=True):
            tree.params.copy_(part)
    before, after, accepts, _ = result.tolist()
    return before, after, int(accepts)
