"""How parameters start. Drawn from a generator, so that a seed means the same everywhere.

| part | rule | source |
|---|---|---|
| embedding, head | N(0, 0.02^2) | Radford et al. 2019 (GPT-2) |
| Linear into a layer (q_proj, up_proj, in_proj) | U(+-1/sqrt(n_in)), bias 0 | He et al. 2015 |
| Linear out of a residual branch (o_proj, down_proj) | the same / sqrt(2 n_layers) | GPT-2, 2.3 |
| norms | weight 1, bias 0 | |
| Mamba-1 A_log | log(1..n) in every channel | Gu & Dao 2023, 3.6 |
| Mamba-1 dt_proj | U(+-rank^-0.5); softplus(bias) log-uniform in [1e-3, 1e-1] | same |
| Mamba-1 conv1d | weight and bias U(+-d_conv^-0.5) | torch's Conv1d |
| Mamba-1 out_proj | U(+-1/sqrt(n_in)) / sqrt(n_layers) | state-spaces/mamba |
| Mamba-1 D | 1 | same |
| S4D A, B, C, dt | ops/s4.py: lin, inv, legs, real | Gu et al. 2022, arXiv:2206.11893 |
| RWKV-7 | mixers/rwkv7.py: ramps over depth and width | Peng et al. 2025, arXiv:2503.14456 |
"""

from __future__ import annotations

import math
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kizzasi.errors import SpecError


class Ready(ABCMeta):
    """Type of the modules that are checked before, and initialised after, their constructor runs.

    torch's generator draws (`torch.manual_seed`), on the CPU and in float32, so that a seed means
    the same on every device and for every default dtype; the module then goes to torch's default
    device and dtype. Under `torch.device("meta")` nothing is allocated: call `reset_parameters`
    after `to_empty`.

    A class of this type has `admit(*args)`, which refuses arguments, and `start(*args)`, which sets
    every parameter and buffer; both are given what the constructor is given.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        cls.admit(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        home, dtype = torch.get_default_device(), torch.get_default_dtype()
        if home.type == "meta":
            return super().__call__(*args, **kwargs)
        with torch.device("meta"):
            module = super().__call__(*args, **kwargs)
        materialize(module, lambda: module.start(*args, **kwargs))
        return module.to(device=home, dtype=dtype)


def materialize(module: nn.Module, initialize: Callable[[], object]) -> None:
    """Give a module's meta tensors memory on the CPU, floats in float32, and initialise it.

    Parts that were handed in ready-made, and so are not on the meta device, keep their values.
    Raises SpecError naming a parameter or buffer that `initialize` leaves unset.
    """

    def memory(t: Tensor) -> Tensor:
        dtype = torch.float32 if t.is_floating_point() else t.dtype
        return torch.empty_like(t, device="cpu", dtype=dtype) if t.is_meta else t

    bare = {name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta}
    module._apply(memory)
    tensors = [
        (name, t)
        for name, t in (*module.named_parameters(), *module.named_buffers())
        if name in bare and (t.is_floating_point() or t.is_complex())
    ]
    with torch.no_grad():
        for _, tensor in tensors:
            tensor.fill_(math.nan)
        initialize()
        for name, tensor in tensors:
            if tensor.sum().isnan():
                raise SpecError(
                    f"{type(module).__name__}: its initialisation leaves {name} unset; let "
                    "reset_parameters set every parameter and buffer"
                )


def normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    with torch.no_grad():
        weight.normal_(0.0, std, generator=generator)


def uniform_(weight: Tensor, bound: float, generator: torch.Generator | None) -> None:
    with torch.no_grad():
        weight.uniform_(-bound, bound, generator=generator)


def linear_(layer: nn.Linear, generator: torch.Generator | None, scale: float = 1.0) -> None:
    """Uniform with the fan-in bound, times scale; bias zero."""
    uniform_(layer.weight, scale / math.sqrt(layer.in_features), generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def residual_scale(n_layers: int) -> float:
    """Scale of a Linear that ends one of the 2 n_layers residual branches."""
    return 1.0 / math.sqrt(2 * n_layers)


def softplus_inverse(x: Tensor) -> Tensor:
    """y with log(1 + exp(y)) = x, for x > 0."""
    return x + torch.log(-torch.expm1(-x))
