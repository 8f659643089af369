"""What layers that step in place have in common.

`Steps` is one layer, or one part of a layer, that goes on along one line: its state is its own, and
is written into. It does what the recurrent form does, with fewer and cheaper calls: what no token
changes is looked up, checked and laid out once, when decoding begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.decoding.own_cache import disown, own
from kizzasi.models.mixer import Mixer, MixerOut
from kizzasi.models.norm import Norm

Run = Callable[[Tensor], Tensor]
WIDE = (torch.float32, torch.float64)
SIDE_BY_SIDE = 2**20  # numbers: larger matrices wait for memory, and gain nothing by one call less


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


class About(NamedTuple):
    """What the layers of one line have in common.

    rows    b.
    dtype   of all parameters: float32 or float64.
    shared  what one layer has made and others use, by name.
    """

    rows: int
    dtype: torch.dtype
    shared: dict[str, Any]


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


def direct(layer: nn.Module) -> Run:
    """What a layer does to x (b, d). Anything but a plain Linear, an adapter say, is called."""
    if type(layer) is not nn.Linear:
        return layer
    weight, bias = layer.weight, layer.bias
    return lambda x: F.linear(x, weight, bias)


def side_by_side(*layers: nn.Module) -> Run:
    """x (b, d) to the outputs of several layers, joined; of plain and small ones in one product, of
    a copy of their weights."""
    linear = [layer for layer in layers if type(layer) is nn.Linear]
    biases = [layer.bias for layer in linear if layer.bias is not None]
    small = sum(layer.weight.numel() for layer in linear) <= SIDE_BY_SIDE
    if len(linear) < len(layers) or len(biases) not in (0, len(layers)) or not small:
        runs = [direct(layer) for layer in layers]
        return lambda x: torch.cat([run(x) for run in runs], -1)
    weight = torch.cat([layer.weight.detach() for layer in linear])
    bias = torch.cat(biases) if biases else None
    return lambda x: F.linear(x, weight, bias)


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
    """A mixer of any kind."""
    return Called(lambda x, state, call: mixer.recurrent(x, state, call), state)
