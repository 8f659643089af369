"""SafeTree: an affine map, then a short chain of guarded EML operators per output.

Glossary (eml-core's names):
    inputs, heads  width in and width out
    W, b           level 0: (heads, inputs) weights and (heads) biases
    c0, c1, c2     per head and level: scale, shift, and the offset of the logarithm's guard
    params         all of them flat: W row by row | b | (heads, depth, 3)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kizzasi.eml.core.fields import Fields, write
from kizzasi.eml.operator import eml_chain, safe_node
from kizzasi.errors import ShapeError, SpecError

TREE_KEYS = ("depth", "inputs", "heads", "params")


class SafeTree(nn.Module):
    """eml-core's composable layer, on batches: affine, then `depth` EML operators per head.

        v = W x + b;    depth times:  v <- eml_safe(v * c0 + c1, |v| + c2 + 1)

    Depth 0 is the affine map alone. Parameters start at zero, as eml-core's do.

    Args:
        depth: levels, 0 or more.
        inputs, heads: widths, 1 or more.
        device, dtype: of the parameters; float64 by default, since eml-core is float64.

    Raises:
        SpecError: a width below 1 or a negative depth.

    Source: the Rust crate eml-core, SafeTree. Its claim that the guard is at least 1 holds only
        for c2 >= 0.
    """

    def __init__(
        self,
        depth: int,
        inputs: int,
        heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if depth < 0 or inputs < 1 or heads < 1:
            raise SpecError(
                f"SafeTree(depth={depth}, inputs={inputs}, heads={heads}): "
                "depth must be >= 0, inputs and heads >= 1"
            )
        self.depth, self.inputs, self.heads = depth, inputs, heads
        count = _count(depth, inputs, heads)
        self.params = nn.Parameter(torch.zeros(count, device=device, dtype=dtype))

    @property
    def param_count(self) -> int:
        return self.params.numel()

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return views W (heads, inputs), b (heads), coefficients (heads, depth, 3)."""
        sizes = (self.heads * self.inputs, self.heads, self.heads * self.depth * 3)
        weight, bias, chain = self.params.split(sizes)
        return weight.view(self.heads, -1), bias, chain.view(self.heads, self.depth, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., heads).

        Raises:
            ShapeError: the last dimension is not `inputs`.
        """
        if x.shape[-1:] != (self.inputs,):
            raise ShapeError(f"SafeTree got {tuple(x.shape)}; the last size must be {self.inputs}")
        weight, bias, chain = self.split()
        return eml_chain(torch.nn.functional.linear(x, weight, bias), chain, safe_node)

    def to_json(self) -> str:
        """Return eml-core's JSON: depth, inputs, heads, params."""
        return write(tree_to_dict(self))

    @classmethod
    def from_json(cls, text: str) -> SafeTree:
        """Rebuild a tree from eml-core's JSON.

        Raises:
            CheckpointError: not JSON, a key missing, or a wrong number of params.
        """
        return read_tree(Fields.parse(text, TREE_KEYS))

    def extra_repr(self) -> str:
        return f"depth={self.depth}, inputs={self.inputs}, heads={self.heads}"


def _count(depth: int, inputs: int, heads: int) -> int:
    return heads * (inputs + 1 + 3 * depth)


def tree_to_dict(tree: SafeTree) -> dict[str, Any]:
    """Return the sizes and the flat params as plain Python numbers."""
    sizes = {"depth": tree.depth, "inputs": tree.inputs, "heads": tree.heads}
    return sizes | {"params": tree.params.tolist()}


def read_tree(fields: Fields, depth: int | None = None) -> SafeTree:
    """Build a tree from `tree_to_dict`'s fields; `depth` where the file does not say it."""
    depth = fields.whole("depth") if depth is None else depth
    inputs, heads = fields.whole("inputs", 1), fields.whole("heads", 1)
    return build_tree(depth, inputs, heads, fields.numbers("params", _count(depth, inputs, heads)))


def build_tree(depth: int, inputs: int, heads: int, params: list[float]) -> SafeTree:
    """Make a tree of given parameters, as many as it needs."""
    tree = SafeTree(depth, inputs, heads)
    with torch.no_grad():
        tree.params.copy_(torch.tensor(params, dtype=torch.float64))
    return tree
