"""Where a hand-written adjoint ends and torch's own differentiation takes over.

A few ops have an adjoint written out by hand, which is faster on a CPU and keeps less in memory. It
knows one thing: a plain backward, once. Everything else (torch.func's grad, vmap, jvp and their
compositions, forward mode, a second derivative) goes through a form of plain torch operations with
the same values, so that nobody need know which engine can do what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work here."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def observed() -> bool:
    """Whether torch does anything but run operations now: it traces, transforms, counts or fakes
    them, which code that it does not know would escape."""
    return (
        torch.compiler.is_compiling()
        or transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def too_narrow(*grads: Tensor) -> bool:
    """Inside a backward: whether it is to be differentiated itself (create_graph), or is given many
    gradients at once (is_grads_batched), neither of which a hand-written adjoint can do."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    batched = any(is_batched(g) for g in grads)
    return batched or torch.is_grad_enabled() or transformed()


def gradients(
    run: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of run(*inputs), by autograd; they can be differentiated in turn.

    Args:
        run: plain torch operations; returns a tensor or a tuple of them.
        inputs: tensors and other things, as a backward has saved them.
        grads: of what run returns, in its order.

    Returns:
        one for each input, None for those that need none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: an input that was computed from another one must not count as a path to it.
        aliases = [x.view_as(x) if _needs(x) else x for x in inputs]
        outputs = run(*aliases)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    wanted = [x for x in aliases if _needs(x)]
    found = iter(
        torch.autograd.grad(
            outputs, wanted, grads, create_graph=create_graph, materialize_grads=True
        )
    )
    return tuple(next(found) if _needs(x) else None for x in aliases)


def _needs(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
