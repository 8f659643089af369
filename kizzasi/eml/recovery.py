"""Find an exact EML tree from samples: trainable master formulas, and an exhaustive search.

A master formula of depth D is the full binary tree of eml nodes in which every input chooses among
1, the variables and (above the lowest level) the child below it. Choices are softmax weights at a
temperature tau that falls during training; snapped to their largest weight they are a tree.

Glossary (Odrzywolek 2026, arXiv:2603.21852):
    R, S, V     restarts trained side by side, sample points, variables
    logits      per input, over (1, variables, child); 5 * 2^D - 6 of them for V = 1
    tau         temperature of the choices
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kizzasi.eml.exact import ONE, Tree, complex_eml, evaluate, leaf, node
from kizzasi.errors import SpecError

_EXPONENT_LIMIT = 30.0  # keeps exp and its gradient finite while choices are still mixed
_MAX_SET = 3_000_000


class MasterFormula(nn.Module):
    """R master formulas of one depth, evaluated together on complex128.

    Args:
        depth: levels of eml nodes, 1 or more.
        variables: names, in the order of the rows given to `forward`.
        restarts: R.
        seed: of the initial logits.
    """

    def __init__(self, depth: int, variables: list[str], restarts: int, seed: int = 0) -> None:
        super().__init__()
        if depth < 1 or not variables or restarts < 1:
            raise SpecError(f"depth {depth}, variables {variables}, restarts {restarts}: need >= 1")
        self.depth, self.variables = depth, variables
        generator = torch.Generator().manual_seed(seed)
        n_leaf = 1 + len(variables)
        # Level 0 is the lowest: 2^D inputs without children, then halving towards the root.
        self.levels = nn.ParameterList(
            torch.randn(
                restarts,
                2 ** (depth - level),
                n_leaf + (level > 0),
                generator=generator,
                dtype=torch.float64,
            )
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


def _relative_error(values: Tensor, target: Tensor) -> Tensor:
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
        target: (S), real or complex.
        depth: of the formula.
        restarts, steps, lr: how many run side by side, for how long, how fast.
        tau: temperature at the start and at the end.
        sweeps: greedy passes over the snapped choices.
        tolerance: relative error that counts as exact.
        seed: of the initial logits.

    Source: arXiv:2603.21852, section 4 (master formula); the annealing and mending are our own.
    """
    x = torch.stack([v.to(torch.complex128) for v in variables.values()])
    y = target.to(torch.complex128)
    model = MasterFormula(depth, list(variables), restarts, seed)
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
        return _relative_error(model.mix(hard, x, limit=709.0), y)

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
        error = float(_relative_error(evaluate(tree, variables).expand_as(y), y))
        if error <= tolerance:
            return Recovery(tree, error, len(hits))
    return Recovery(None, float(best.min()), 0)


# -- exhaustive search ---------------------------------------------------------------------------


class TreeSet:
    """Every EML tree up to some depth with its values on the samples, equal values once.

    Args:
        variables: name to (S) samples, as complex128 rows of `values` in the same order.
    """

    def __init__(self, variables: Mapping[str, Tensor]) -> None:
        rows = [torch.ones_like(next(iter(variables.values())), dtype=torch.complex128)]
        rows += [v.to(torch.complex128) for v in variables.values()]
        self.leaves = [ONE, *(leaf(name) for name in variables)]
        self.values = torch.stack(rows)
        # Row i >= len(leaves) is eml(pairs[i - len(leaves)]), rows of the set one depth below.
        self.pairs = torch.zeros(0, 2, dtype=torch.int64)
        self.depth = 0

    @property
    def next_size(self) -> int:
        return len(self.leaves) + len(self.values) ** 2

    @torch.no_grad()
    def grow(self) -> None:
        """Go one level deeper. Rows keep their place, so earlier pairs stay valid."""
        n, m = len(self.values), len(self.leaves)
        index = torch.cartesian_prod(torch.arange(n), torch.arange(n))
        values = complex_eml(self.values[index[:, 0]], self.values[index[:, 1]])
        fine = values.isfinite().all(1)
        values, index = values[fine], index[fine]
        known = torch.cat((self.values, values))
        fresh = _first_of_each(known)
        fresh = fresh[fresh >= n] - n
        self.values = torch.cat((self.values, values[fresh]))
        self.pairs = torch.cat((self.pairs, index[fresh]))
        assert len(self.pairs) + m == len(self.values)
        self.depth += 1

    def tree(self, row: int) -> Tree:
        """Rebuild one row's tree."""
        if row < len(self.leaves):
            return self.leaves[row]
        left, right = self.pairs[row - len(self.leaves)].tolist()
        return node(self.tree(left), self.tree(right))


