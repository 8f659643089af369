"""What an op's kernels must show before their first use on a device: their definition's results.

A kernel that a compiler or a driver spoils would give numbers that look like any others. So the
first call of an op on a CUDA device runs the kernels and the defining loop on one small example,
forward and backward, and refuses to go on where they disagree. Nothing is swapped for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.ops import (
    conv,
    decay_scan,
    delta,
    devices,
    linear_attention,
    mimo,
    selective_scan,
    ssd,
    wkv7,
)

F = TypeVar("F", bound=Callable[..., Any])
ROWS, TOKENS, HEADS, KEYS, CHANNELS = 2, 70, 2, 20, 24  # 70: a chunk and a rest
FAR = {"highest": 1e-3, "high": 1e-3, "medium": 3e-2}  # of the largest number; wrong ones are off


def proven(op: F) -> F:
    """The op, which proves itself on each CUDA device before it works there.

    Raises:
        SpecError: the kernels disagree with the loop; says by how much, and what to do.
    """
    reference, example = EXAMPLES[op.__name__]
    done: set[torch.device] = set()

    @wraps(op)
    def run(first: Tensor, *rest: Any, **named: Any) -> Any:
        if devices.on_cuda(first) and first.device not in done and not _captured():
            prove(op, reference, example, first.device)
            done.add(first.device)
        return op(first, *rest, **named)

    return run  # pyright: ignore[reportReturnType]


def _captured() -> bool:
    """A CUDA graph that is being recorded takes no other work."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def prove(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    example: Callable[[], tuple[Any, ...]],
    device: torch.device,
) -> None:
    """Raise SpecError unless op's outputs, state and gradients on `device` are the reference's."""
    with torch.inference_mode(False), torch.enable_grad():
        given = example()
        found, expected = (_results(run, given, device) for run in (op, reference))
    far = max(_apart(x, y) for x, y in zip(found, expected, strict=True))
    if not far <= FAR[torch.get_float32_matmul_precision()]:
        raise SpecError(
            f"engine: 'triton' of {op.__name__} is {far:.1e} away from its defining loop on "
            f'{device}; use engine="torch", and please report it with the output of kizzasi doctor'
        )


def _results(
    run: Callable[..., Any], given: tuple[Any, ...], device: torch.device
) -> tuple[Tensor, ...]:
    leaves: list[Tensor] = []

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x if x is None else type(x)(*map(moved, x))
        x = x.to(device)
        if x.is_floating_point():
            leaves.append(x.requires_grad_())
        return x

    y, state = run(*map(moved, given))
    after = (state,) if isinstance(state, Tensor) else state
    out = torch.cat([x.flatten() for x in (y, *after)])
    weights = torch.linspace(-1, 1, len(out), device=device)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


def _apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-6))


class _Drawn:
    """Inputs, small and the same at every call; the program's own generators are left alone."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu", dtype=torch.float32) / 2

    def tokens(self, *shape: int) -> Tensor:
        return self(ROWS, TOKENS, *shape)

    def decays(self, *shape: int) -> Tensor:
        return -self.tokens(*shape).square()

    def starts(self) -> Tensor:
        return torch.rand(ROWS, TOKENS, generator=self.generator, device="cpu") < 0.05


def _linear() -> tuple[Any, ...]:
    x, key = _Drawn(), (HEADS, KEYS)
    streams = x.tokens(*key), x.tokens(*key), x.tokens(HEADS, CHANNELS), x.decays(*key)
    return *streams, x(*key), x(ROWS, *key, CHANNELS), x.starts()


def _ssd() -> tuple[Any, ...]:
    x, state = _Drawn(), (ROWS, HEADS, CHANNELS, KEYS)
    keys = x.tokens(1, KEYS), x.tokens(1, KEYS)
    return x.tokens(HEADS, CHANNELS), x.decays(HEADS), *keys, x(*state), x.starts()


def _trapezoid(*rank: int) -> tuple[Any, ...]:
    x, heads = _Drawn(), (HEADS, *rank)
    gates = x.tokens(HEADS).exp(), x.decays(HEADS), x.tokens(HEADS).sigmoid()
    keys = x.tokens(*heads, KEYS), x.tokens(*heads, KEYS)
    state = x(ROWS, HEADS, CHANNELS, KEYS), x(ROWS, *heads, KEYS), x(ROWS, *heads, CHANNELS)
    memory = ssd.TrapezoidState(*state)
    return x.tokens(*heads, CHANNELS), *gates, *keys, memory, x.starts()


def _key(x: _Drawn) -> Tensor:
    return torch.nn.functional.normalize(x.tokens(HEADS, KEYS), dim=-1)


def _delta(gates: int) -> tuple[Any, ...]:
    x, s0 = _Drawn(), (ROWS, HEADS, KEYS, CHANNELS)
    streams = x.tokens(HEADS, KEYS), _key(x), x.tokens(HEADS, CHANNELS), x.decays(HEADS, KEYS)
    shapes = ((HEADS,),) if gates == 1 else ((HEADS, KEYS), (HEADS, CHANNELS))
    return *streams, *(x.tokens(*shape).sigmoid() for shape in shapes), x(*s0), x.starts()


def _wkv7() -> tuple[Any, ...]:
    x, key = _Drawn(), (HEADS, KEYS)
    lookup = _key(x)
    streams = x.tokens(*key), x.decays(*key), x.tokens(*key), x.tokens(*key), -lookup
    return *streams, lookup * x.tokens(*key).sigmoid(), x(ROWS, *key, KEYS), x.starts()


def _conv() -> tuple[Any, ...]:
    x, k = _Drawn(), 4
    return x.tokens(CHANNELS), x(CHANNELS, k), x(CHANNELS), x(ROWS, CHANNELS, k - 1), x.starts()


def _decay() -> tuple[Any, ...]:
    x = _Drawn()
    return x.decays(CHANNELS), x.tokens(CHANNELS), x(ROWS, CHANNELS), x.starts()


def _scan() -> tuple[Any, ...]:
    x, d, n = _Drawn(), CHANNELS, KEYS
    rates, keys = -x(d, n).exp(), (x.tokens(n), x.tokens(n))
    return x.tokens(d), x.tokens(d).exp() / 9, rates, *keys, x(d), x(ROWS, d, n), x.starts()


# op: its defining loop, and makes the arguments
EXAMPLES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "linear_attention": (linear_attention.linear_attention_ref, _linear),
    "ssd": (ssd.ssd_ref, _ssd),
    "trapezoid": (ssd.trapezoid_ref, _trapezoid),
    "mimo_trapezoid": (mimo.mimo_trapezoid_ref, lambda: _trapezoid(2)),
    "delta_rule": (delta.delta_rule_ref, lambda: _delta(1)),
    "delta_rule_2": (delta.delta_rule_2_ref, lambda: _delta(2)),
    "wkv7": (wkv7.wkv7_ref, _wkv7),
    "causal_conv1d": (conv.causal_conv1d_ref, _conv),
    "decay_scan": (decay_scan.decay_scan_ref, _decay),
    "selective_scan": (selective_scan.selective_scan_ref, _scan),
}
