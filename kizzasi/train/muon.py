"""Muon: momentum whose update is made orthogonal, for matrices; AdamW for all other parameters.

Glossary
    M       momentum of a matrix (rows, columns), the moving average of its gradients
    O(M)    the nearest matrix with equal singular values: U V' of the decomposition U S V'

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale is that of Liu et al. 2025,
arXiv:2502.16982, section 2.2.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from kizzasi.errors import SpecError

# A quintic whose fixed points lie in [0.7, 1.2] and whose slope at 0 is steep: five rounds take
# every singular value above about 1e-3 of the norm there.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(M: Tensor, rounds: int = 5) -> Tensor:
    """O(M) of a batch of matrices, by Newton-Schulz iteration.

        X = M / |M|;   X <- a X + (b A + c A A) X  with A = X X',   `rounds` times

    Singular values end near 1 (0.7 to 1.2), not at 1. In bfloat16 on CUDA, in M's dtype elsewhere.

    Args:
        M: (n, rows, columns), floating.

    Returns:
        (n, rows, columns) in M's dtype; zeros where M is zero.
    """
    a, b, c = QUINTIC
    wide = M.shape[-2] <= M.shape[-1]
    X = M.bfloat16() if M.is_cuda else M
    X = X if wide else X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X if wide else X.mT).to(M.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for the groups that say so, AdamW for the others: one optimiser for a whole model.

        M <- mu M + (1 - mu) G
        W <- W - lr decay W - lr 0.2 sqrt(max(rows, columns)) O(mu M + (1 - mu) G)

    The factor 0.2 sqrt(.) gives an update the size of AdamW's, so that rates are of one kind.

    Args:
        groups: from `parameter_groups(module, ..., optimizer="muon")`, or groups of your own: a
            group with "rows" holds matrices. "rows" lists how many rows each part of a fused matrix
            has, () for matrices of one part; parts, and the matrices of a stack (n, rows, columns),
            are made orthogonal each by itself.
        lr, weight_decay: for groups that give none.
        momentum: mu.
        betas, eps: of AdamW.

    Raises:
        SpecError: a group with "rows" holds what is no matrix, or the rows do not add up.
    """

    def __init__(
        self,
        groups: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "rows": None,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            if group["rows"] is None:
                continue
            for p in group["params"]:
                if p.ndim not in (2, 3):
                    raise SpecError(
                        f"rows: a group of matrices holds one of shape {tuple(p.shape)}"
                    )
                if group["rows"] and sum(group["rows"]) != p.shape[-2]:
                    raise SpecError(
                        f"rows: {group['rows']} do not add up to the {p.shape[-2]} there"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            if present:
                (self._adamw if group["rows"] is None else self._muon)(group, present)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        mu, rate, alike = group["momentum"], group["lr"], defaultdict(list)
        directions = []
        for p in parameters:
            assert p.grad is not None
            memory = self.state[p]
            if not memory:
                memory["momentum"] = torch.zeros_like(p)
            memory["momentum"].lerp_(p.grad, 1 - mu)
            direction = p.grad.lerp(memory["momentum"], mu)
            if isinstance(direction, DTensor):  # a sharded matrix is made orthogonal as a whole
                direction = direction.full_tensor()
            directions.append(direction)
            for part in direction.split(list(group["rows"]) or direction.shape[-2], -2):
                alike[part.shape[-2:]].append(part)  # views: written to below
        for (rows, columns), parts in alike.items():
            stack = torch.cat([part.reshape(-1, rows, columns) for part in parts])
            stack = orthogonalise(stack).mul_(0.2 * math.sqrt(max(rows, columns)))
            sizes = [part.numel() // (rows * columns) for part in parts]
            for part, new in zip(parts, stack.split(sizes), strict=True):
                part.copy_(new.view(part.shape))
        for p, direction in zip(parameters, directions, strict=True):
            if isinstance(p, DTensor):
                direction = distribute_tensor(direction, p.device_mesh, p.placements)
            p.mul_(1 - rate * group["weight_decay"]).sub_(direction, alpha=rate)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
