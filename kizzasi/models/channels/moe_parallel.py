"""Expert parallelism: every process keeps some of the experts and the jobs travel to them.

Call `MoE.share_experts(group)` in every process, then train as before. Each process routes its own
tokens; rows are exchanged by all-to-all before and after the experts. A call of the model is
collective: all processes of the group must make it, even one without jobs for another's experts.

Symbols: p processes, e experts, m jobs of this process, m' jobs for its experts, d d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models.ops.experts import sort_by_expert
from kizzasi.models.ops.routing import Assignments


def share_of(experts: nn.ModuleList, group: dist.ProcessGroup) -> nn.ModuleList:
    """This process's share of the experts: e / p consecutive ones.

    Raises:
        SpecError: p does not divide e.
    """
    n, world, rank = len(experts), dist.get_world_size(group), dist.get_rank(group)
    if n % world:
        raise SpecError(f"n_experts: {n} cannot be shared by {world} processes; pick a multiple")
    share = n // world
    return experts[rank * share : (rank + 1) * share]


def mix_over_processes(
    x: Tensor,
    to: Assignments,
    n_experts: int,
    group: dist.ProcessGroup,
    mix: Callable[[Tensor, Assignments], Tensor],
) -> Tensor:
    """Send jobs to the processes that keep their experts, and bring the results back.

    Args:
        x: (n, d) tokens of this process.
        to: their jobs, with experts numbered over all processes.
        n_experts: e, over all processes.
        group: the processes.
        mix: runs this process's experts on rows (m', d), with experts numbered from 0.

    Returns:
        (n, d), in x's dtype. Gradients of an expert are summed over the tokens of all processes.
    """
    order, counts = sort_by_expert(to, n_experts)
    world = dist.get_world_size(group)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    leave = counts.view(world, -1).sum(1).tolist()
    arrive = arriving.view(world, -1).sum(1).tolist()
    token = to.token[order]
    rows = _Exchange.apply(x[token], arrive, leave, group)
    assert isinstance(rows, Tensor)
    local = torch.arange(n_experts // world, device=x.device).repeat(world)
    here = Assignments(
        torch.arange(len(rows), device=x.device),
        local.repeat_interleave(arriving),
        torch.ones(len(rows), dtype=to.weight.dtype, device=x.device),
    )
    back = _Exchange.apply(mix(rows, here), leave, arrive, group)
    assert isinstance(back, Tensor)
    wide = back * to.weight[order, None]
    return wide.new_zeros(len(x), wide.shape[1]).index_add(0, token, wide).to(x.dtype)


class _Exchange(torch.autograd.Function):
    """all_to_all_single whose gradient travels the other way."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, arrive: list[int], leave: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.splits, ctx.group = (leave, arrive), group
        return _all_to_all(x, arrive, leave, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        arrive, leave = ctx.splits
        return _all_to_all(grad, arrive, leave, ctx.group), None, None, None


def _all_to_all(x: Tensor, arrive: list[int], leave: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(arrive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), arrive, leave, group=group)
    return out
