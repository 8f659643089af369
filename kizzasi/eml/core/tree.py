"""SafeTree: an affine map, then a short chain of guarded EML operators per output.

Glossary (eml-core's names):
    inputs, heads  width in and width out
    W, b           level 0: (heads, inputs) weights and (heads) biases
    c0, c1, c2     per head and level: scale, shift, and the offset of the logarithm's guard
    params         all of them flat: W row by row | b | (heads, depth, 3)
"""

import json

import torch
from torch import Tensor, nn

from kizzasi.eml.operator import eml_safe
from kizzasi.errors import CheckpointError, ShapeError, SpecError


def tree_chain(v: Tensor, coefficients: Tensor) -> Tensor:
    """Run v through `depth` guarded EML operators.

        v <- eml_safe(v * c0 + c1, |v| + c2 + 1),      once per level

    Args:
        v: (..., heads).
        coefficients: (..., heads, depth, 3), broadcastable; c0, c1, c2 last.

    Returns:
        (..., heads).

    Source: the Rust crate eml-core, SafeTree. Its claim that the guard is at least 1 holds only
        for c2 >= 0.
    """
    for level in range(coefficients.shape[-2]):
        c0, c1, c2 = coefficients[..., level, :].unbind(-1)
        v = eml_safe(v * c0 + c1, v.abs() + c2 + 1.0)
    return v


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
        count = heads * inputs + heads + heads * depth * 3
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
        return tree_chain(torch.nn.functional.linear(x, weight, bias), chain)

    def to_json(self) -> str:
        """Return eml-core's JSON: depth, inputs, heads, params."""
        return json.dumps(tree_to_dict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "SafeTree":
        """Rebuild a tree from eml-core's JSON.

        Raises:
            CheckpointError: not JSON, a key missing, or a wrong number of params.
        """
        return tree_from_dict(parse_json(text))

    def extra_repr(self) -> str:
        return f"depth={self.depth}, inputs={self.inputs}, heads={self.heads}"


def parse_json(text: str) -> dict:
    """Parse a JSON object, or raise CheckpointError."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"not JSON: {error}; give the text that to_json wrote") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"JSON holds a {type(parsed).__name__}; an object is needed")
    return parsed


def tree_to_dict(tree: SafeTree, keys: tuple[str, ...] = ("depth", "inputs", "heads")) -> dict:
    """Return the named sizes and the flat params as plain Python numbers."""
    return {key: getattr(tree, key) for key in keys} | {"params": tree.params.tolist()}


def tree_from_dict(fields: dict, depth: int | None = None) -> SafeTree:
    """Build a tree from `tree_to_dict`'s fields; `depth` where the file does not say it."""
    keys = {"inputs", "heads", "params"} | ({"depth"} if depth is None else set())
    if set(fields) != keys:
        raise CheckpointError(f"a tree has keys {sorted(fields)}; it must have {sorted(keys)}")
    tree = SafeTree(fields.get("depth", depth), fields["inputs"], fields["heads"])
    values = fields["params"]
    if len(values) != tree.param_count or not all(isinstance(v, (int, float)) for v in values):
        raise CheckpointError(
            f"params holds {len(values)} values; {tree!r} needs {tree.param_count} numbers "
            "(a diverged model's nan is written as null and cannot be read back)"
        )
    with torch.no_grad():
        tree.params.copy_(torch.tensor(values, dtype=torch.float64))
    return tree
