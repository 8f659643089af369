"""What layers that step in place have in common.

`Steps` is one layer, or one part of a layer, that goes on along one line: its state is its own, and
is written into. It does what the recurrent form does, with fewer and cheaper calls: what no token
changes is looked up, checked and laid out once, when decoding begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.decoding.own_cache import disown, own
from kizzasi.models.mixer import Mixer, MixerOut
from kizzasi.models.norm import Norm
from kizzasi.models.parts.linear import is_plain

Run = Callable[[Tensor], Tensor]
WIDE = (torch.float32, torch.float64)
COPIED = 2**26  # numbers at most of all weights that are laid out anew: 256 MiB in float32


class Steps(ABC):
    """One layer along one line of tokens."""

    @abstractmethod
    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """One token, x (b, d), to y (b, d). The call is this token's alone."""

    @abstractmethod
    def value(self) -> Any:
        """The state as the layer's recurrent form takes it: a copy, which no later step touches."""


class Called(Steps):
    """Any layer, by its recurrent form: `run` is that of a mixer, or a module to be called."""

    def __init__(self, run: Callable[..., MixerOut], state: Any) -> None:
        self.run, self.state = run, own(state)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        out = self.run(x, self.state, call=call)
        self.state = out.state
        if out.shared:
            call.shared = {**call.shared, **out.shared}
        return out.y

    def value(self) -> Any:
        return disown(self.state)


class Products:
    """Products of activations with weights, as fast as they can be had.

    Weights of plain Linears are copied, transposed and side by side: few rows are multiplied by
    such a matrix in two thirds of the time, and several layers in one call. One line after another
    may share the copies.

    Args:
        copied: how many numbers may be copied; 0 for a few tokens only, which do not repay it.
    """

    def __init__(self, copied: int = COPIED) -> None:
        self.left = copied
        self.weights: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    def of(self, *layers: nn.Module) -> Run:
        """x (b, d) to the outputs of all layers, joined. Anything but a plain Linear, an adapter
        say, is called."""
        linear = [layer for layer in layers if is_plain(layer)]
        biases = [layer.bias.detach() for layer in linear if layer.bias is not None]
        if len(linear) < len(layers) or len(biases) not in (0, len(layers)):
            return _joined(layers)
        key = tuple(id(layer) for layer in layers)
        if key not in self.weights:
            size = sum(layer.weight.numel() for layer in linear)
            if size > self.left:
                return _joined(layers)
            self.left -= size
            weight = torch.cat([layer.weight.detach() for layer in linear]).t().contiguous()
            self.weights[key] = weight, torch.cat(biases) if biases else None
        weight, bias = self.weights[key]
        if bias is None:
            return lambda x: torch.mm(x, weight)
        return lambda x: torch.addmm(bias, x, weight)

    def experts(self, weights: Tensor) -> list[Run]:
        """x (b, d) to its products with each of (n, out, d)."""
        key = (id(weights),)
        if key not in self.weights and weights.numel() <= self.left:
            self.left -= weights.numel()
            self.weights[key] = weights.detach().mT.contiguous(), None
        if key not in self.weights:
            return [partial(_product, weight) for weight in weights.unbind()]
        return [partial(_transposed, weight) for weight in self.weights[key][0].unbind()]


def _joined(layers: Sequence[nn.Module]) -> Run:
    runs = [_direct(layer) for layer in layers]
    return runs[0] if len(runs) == 1 else lambda x: torch.cat([run(x) for run in runs], -1)


def _direct(layer: nn.Module) -> Run:
    if not is_plain(layer):
        return layer
    weight, bias = layer.weight, layer.bias
    return lambda x: F.linear(x, weight, bias)


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def _transposed(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mm(x, weight)


class About(NamedTuple):
    """What the layers of one line have in common.

    rows    b.
    dtype   of all parameters: float32 or float64.
    shared  what one layer has made and others use, by name.
    products  of activations with weights.
    """

    rows: int
    dtype: torch.dtype
    shared: dict[str, Any]
    products: Products


class Stateless(Steps):
    """A layer that remembers nothing."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        return self.run(x)

    def value(self) -> tuple[()]:
        return ()


def undisturbed(module: nn.Module) -> bool:
    """Whether a call of a module does what its parts' classes say and no more."""
    return all(alone(part) for part in module.modules())


def alone(part: nn.Module) -> bool:
    """Whether no hook acts in a call of this very module, no other forward stands in its place, and
    no parameter is gathered, fetched or computed elsewhere."""
    hooked = part._forward_hooks or part._forward_pre_hooks
    if hooked or "forward" in part.__dict__ or part._compiled_call_impl is not None:
        return False
    given = [p for p in part._parameters.values() if p is not None]
    return all(type(p) is nn.Parameter and not p.is_meta for p in given)


def silent_hooks(module: nn.Module) -> list[Any]:
    """Where hooks of a module's parts would be kept, those that act without gradients, if there
    come to be any."""
    parts = list(module.modules())
    kept = [part._forward_hooks for part in parts] + [part._forward_pre_hooks for part in parts]
    return [hooks for hooks in kept if not hooks]


def wide_dtype(module: nn.Module) -> torch.dtype | None:
    """The one dtype of all parameters, if it is float32 or float64, so that nothing is rounded."""
    dtypes = {p.dtype for p in module.parameters()}
    return next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= {*WIDE} else None


def normed(norm: nn.Module | None, rows: int) -> Run | None:
    """What a norm does to x (b, d) of its own dtype, with so many rows."""
    if norm is None or type(norm) is not Norm:
        return norm
    weight: Tensor = norm.weight
    if norm.kind in ("layer", "layer_unbiased"):
        shape, bias, eps = (norm.d,), norm.bias, norm.eps
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)
    if rows > 1 or not weight.is_cpu or norm.eps <= 0:
        return norm.forward
    if norm.kind == "rms_plus_one":
        weight = 1 + weight
    elif norm.kind == "scale":
        weight = (weight / norm.d**0.5).expand(norm.d).contiguous()
    zeros, share, eps = torch.zeros_like(weight), 1 / norm.d, norm.eps

    def run(x: Tensor) -> Tensor:  # three calls where torch's own makes eight
        row = x.view(-1)
        size = float(torch.dot(row, row))
        return torch.addcmul(zeros, x, weight, value=(size * share + eps) ** -0.5)

    return run


def stepped(mixer: Mixer, state: Any) -> Called:
    """A mixer of any kind, or what stands in its place, such as an adapter of its parameters."""
    if not isinstance(mixer, Mixer):
        return Called(lambda x, state, call: mixer(x, state, call=call), state)
    return Called(lambda x, state, call: mixer.recurrent(x, state, call), state)
