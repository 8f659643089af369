"""What layers that step in place have in common.

`Steps` is one layer, or one part of a layer, that goes on along one line: its state is its own, and
is written into. It does what the recurrent form does, with fewer and cheaper calls: what no token
changes is looked up, checked and laid out once, when decoding begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.decoding.own_cache import disown, own
from kizzasi.models.mixer import Mixer, MixerOut
from kizzasi.models.norm import GatedNorm, Norm
from kizzasi.models.parts.linear import is_plain
from kizzasi.models.parts.quantized import QuantizedLinear

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program

Run = Callable[[Tensor], Tensor]
WIDE = (torch.float32, torch.float64)
CALLED = "called"  # of About.shared: a layer before is called, and may share what nobody knows of
CENTRED = ("layer", "layer_unbiased")  # norms that take the mean off
COPIED = 2**26  # numbers at most of all weights that are laid out anew: 256 MiB in float32


class Unfit(Exception):
    """A layer, or a part of it, that cannot be written as instructions of a program."""


class Steps(ABC):
    """One layer along one line of tokens."""

    @abstractmethod
    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """One token, x (b, d), to y (b, d). The call is this token's alone."""

    @abstractmethod
    def value(self) -> Any:
        """The state as the layer's recurrent form takes it: a copy, which no later step touches."""

    def write(self, program: Program, x: Tensor) -> Tensor:
        """Write what `__call__` does as instructions, from x (b, d) to y (b, d), rooms of the
        program, which from then on writes the state. Raises Unfit for what it cannot say."""
        raise Unfit


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


class Weights:
    """The parameters of a model as they are now, to be told when they are others."""

    def __init__(self, model: nn.Module) -> None:
        self.tables: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.parameters: list[Tensor] = []
        for table in (m._parameters for m in model.modules()):
            for name, parameter in table.items():
                if parameter is not None:
                    self.tables.append(table)
                    self.names.append(name)
                    self.parameters.append(parameter)
        inference = any(p.is_inference() for p in self.parameters)  # which count no versions
        self.reads = [Tensor.data_ptr] if inference else [Tensor.data_ptr, attrgetter("_version")]
        self.read = [list(map(read, self.parameters)) for read in self.reads]

    def same(self) -> bool:
        """Whether none was replaced, moved or written into since."""
        return all(map(is_, map(dict.get, self.tables, self.names), self.parameters)) and all(
            list(map(read, self.parameters)) == found
            for read, found in zip(self.reads, self.read, strict=True)
        )


class Products:
    """Products of activations with weights, as fast as torch has them.

    Weights of plain Linears are copied, transposed and side by side, when they are first used: few
    rows are multiplied by such a matrix in two thirds of the time, and several layers in one call.
    One line after another of the same weights may share the copies.

    Args:
        copied: how many numbers may be copied; 0 for a few tokens only, which do not repay it.
    """

    def __init__(self, copied: int = COPIED) -> None:
        self.copied = self.left = copied
        self.copies: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        self.weights: Weights | None = None

    def watch(self, model: nn.Module) -> Weights:
        """The model's weights, once nothing is kept of earlier ones."""
        if self.weights is None or not self.weights.same():
            self.weights, self.left = Weights(model), self.copied
            self.copies.clear()
        return self.weights

    def of(self, *layers: nn.Module) -> Product:
        """x (b, d) to the outputs of all layers, joined. Anything but a plain Linear, an adapter
        say, is called."""
        return Product(self, layers)

    def copy(self, layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None] | None:
        """(d, outputs of all) and their biases; None where there is no room for it."""
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        key = tuple(id(layer) for layer in layers)
        if key not in self.copies:
            size = sum(layer.weight.numel() for layer in layers)
            if size > self.left or len(biases) not in (0, len(layers)):
                return None
            self.left -= size
            weight = torch.cat([layer.weight.detach() for layer in layers]).t().contiguous()
            self.copies[key] = weight, torch.cat(biases) if biases else None
        return self.copies[key]

    def experts(self, weights: Tensor) -> list[Run]:
        """x (b, d) to its products with each of (n, out, d)."""
        key = (id(weights),)
        if key not in self.copies and weights.numel() <= self.left:
            self.left -= weights.numel()
            self.copies[key] = weights.detach().mT.contiguous(), None
        if key not in self.copies:
            return [partial(_product, weight) for weight in weights.unbind()]
        return [partial(_transposed, weight) for weight in self.copies[key][0].unbind()]


