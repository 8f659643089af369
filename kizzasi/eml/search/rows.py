"""Train a layer's output projection as separate problems, one per output channel.

A parameter of `o_proj` touches one output only. So the attention before it is evaluated once, and
one candidate for every output is evaluated in a single pass: R = d problems in the time of one.
"""

import torch
from torch import Tensor, nn

from kizzasi.eml.attention import EmlAttention, EmlProjection
from kizzasi.eml.operator import eml_chain, soft_node
from kizzasi.errors import ShapeError


class OutputRows:
    """Residuals of every output channel as a function of its own parameters, for `GaussNewton`.

    Args:
        projection: the module's last projection; changed only by `assign`.
        features: (..., n_in) its inputs, fixed.
        targets: (..., n_out).
    """

    def __init__(self, projection: EmlProjection, features: Tensor, targets: Tensor) -> None:
        self.projection = projection
        self.features = features.reshape(-1, features.shape[-1])
        self.targets = targets.reshape(-1, targets.shape[-1]).T.contiguous()
        self.sizes = [features.shape[-1], 1, projection.chain[0].numel()]

    @property
    def start(self) -> Tensor:
        """The present parameters, (n_out, n): weights, bias, chain."""
        affine = self.projection.affine
        parts = (affine.weight, affine.bias[:, None], self.projection.chain.flatten(1))
        return torch.cat([p.detach() for p in parts], 1)

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """Return (R, P, m) residuals of candidates (R, P, n), m being positions times samples."""
        weight, bias, chain = points.split(self.sizes, -1)
        z = torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), self.features.T)
        chain = chain.flatten(0, 1).unflatten(-1, (-1, 3))[:, None]
        pairs = zip(z.split(256), chain.split(256), strict=True)
        residuals = torch.cat([eml_chain(*pair, soft_node) for pair in pairs])
        return residuals.unflatten(0, points.shape[:2]).sub_(self.targets[:, None])

    @torch.no_grad()
    def assign(self, points: Tensor) -> None:
        """Write one point per output, (n_out, n), into the projection.

        Raises:
            ShapeError: another shape.
        """
        expected = (len(self.targets), sum(self.sizes))
        if points.shape != expected:
            raise ShapeError(f"points are {tuple(points.shape)}; give {expected}, all of found.x")
        weight, bias, chain = points.split(self.sizes, -1)
        self.projection.affine.weight.copy_(weight)
        self.projection.affine.bias.copy_(bias[:, 0])
        self.projection.chain.copy_(chain.reshape_as(self.projection.chain))


@torch.no_grad()
def output_rows(attention: EmlAttention, x: Tensor, targets: Tensor) -> OutputRows:
    """Split an EML attention layer at its output projection, on inputs x (b, t, d)."""
    seen: list[Tensor] = []

    def remember(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0])

    handle = attention.o_proj.register_forward_pre_hook(remember)
    attention(x)
    handle.remove()
    return OutputRows(attention.o_proj, seen[0], targets)
