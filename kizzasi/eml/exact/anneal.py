"""Find an exact EML tree from samples by training; see `tree_search` for an exhaustive search.

A master formula of depth D is the full binary tree of eml nodes in which every input chooses among
1, the variables and (above the lowest level) the child below it. Choices are softmax weights at a
temperature tau that falls during training; snapped to their largest weight they are a tree.

Glossary (Odrzywolek 2026, arXiv:2603.21852):
    R, S, V     restarts trained side by side, sample points, variables
    logits      per input, over (1, variables, child); 5 * 2^D - 6 of them for V = 1
    tau         temperature of the choices
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kizzasi.eml.exact.tree import ONE, Tree, evaluate, leaf, node, samples_of
from kizzasi.errors import SpecError

_EXPONENT_LIMIT = 30.0  # keeps exp and its gradient finite while choices are still mixed


class MasterFormula(nn.Module):
    """R master formulas of one depth, evaluated together on complex128.

    Args:
        depth: levels of eml nodes, 1 or more.
        variables: names, in the order of the rows given to `forward`.
        restarts: R.
        seed: of the initial logits, which are the same on any device.
        device: where the logits live.
    """

    def __init__(
        self,
        depth: int,
        variables: list[str],
        restarts: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if depth < 1 or not variables or restarts < 1:
            raise SpecError(f"depth {depth}, variables {variables}, restarts {restarts}: need >= 1")
        self.depth, self.variables = depth, variables
        generator = torch.Generator("cpu").manual_seed(seed)
        n_leaf = 1 + len(variables)
        # Level 0 is the lowest: 2^D inputs without children, then halving towards the root.
        self.levels = nn.ParameterList(
            torch.randn(
                restarts,
                2 ** (depth - level),
                n_leaf + (level > 0),
                generator=generator,
                dtype=torch.float64,
                device="cpu",
            ).to(device)
            for level in range(depth)
        )

    @property
    def parameter_count(self) -> int:
        """Logits per restart."""
        return sum(level[0].numel() for level in self.levels)

    def forward(self, x: Tensor, tau: float) -> Tensor:
        """Evaluate at x (V, S), complex128; return (R, S)."""
        return self.mix([torch.softmax(level / tau, -1) for level in self.levels], x)

    def mix(self, choices: list[Tensor], x: Tensor, limit: float = _EXPONENT_LIMIT) -> Tensor:
        """Evaluate with given choice weights, one (R, inputs, options) per level.

        Exponents are clamped to +-limit, for the sake of gradients between choices.
        """
        leaves = torch.cat((torch.ones_like(x[:1]), x))
        value: Tensor | None = None
        for weight in choices:
            known = weight[..., : len(leaves)].to(x.dtype) @ leaves
            if value is not None:
                known = known + weight[..., len(leaves) :] * value
            left, right = known[:, 0::2], known[:, 1::2]
            real = left.real.clamp(-limit, limit)
            size = right.abs().clamp_min(1e-300)
            log = torch.complex(size.log(), torch.atan2(right.imag, right.real + 1e-300))
            value = torch.polar(real.exp(), left.imag) - log
        assert value is not None
        return value[:, 0]

    def snap(self) -> list[Tensor]:
        """Return the chosen option per input, one int64 (R, inputs) per level."""
        return [level.detach().argmax(-1) for level in self.levels]

    def tree(self, snapped: list[Tensor], restart: int) -> Tree:
        """Build one restart's snapped tree; branches that nothing chose disappear."""
        leaves = [ONE, *(leaf(name) for name in self.variables)]
        below: list[Tree] = []
        for level in snapped:
            picked = level[restart].tolist()
            inputs = [
                leaves[option] if option < len(leaves) else below[at]
                for at, option in enumerate(picked)
            ]
            below = [node(*pair) for pair in zip(inputs[0::2], inputs[1::2], strict=True)]
        return below[0]