class Product:
    """See `Products.of`."""

    def __init__(self, products: Products, layers: Sequence[nn.Module]) -> None:
        self.products, self.layers = products, layers

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)

    @cached_property
    def _run(self) -> Run:
        linear = [layer for layer in self.layers if is_plain(layer)]
        copy = self.products.copy(linear) if len(linear) == len(self.layers) else None
        if copy is None:
            return _joined(self.layers)
        weight, bias = copy
        if bias is None:
            return lambda x: torch.mm(x, weight)
        return lambda x: torch.addmm(bias, x, weight)

    def write(self, program: Program, x: Tensor, name: str) -> Tensor:
        """As instructions, to a room of this name; see `Steps.write`."""
        rows = [_outputs(layer, program.dtype) for layer in self.layers]
        y = program.room(name, sum(rows))
        for layer, part in zip(self.layers, y.split(rows, 1), strict=True):
            assert isinstance(layer, (nn.Linear, QuantizedLinear)), "or it has no outputs"
            bias = None if layer.bias is None else readable(layer.bias)
            if isinstance(layer, QuantizedLinear):
                assert layer.levels is not None, "or it has no outputs"
                program.packed(x, layer.levels, bias, part)
            else:
                program.product(x, readable(layer.weight), bias, part)
        return y


def _outputs(layer: nn.Module, dtype: torch.dtype) -> int:
    """How many outputs a layer has whose product is an instruction; raises Unfit for others."""
    if is_plain(layer):
        return layer.out_features
    if type(layer) is not QuantizedLinear or dtype != torch.float32 or layer.levels is None:
        raise Unfit
    return layer.n_out


def readable(weight: Tensor) -> Tensor:
    """A weight as instructions read it: rows of neighbours. Raises Unfit if it lies otherwise."""
    if weight.stride(-1) != 1 and weight.shape[-1] != 1:
        raise Unfit
    return weight.detach()


def write_norm(norm: nn.Module, program: Program, x: Tensor, y: Tensor) -> Tensor:
    """y = norm(x) of every stretch of the norm's width, as an instruction; y may be x."""
    if type(norm) is nn.RMSNorm and norm.weight is None:
        eps = torch.finfo(program.dtype).eps if norm.eps is None else norm.eps
        program.norm(x, y, norm.normalized_shape[0], None, None, eps)
        return y
    if type(norm) is not Norm or norm.engine != "auto":
        raise Unfit
    weight, bias = readable(norm.weight), None if norm.bias is None else readable(norm.bias)
    if norm.kind == "scale":
        weight = (weight / norm.d**0.5).expand(norm.d).contiguous()
    how = {"centred": norm.kind in CENTRED, "plus_one": norm.kind == "rms_plus_one"}
    program.norm(x, y, norm.d, weight, bias, norm.eps, **how)
    return y


def write_gated(norm: nn.Module | None, program: Program, y: Tensor, z: Tensor) -> None:
    """y = norm(y silu(z)), norm(y) silu(z) or y silu(z), as instructions. Raises Unfit."""
    if norm is not None and type(norm) is not GatedNorm:
        raise Unfit
    if norm is None or not norm.norm_before_gate:
        program.gate("silu", z, y, y)
    if norm is not None:
        width = y.shape[1] // norm.n_groups
        program.norm(y, y, width, readable(norm.weight), None, norm.eps, each=True)
        if norm.norm_before_gate:
            program.gate("silu", z, y, y)


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
    if norm.kind in CENTRED:
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
