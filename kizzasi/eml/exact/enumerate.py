"""Find an exact EML tree from samples by enumeration, meeting in the middle where that ends.

Glossary:
    S, P, N     sample points; probes, the samples that are looked at first; known trees
    y           the target; after peeling, what the unknown child must be
    L, R        children of eml(L, R) = exp(L) - ln(R)
    peel        choose the sibling of the unknown child of a root, and solve for the child
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from kizzasi.eml.exact.anneal import Recovery, relative_error
from kizzasi.eml.exact.tree import ONE, Tree, complex_eml, evaluate, leaf, node, samples_of

_MAX_SET = 3_000_000
_MAX_EQUAL = 32  # rows of one key, and fits of one chunk, that are looked at
_CHUNK = 2**20
_KEY_WEIGHTS = (1.0, 0.618, 0.786)  # any, without a relation


class TreeSet:
    """Every EML tree up to some depth with its values on the samples, equal values once.

    Args:
        variables: name to (S) samples, as complex128 rows of `values` in the same order.
    """

    def __init__(self, variables: Mapping[str, Tensor]) -> None:
        first = next(iter(variables.values()), torch.ones(0))
        rows = samples_of(variables, first)
        self.leaves = [ONE, *(leaf(name) for name in variables)]
        self.values = torch.cat((torch.ones_like(rows[:1]), rows))
        # Row i >= len(leaves) is eml(pairs[i - len(leaves)]), rows of the set one depth below.
        self.pairs = torch.zeros(0, 2, dtype=torch.int64, device=rows.device)
        self.ends = [len(self.values)]  # per depth, the first row that is deeper

    @property
    def depth(self) -> int:
        return len(self.ends) - 1

    @property
    def next_size(self) -> int:
        return len(self.leaves) + len(self.values) ** 2

    def level(self, depth: int) -> range:
        """Return the rows of exactly this depth."""
        return range(self.ends[depth - 1] if depth else 0, self.ends[depth])

    @torch.no_grad()
    def grow(self) -> None:
        """Go one level deeper. Rows keep their place, so earlier pairs stay valid."""
        n, m = len(self.values), len(self.leaves)
        each = torch.arange(n, device=self.values.device)
        index = torch.cartesian_prod(each, each)
        values = complex_eml(self.values[index[:, 0]], self.values[index[:, 1]])
        fine = values.isfinite().all(1)
        values, index = values[fine], index[fine]
        known = torch.cat((self.values, values))
        fresh = _first_of_each(known)
        fresh = fresh[fresh >= n] - n
        self.values = torch.cat((self.values, values[fresh]))
        self.pairs = torch.cat((self.pairs, index[fresh]))
        assert len(self.pairs) + m == len(self.values)
        self.ends.append(len(self.values))

    def tree(self, row: int) -> Tree:
        """Rebuild one row's tree."""
        if row < len(self.leaves):
            return self.leaves[row]
        left, right = self.pairs[row - len(self.leaves)].tolist()
        return node(self.tree(left), self.tree(right))


def _first_of_each(values: Tensor) -> Tensor:
    """Return the sorted first rows among those equal to about 11 digits, and in their logarithm.

    Negative numbers a rounding error above and below the axis are equal, their logarithms are not.
    """
    parts = torch.cat((torch.view_as_real(values).flatten(1), values.angle()), 1)
    weight = torch.linspace(1.0, 2.0, parts.shape[1], dtype=parts.dtype, device=parts.device)
    key = torch.asinh(parts) @ weight  # compressed, so that one huge sample hides no other
    mantissa, exponent = torch.frexp(key)
    rounded = torch.ldexp(torch.round(mantissa * 2.0**37), exponent)
    _, inverse = torch.unique(rounded, return_inverse=True)
    first = inverse.new_full((int(inverse.max()) + 1,), len(values))
    rows = torch.arange(len(values), device=values.device)
    first.scatter_reduce_(0, inverse, rows, "amin")
    return first.sort().values


