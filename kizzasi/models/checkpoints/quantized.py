"""Models whose weights stay in 4 or 8 bits: the layers themselves are parts/quantized.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models.model import SequenceModel
from kizzasi.models.ops.packed import GROUP
from kizzasi.models.parts.linear import is_plain
from kizzasi.models.parts.quantized import LevelTensor, QuantizedLinear
from kizzasi.models.stems import TokenStem

ROW_BLOCK = 16  # the kernel wants a multiple of so many outputs
MANY = 8  # rows from which on a product waits for arithmetic, not for memory
BEST = 64  # logits that a head computes exactly


class QuantizedHead(nn.Module):
    """Logits from a quantized matrix, the likeliest of them computed again from the full one.

    bfloat16 has 8 bits, so that logits near 20 are multiples of 1/8 and the best ones tie. The 64
    best of a row are therefore exact products; so are all if there are more than 8 rows at once.

    Args:
        weight: (v, d) in full, such as a tied embedding.
        levels: the same in integers.
    """

    def __init__(self, weight: Tensor, levels: LevelTensor) -> None:
        super().__init__()
        self.weight, self.coarse = weight, QuantizedLinear(levels)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) to (..., v)."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > MANY:
            return F.linear(x, self.weight)
        logits = self.coarse(rows)
        best = logits.topk(min(BEST, logits.shape[-1]), sorted=False).indices
        exact = (self.weight[best] @ rows[..., None])[..., 0]
        return logits.scatter(-1, best, exact).view(*x.shape[:-1], -1)


def quantize(model: SequenceModel, weights: Mapping[str, LevelTensor]) -> None:
    """Replace layers of a model by quantized ones, in place; nothing in it is trainable then.

    Every `nn.Linear` of the blocks whose weight is given is replaced, and the head; a tied
    embedding stays, in full, to look tokens up. A matrix whose rows are no multiple of 16 stays.

    Args:
        model: on the CPU.
        weights: by name, such as "blocks.0.mixer.q_proj.weight".

    Raises:
        SpecError: the model is not on the CPU.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise SpecError(f"quantized: its kernels run on the CPU only, not on {device}; use cpu")
    model.requires_grad_(False)
    fitting = {name: w for name, w in weights.items() if len(w.level) % ROW_BLOCK == 0}
    for path, module in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(module, nn.Linear) and f"{path}.weight" in fitting:
            parent, _, name = path.rpartition(".")
            layer = QuantizedLinear(fitting[f"{path}.weight"], module.bias)
            layer._forward_hooks = module._forward_hooks
            layer._forward_pre_hooks = module._forward_pre_hooks
            setattr(model.get_submodule(parent), name, layer)
    stem = model.stem
    if not isinstance(stem, TokenStem):
        return
    source, full = (
        ("embedding", stem.embedding) if stem.lm_head is None else ("lm_head", stem.lm_head)
    )
    if f"stem.{source}.weight" in fitting:
        head = QuantizedHead(full.weight, fitting[f"stem.{source}.weight"])
        stem.lm_head = head  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def quantize_weights(model: SequenceModel, bits: Literal[4, 8] = 8) -> None:
    """Round the weights of a model's projections and head to 4 or 8 bits, in place, for decoding on
    the CPU; nothing in it is trainable then.

    Hooks, and adapters around a layer, go on acting. What must not be rounded (step sizes, decays,
    routers, norms), experts that are packed, and matrices whose inputs are no multiple of 32 or
    outputs no multiple of 16, stay as they are. So does the file: save the model before.

    Args:
        model: on the CPU.
        bits: 8 changes a layer's result by less than 1% of its size, 4 by about 7%.

    Raises:
        SpecError: the model is not on the CPU, or there are no such bits.
    """
    if bits not in (4, 8):
        raise SpecError(f"bits: {bits!r}; choose 4 or 8")
    layers = dict(model.blocks.named_modules(prefix="blocks"))
    found = {f"{name}.weight": m.weight for name, m in layers.items() if is_plain(m)}
    stem = model.stem
    if isinstance(stem, TokenStem):
        tied = stem.lm_head is None
        head = stem.embedding if stem.lm_head is None else stem.lm_head
        if type(head) is nn.Embedding or is_plain(head):
            found["stem.embedding.weight" if tied else "stem.lm_head.weight"] = head.weight  # pyright: ignore[reportArgumentType]
    whole = {name: w for name, w in found.items() if w.shape[1] % GROUP == 0}
    quantize(model, {name: levels(weight, bits) for name, weight in whole.items()})


def levels(weight: Tensor, bits: int) -> LevelTensor:
    """The nearest of 2^bits equally spaced values between the ends of each group."""
    groups = weight.detach().float().unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2, keepdim=True)
    most, middle = 2**bits - 1, 128 if bits == 8 else 0
    scale = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / most
    level = ((groups - low) / scale).round().clamp(0, most) - middle
    return LevelTensor(level.to(torch.int8), scale, low + middle * scale)