def _first_of_each(values: Tensor) -> Tensor:
    """Return the sorted first rows among those equal to about 11 digits."""
    weight = torch.linspace(1.0, 2.0, 2 * values.shape[1], dtype=torch.float64)
    parts = torch.view_as_real(values).flatten(1)
    key = torch.asinh(parts) @ weight  # compressed, so that one huge sample hides no other
    mantissa, exponent = torch.frexp(key)
    rounded = torch.ldexp(torch.round(mantissa * 2.0**37), exponent)
    _, inverse = torch.unique(rounded, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(values), dtype=torch.int64)
    first.scatter_reduce_(0, inverse, torch.arange(len(values)), "amin")
    return first.sort().values


@torch.no_grad()
def search_tree(
    variables: Mapping[str, Tensor],
    target: Tensor,
    max_depth: int,
    tolerance: float = 1e-8,
) -> Recovery:
    """Find the shallowest EML tree that fits the samples, exhaustively where that is possible.

    Sets of trees are enumerated while they have at most 3 million members (depth 4 for one
    variable). One level more costs no enumeration: target = exp(L) - ln(R) is solved for every R
    at once, by looking exp(L) = target + ln(R) up in a sorted table. Beyond that, one child is
    taken from the shallow sets and the other solved for, so the search is no longer complete.

    Args:
        variables: name to (S) samples; 8 or more, with S the same for all.
        target: (S), real or complex.
        max_depth: of the tree.
        tolerance: relative error that counts as exact.
    """
    y = target.to(torch.complex128)
    known = TreeSet(variables)
    while True:
        error = _relative_error(known.values, y)
        if error.min() <= tolerance:
            return _checked(known.tree(int(error.argmin())), variables, y, tolerance)
        if known.depth >= max_depth:
            return Recovery(None, float(error.min()), 0)
        if known.next_size > _MAX_SET:
            break
        known.grow()
    table = _Table(known)
    found = table.solve(y, tolerance)
    if found is None and max_depth > known.depth + 1:
        found = _peel(known, table, y, tolerance)
    if found is None or found.depth > max_depth:
        return Recovery(None, math.inf, 0)
    return _checked(found, variables, y, tolerance)


def _checked(tree: Tree, variables: Mapping[str, Tensor], y: Tensor, tolerance: float) -> Recovery:
    error = float(_relative_error(evaluate(tree, variables).expand_as(y), y))
    return Recovery(tree if error <= tolerance else None, error, int(error <= tolerance))


class _Table:
    """exp of every known tree, sorted by its real part at the first sample."""

    def __init__(self, known: TreeSet) -> None:
        self.known = known
        self.logs = torch.log(known.values)
        self.exps = torch.exp(known.values)
        keys = self.exps[:, 0].real
        usable = keys.isfinite() & (keys != 0)
        self.rows = usable.nonzero()[:, 0]
        self.keys, order = keys[usable].sort()
        self.rows = self.rows[order]

    def solve(self, y: Tensor, tolerance: float) -> Tree | None:
        """Return eml(L, R) = y with L and R known, if there is one."""
        wanted = (y[0] + self.logs[:, 0]).real
        slack = 0.01 * tolerance * (1 + wanted.abs())
        low = torch.searchsorted(self.keys, wanted - slack)
        high = torch.searchsorted(self.keys, wanted + slack)
        count = (high - low).clamp(max=32)
        for step in range(int(count.max())):
            right = (count > step).nonzero()[:, 0]
            left = self.rows[low[right] + step]
            # A second sample sorts out almost all chance hits before the full comparison.
            error = (self.exps[left, -1:] - self.logs[right, -1:] - y[-1:]).abs()
            near = error[:, 0] <= tolerance * (1 + y[-1].abs())
            left, right = left[near], right[near]
            if len(left) == 0:
                continue
            error = _relative_error(self.exps[left] - self.logs[right], y)
            if error.min() <= tolerance:
                hit = int(error.argmin())
                return node(self.known.tree(int(left[hit])), self.known.tree(int(right[hit])))
        return None


_PEEL = 60


def _peel(known: TreeSet, table: _Table, y: Tensor, tolerance: float) -> Tree | None:
    """Solve for one child of the root, the other being one of the shallowest trees."""
    for row in range(min(_PEEL, len(known.values))):
        left = torch.log(y + table.logs[row])
        right = torch.exp(table.exps[row] - y)
        for child, is_left in ((left, True), (right, False)):
            if not bool(child.isfinite().all()):
                continue
            found = table.solve(child, tolerance)
            if found is not None:
                other = known.tree(row)
                return node(found, other) if is_left else node(other, found)
    return None