@dataclass(frozen=True)
class Recovery:
    """What was found: the tree (None if none fits), its error, and how many restarts agree."""

    tree: Tree | None
    error: float
    hits: int


def relative_error(values: Tensor, target: Tensor) -> Tensor:
    """Return the largest |value - target| / (1 + |target|) over the last dimension."""
    error = (values - target).abs() / (1 + target.abs())
    return error.nan_to_num(torch.inf, torch.inf).amax(-1)


def train_master_formula(
    variables: Mapping[str, Tensor],
    target: Tensor,
    depth: int,
    *,
    restarts: int = 256,
    steps: int = 300,
    lr: float = 0.2,
    tau: tuple[float, float] = (2.0, 0.2),
    sweeps: int = 4,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> Recovery:
    """Train many master formulas by Adam while tau falls, snap them, and mend single choices.

    The loss is the mean of ln(1 + |f - target|^2) plus an entropy of the choices that grows as tau
    falls. After snapping, `sweeps` passes try every other option of every input, one at a time.

    Args:
        variables: name to (S) samples.
        target: (S), real or complex, on the variables' device, where the training runs.
        depth: of the formula.
        restarts, steps, lr: how many run side by side, for how long, how fast.
        tau: temperature at the start and at the end.
        sweeps: greedy passes over the snapped choices.
        tolerance: relative error that counts as exact.
        seed: of the initial logits.

    Raises:
        SpecError: no variable, no sample, or a size below 1.
        ShapeError: samples of different lengths.

    Source: arXiv:2603.21852, section 4 (master formula); the annealing and mending are our own.
    """
    x = samples_of(variables, target)
    y = target.to(torch.complex128)
    model = MasterFormula(depth, list(variables), restarts, seed, x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        progress = step / max(1, steps - 1)
        now = tau[0] * (tau[1] / tau[0]) ** progress
        error = (model(x, now) - y).abs().nan_to_num(1e6, 1e6)
        loss = torch.log1p(error.square()).mean(1).sum()
        for level in model.levels:
            p = torch.softmax(level / now, -1)
            loss = loss - 0.01 * progress * (p * (p + 1e-12).log()).sum()
        optimizer.zero_grad()
        loss.backward()
        for level in model.levels:
            assert level.grad is not None
            level.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
    return _mend(model, model.snap(), x, y, variables, sweeps, tolerance)


@torch.no_grad()
def _mend(
    model: MasterFormula,
    snapped: list[Tensor],
    x: Tensor,
    y: Tensor,
    variables: Mapping[str, Tensor],
    sweeps: int,
    tolerance: float,
) -> Recovery:
    """Improve snapped choices one at a time, all restarts in parallel."""
    options = [level.shape[-1] for level in model.levels]

    def error_of(choices: list[Tensor]) -> Tensor:
        pairs = zip(choices, options, strict=True)
        hard = [nn.functional.one_hot(c, n).double() for c, n in pairs]
        return relative_error(model.mix(hard, x, limit=709.0), y)

    best = error_of(snapped)
    for _ in range(sweeps):
        before = best
        for level, n_options in zip(snapped, options, strict=True):
            for at in range(level.shape[1]):
                original = level[:, at].clone()
                for shift in range(1, n_options):
                    kept = level[:, at].clone()
                    level[:, at] = (original + shift) % n_options
                    error = error_of(snapped)
                    better = error < best
                    level[:, at] = torch.where(better, level[:, at], kept)
                    best = torch.where(better, error, best)
        if torch.equal(before, best):
            break
    hits = (best <= tolerance).nonzero()[:, 0]
    for restart in hits.tolist() or [int(best.argmin())]:
        tree = model.tree(snapped, restart)
        error = float(relative_error(evaluate(tree, variables).expand_as(y), y))
        if error <= tolerance:
            return Recovery(tree, error, len(hits))
    return Recovery(None, float(best.min()), 0)