def _key(values: Tensor) -> Tensor:
    """Reduce (n, P) to (n), linearly, so that the key of a sum is the sum of keys.

    No probe alone would do: where exp(L) all but vanishes, thousands of trees are equal.
    """
    return values.real @ values.real.new_tensor(_KEY_WEIGHTS)


class _Table:
    """A function of every known tree at the probes, (N, P), sorted by `_key`."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        usable = values.isfinite().all(1).nonzero()[:, 0]
        self.keys, order = _key(values[usable]).sort()
        self.rows = usable[order]

    def rows_of(self, level: range) -> Tensor:
        """Return a level's rows, sorted by key."""
        return self.rows[(self.rows >= level.start) & (self.rows < level.stop)]

    def find(self, wanted: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Return indices into `wanted`, and for each a row whose key is equal to it."""
        slack = tolerance * (1 + wanted.abs())
        low = torch.searchsorted(self.keys, wanted - slack)
        near = self.keys[low.clamp_max(len(self.keys) - 1)] - wanted
        at = (near.abs() <= slack).nonzero()[:, 0]
        high = torch.searchsorted(self.keys, (wanted + slack)[at], right=True)
        count = (high - low[at]).clamp(max=_MAX_EQUAL)
        first = count.cumsum(0) - count
        index = at.repeat_interleave(count)
        step = torch.arange(len(index), device=index.device) - first.repeat_interleave(count)
        return index, self.rows[low[index] + step]


class TreeSearch:
    """Search for trees that fit samples; the sets and tables are made once, for any target.

    Sets of trees are enumerated while they have at most 3 million members (depth 4 for one
    variable). One level more costs no enumeration: y = exp(L) - ln(R) is solved for every R at
    once, by looking exp(L) = y + ln(R) up in a sorted table. Every further level peels the root:
    for a known sibling the other child is the new target,

        L = ln(y + ln R)        or        R = exp(exp(L) - y),

    and siblings of all the levels, with the last one's, are tried in the order of the lookups they
    cost. So the search is complete to one level beyond the sets, but for rounding and for trees in
    which something overflows.

    Args:
        variables: name to (S) samples; 8 or more, with S the same for all.
    """

    def __init__(self, variables: Mapping[str, Tensor]) -> None:
        self.variables = variables
        self.known = TreeSet(variables)

    @torch.no_grad()
    def find(
        self,
        target: Tensor,
        max_depth: int,
        tolerance: float = 1e-8,
        lookups: int = 250_000_000,
    ) -> Recovery:
        """Return the shallowest tree found that fits.

        Args:
            target: (S), real or complex.
            max_depth: of the tree.
            tolerance: relative error that counts as exact.
            lookups: most per level beyond the sets; some 10 million a second.
        """
        samples_of(self.variables, target)
        y, known, least = target.to(torch.complex128), self.known, math.inf
        for depth in range(max_depth + 1):
            if depth > known.depth:
                if known.next_size > _MAX_SET:
                    break
                known.grow()
            rows = known.level(depth)
            error = relative_error(known.values[rows.start : rows.stop], y)
            if error.min() <= tolerance:
                return Recovery(known.tree(rows[int(error.argmin())]), float(error.min()), 1)
            least = min(least, float(error.min()))
        for peels in range(max_depth - known.depth):
            for tree in self._peeled(y, peels, tolerance, lookups):
                error = relative_error(evaluate(tree, self.variables).expand_as(y), y)
                if error <= tolerance:
                    return Recovery(tree, float(error), 1)
        return Recovery(None, least, 0)

    @cached_property
    def _tables(self) -> tuple[_Table, _Table]:
        """exp and ln of the trees, at the first, the last and the middle sample."""
        values = self.known.values
        probes = values[:, [0, -1, values.shape[1] // 2]]
        return _Table(torch.exp(probes)), _Table(torch.log(probes))

    def _peeled(self, y: Tensor, peels: int, tolerance: float, lookups: int) -> Iterator[Tree]:
        """Yield trees that fit the probes, with `peels` siblings on the way to the last node."""
        known = self.known
        size = [len(known.level(depth)) for depth in range(known.depth + 1)]
        plans = [
            (2 ** (peels + (plan[-1] < known.depth)) * math.prod(size[d] for d in plan), plan)
            for plan in product(range(known.depth + 1), repeat=peels + 1)
        ]
        for cost, (*siblings, last) in sorted(plans):
            lookups -= cost
            if lookups < 0:
                return
            probes = y[[0, -1, len(y) // 2]][None]
            origin = torch.zeros(1, 0, 2, dtype=torch.int64, device=y.device)
            for depth in siblings:
                probes, origin = self._peel(probes, origin, known.level(depth))
            for at, left, right in self._last(probes, known.level(last), tolerance):
                tree = node(known.tree(left), known.tree(right))
                for row, is_left in origin[at].flip(0).tolist():
                    sibling = known.tree(row)
                    tree = node(tree, sibling) if is_left else node(sibling, tree)
                yield tree

    def _peel(self, y: Tensor, origin: Tensor, level: range) -> tuple[Tensor, Tensor]:
        """Replace targets (n, P) by their unknown children for every sibling of a level.

        `origin` (n, peels, 2) grows by the sibling's row and whether the unknown child is left.
        """
        exps, logs = (table.values[level.start : level.stop] for table in self._tables)
        power = (exps[:, None] - y).flatten(0, 1)  # ln of the right child
        child = torch.cat(((y + logs[:, None]).flatten(0, 1).log(), power.exp()))
        fine = child.isfinite().all(1)
        fine[len(power) :] &= (power.imag.abs() <= math.pi + 1e-9).all(1)  # as any logarithm
        rows = torch.arange(level.start, level.stop, device=y.device)
        row = rows.repeat_interleave(len(y)).repeat(2)
        is_left = torch.arange(len(row), device=y.device) < len(power)
        step = torch.stack((row, is_left.long()), 1)[:, None]
        origin = torch.cat((origin.repeat(2 * len(level), 1, 1), step), 1)
        return child[fine], origin[fine]

    def _last(self, y: Tensor, level: range, tolerance: float) -> Iterator[tuple[int, int, int]]:
        """Yield (n, L, R) with eml(L, R) = y[n] at the probes and L or R of this level."""
        exps, logs = self._tables
        sides = [(exps, logs, 1)]  # exp(L) = y + ln(R)
        if level.stop < len(exps.values):
            sides.append((logs, exps, -1))  # ln(R) = exp(L) - y
        for table, other, sign in sides:
            rows = other.rows_of(level)
            short, targets = (sign * _key(y)).sort()
            long = _key(other.values[rows])
            swap = len(short) > len(long)
            if swap:
                short, long = long, short
            # Ascending queries keep the table's pages in the cache.
            for start in range(0, len(short), chunk := max(1, _CHUNK // max(1, len(long)))):
                wanted = (short[start : start + chunk, None] + long).flatten()
                index, found = table.find(wanted, 0.01 * tolerance)
                first, second = index // len(long) + start, index % len(long)
                at, row = (targets[second], rows[first]) if swap else (targets[first], rows[second])
                left, right = (found, row) if sign > 0 else (row, found)
                error = exps.values[left] - logs.values[right] - y[at]
                turns = (error.imag / (2 * math.pi)).round()  # exp does not see whole turns
                error = torch.complex(error.real, error.imag - 2 * math.pi * turns).abs()
                fits = (error <= 100 * tolerance * (1 + y[at].abs())).all(1)
                yield from torch.stack((at, left, right), 1)[fits][:_MAX_EQUAL].tolist()


def search_tree(
    variables: Mapping[str, Tensor], target: Tensor, max_depth: int, tolerance: float = 1e-8
) -> Recovery:
    """Find the shallowest EML tree that fits the samples; see `TreeSearch` for many targets.

    Args:
        variables: name to (S) samples; 8 or more, with S the same for all.
        target: (S), real or complex, on the variables' device, where the search runs.
        max_depth: of the tree.
        tolerance: relative error that counts as exact.

    Raises:
        SpecError: no variable, or no sample.
        ShapeError: samples of different lengths.
    """
    return TreeSearch(variables).find(target, max_depth, tolerance)
