"""Coordinate descent on flattened attention along the exact one-by-one path, on the CPU.

The sequence of trials is known beforehand; only which of them succeed is not. A window holds the
next few trials of q, k or v, and every trial of the out tree among them. All outcomes of the former
are evaluated together, so a window is walked to its end whatever succeeds. A trial of the out tree
moves one column of the output: its gain under each outcome costs one column, and gains on different
columns add up. A trial of an unused softmax tree never succeeds and costs nothing.

Arrays are numpy's: at these sizes most of an operation's cost is its call, and numpy's is lowest.

Glossary:
    S, n, r        samples, positions (seq_len), channels per position (d_k)
    z, u           a head's value before and after its chain of EML operators, kept as (heads, S)
    A, C           attention weights, and A V, the context
    slot           a set of succeeded trials of the window: bit j stands for its j-th trial of q, k
                   or v; slot 0 is the present point
    column         one value of the output, O in all
    stretch        successive trials that touch no head of q, k or v twice
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kizzasi.eml.core.table import OUT, SOFTMAX, Q, V, parameter_table
from kizzasi.eml.core.tree import SafeTree
from kizzasi.eml.operator import EXP_LIMIT
from kizzasi.eml.search.coordinate import MARGIN

_BLOCK = 512  # trials between recomputations, which keep rounding errors from piling up
_SMALL = 512  # with fewer output values a call costs more than its elements: two trials a window
_MOST_OUTS = 16  # trials of the out tree in a window
_PADDING = 40  # keeps the rows of a matrix from equal places in memory pages, which is slow
_TINY = np.finfo(np.float64).tiny


def _chain(
    start: np.ndarray, coefficients: np.ndarray, floor: bool, clamp: bool = False
) -> np.ndarray:
    """`eml_chain` of safe nodes, with coefficients (depth * 3, ...): c0, c1, c2 + 1 per level.

    Exponents rarely leave their bounds, so they are clamped only after some have been seen to.
    """
    v, y = start, np.empty_like(start)
    exponents = np.empty((len(coefficients) // 3, *v.shape))
    for level in range(len(exponents)):
        x = exponents[level]
        np.abs(v, y)
        np.add(y, coefficients[3 * level + 2], y)
        if floor:
            np.maximum(y, _TINY, out=y)
        np.log(y, y)
        np.multiply(v, coefficients[3 * level], x)
        np.add(x, coefficients[3 * level + 1], x)
        if clamp:
            np.clip(x, -EXP_LIMIT, EXP_LIMIT, out=x)
        v = np.exp(x)
        np.subtract(v, y, v)
    if clamp or not len(exponents):
        return v
    high, low = np.maximum.reduce(exponents, None), np.minimum.reduce(exponents, None)
    if high <= EXP_LIMIT and low >= -EXP_LIMIT:
        return v
    return _chain(start, coefficients, floor, clamp=True)


def _needs_floor(coefficients: np.ndarray) -> bool:
    """Say whether |v| + c2 + 1 can fall below the logarithm's floor."""
    guard = coefficients[2::3]
    return guard.size > 0 and bool(guard.min() < _TINY)


def _softmax(scores: np.ndarray, axis: int) -> np.ndarray:
    weight = scores - np.maximum.reduce(scores, axis, keepdims=True)
    np.exp(weight, weight)
    return np.divide(weight, np.add.reduce(weight, axis, keepdims=True), weight)


def _sum_over_samples(error: np.ndarray) -> np.ndarray:
    """Return (slots, columns) sums of squares of (slots, S, columns)."""
    return np.einsum("ijk,ijk->ik", error, error)


class Walk:
    """The path of one trial after another, under the numerical softmax, on the CPU in float64.

    `ListedDescent` is the definition; this is its path at a fraction of the work.

    Args:
        trees: what a trial's index runs over, in order: q, k, v, an unused softmax tree or none,
            out; read at the start, and changed by `run`.
        seq_len: positions.
        inputs, targets: (S, seq * d_model), on the CPU.
    """

    def __init__(
        self, trees: Sequence[SafeTree], seq_len: int, inputs: Tensor, targets: Tensor
    ) -> None:
        self.parameters = [tree.params.detach() for tree in trees]
        self.ends = np.cumsum([0, *map(len, self.parameters)]).tolist()
        self.flat = torch.cat(self.parameters).double().numpy()
        self.table = parameter_table(trees, seq_len)
        self.n, self.depth = seq_len, trees[0].depth
        self.n_in, self.n_ctx, self.n_out = trees[0].inputs, trees[0].heads, targets.shape[1]
        self.d_k = self.n_ctx // self.n
        self.scale = self.d_k**-0.5
        self.inputs, self.targets = (each.double().numpy() for each in (inputs, targets))
        self.count = self.targets.size
        self.width = 2 if self.count <= _SMALL else 1
        n_samples, slots = len(inputs), 1 << self.width
        # Numbered as in `parameter_table`: inputs, a gap, ones for biases, zeros for chains.
        self.rows = np.zeros((self.n_in + self.n_ctx + 2, n_samples))
        self.rows[: self.n_in], self.rows[-2] = self.inputs.T, 1.0
        self.u = np.empty((3 * self.n_ctx, slots, n_samples))
        bits = self.u.reshape(-1, *[2] * self.width, n_samples)
        self.with_bit = [np.moveaxis(bits, self.width - j, 1)[:, 1] for j in range(self.width)]
        self.context = np.zeros((self.n_ctx + 2, slots, n_samples))
        self.context[-2] = 1.0
        split = (self.n, self.d_k, slots, n_samples)
        self.q, self.k, self.v = self.u.reshape(3, *split)
        self.rows_of_context = self.context[:-2].reshape(split)
        # z, chains and targets; columns that trials of the out tree touch come first, then slots
        # 1, 2, .. in full.
        self.tail = slots * n_samples * _MOST_OUTS
        self.end = self.tail + (slots - 1) * self.count
        self.z = np.empty(self.end)
        self.out = np.empty((3 * self.depth + 1, self.end + _PADDING))

    def _tree(self, which: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return W (heads, inputs), b (heads) and c0, c1, c2 + 1 of all levels, (., heads)."""
        flat = self.flat[self.ends[which] : self.ends[which + 1]]
        heads = self.n_ctx if which < 3 else self.n_out
        n_chain = 3 * self.depth * heads
        weight, bias, chain = np.split(flat, (len(flat) - n_chain - heads, len(flat) - n_chain))
        chain = chain.reshape(heads, -1).T.copy()
        chain[2::3] += 1.0
        return weight.reshape(heads, -1), bias, chain

    def _refresh(self) -> None:
        """Recompute everything about the present point."""
        *heads, out = (self._tree(which) for which in (0, 1, 2, len(self.ends) - 2))
        weight, bias, chain = (
            np.concatenate(each, -1)
            for each in zip(*((w.T, b, c) for w, b, c in heads), strict=True)
        )
        self.z_heads = weight.T @ self.inputs.T + bias[:, None]
        self.chains = np.concatenate((chain, np.zeros((1, chain.shape[1]))))  # a row for no slot
        self.u[:, 0] = _chain(self.z_heads, chain[..., None], _needs_floor(chain))
        weight, bias, chain = out
        self.out_weight = np.concatenate((weight.T, bias[None]))
        self.floor = _needs_floor(chain)
        columns = self.out[:, self.tail : self.end].reshape(
            len(self.out), -1, len(self.inputs), self.n_out
        )
        columns[:-1] = chain[:, None, None]
        columns[-1] = self.targets
        self.columns = chain
        self.scores, self.weight = (each[:, :, 0] for each in self._attend(0, 1))
        self.base_z = self.context[:-1, 0].T @ self.out_weight
        self.error = _chain(self.base_z, columns[:-1, 0], self.floor) - self.targets
        self.total = float(np.vdot(self.error, self.error))

    def loss(self) -> float:
        """Return the mean squared error of the present point."""
        with np.errstate(all="ignore"):
            self._refresh()
        return self.total / self.count

    def run(
        self, index: np.ndarray, delta: np.ndarray, margin: float = MARGIN
    ) -> tuple[float, int]:
        """Run the trials in order; return the final loss and how many were kept."""
        self.best, self.accepts, self.margin = self.loss(), 0, margin
        with np.errstate(all="ignore"):
            for start in range(0, len(index), _BLOCK):
                self._refresh()
                self._run(index[start : start + _BLOCK], delta[start : start + _BLOCK])
        for parameter, first, last in zip(self.parameters, self.ends, self.ends[1:], strict=False):
            parameter.copy_(torch.from_numpy(self.flat[first:last]))
        return self.best, self.accepts

    def _run(self, index: np.ndarray, delta: np.ndarray) -> None:
        self.index, self.delta = index.tolist(), delta
        self.step = delta.tolist()
        self.facts = self.table[:, index]
        self.kind, self.head, self.row, self.slot, self.position, self.channel = self.facts.tolist()
        for first, last in self._stretches():
            inner = [trial for trial in range(first, last) if self.kind[trial] < SOFTMAX]
            self.moved = dict(zip(inner, self._move_heads(inner), strict=True)) if inner else {}
            while first < last:
                first = self._window(first, last)

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """Yield the first trial of each stretch and the one after its last."""
        first, seen = 0, set()
        for trial, (kind, head) in enumerate(zip(self.kind, self.head, strict=True)):
            if kind < SOFTMAX:
                if head in seen:
                    yield first, trial
                    first, seen = trial, set()
                seen.add(head)
        yield first, len(self.kind)

    def _move_heads(self, trials: list[int]) -> np.ndarray:
        """Return (trials, S): what trials of q, k and v would make of the heads they touch."""
        _, head, row, slot, _, _ = self.facts.take(trials, 1)
        step = self.delta.take(trials)
        z = self.rows.take(row, 0)
        z *= step[:, None]
        z += self.z_heads.take(head, 0)
        chain = self.chains.take(head, 1)
        chain[slot, np.arange(len(trials))] += step
        chain = chain[:-1, :, None]
        return _chain(z, chain, _needs_floor(chain))

    def _window(self, first: int, last: int) -> int:
        """Walk as many trials as fit in a window; return the first one after them."""
        inner: list[int] = []
        outs: dict[int, int] = {}
        stop = first
        while stop < last:
            kind, head = self.kind[stop], self.head[stop]
            if kind < SOFTMAX:
                if len(inner) == self.width:
                    break
                inner.append(stop)
            elif kind == OUT:
                if head in outs or len(outs) == _MOST_OUTS:
                    break
                outs[head] = stop
            stop += 1
        if inner or outs:
            self._walk(first, stop, inner, list(outs.values()))
        return stop

    def _walk(self, first: int, stop: int, inner: list[int], outs: list[int]) -> None:
        """Evaluate all outcomes of a window's trials, decide them in order, keep what succeeded."""
        slots = 1 << len(inner)
        if self.width == 1 and inner:
            self._attend_moved(inner[0], copy=bool(outs))
        elif inner:
            self.u[:, 1:slots] = self.u[:, :1]
            for with_bit, trial in zip(self.with_bit, inner, strict=False):
                with_bit[self.head[trial]] = self.moved[trial]
            self._attend(1, slots)
            rows = self.context[:-1, 1:slots].reshape(self.n_ctx + 1, -1)
            np.dot(rows.T, self.out_weight, self._z(slots).reshape(-1, self.n_out))
        columns = [self.head[trial] - 3 * self.n_ctx for trial in outs]
        error, tail_error, tail_z = self._errors(slots, outs, columns)
        totals = [self.total, *(float(np.vdot(each, each)) for each in error)]
        gain = _sum_over_samples(tail_error)
        if outs:
            gain[:1] -= _sum_over_samples(self.error.take(columns, 1)[None])
            gain[1:] -= _sum_over_samples(error.take(columns, 2))
        at, kept = self._decide(range(first, stop), inner, outs, totals, gain.tolist())
        if at:
            for j, trial in enumerate(inner):
                if at >> j & 1:
                    self._keep_inner(trial)
            if self.width == 1:
                where, move = self.moved_context
                self.rows_of_context[:, :, 0][where] += move
            else:
                self.context[:-2, 0] = self.context[:-2, at]
            self.base_z, self.error = self._z(slots)[at - 1].copy(), error[at - 1]
        for m in kept:
            self._keep_out(outs[m], columns[m])
            self.base_z[:, columns[m]] = tail_z[at, :, m]
            self.error[:, columns[m]] = tail_error[at, :, m]

    def _decide(
        self,
        trials: range,
        inner: list[int],
        outs: list[int],
        totals: list[float],
        gains: list[list[float]],
    ) -> tuple[int, list[int]]:
        """Return the slot that trials lead to, and which of `outs` succeed."""
        bits, places = ({trial: i for i, trial in enumerate(each)} for each in (inner, outs))
        at, kept = 0, []
        for trial in trials:
            if trial in bits:
                to, also = at | 1 << bits[trial], kept
            elif trial in places:
                to, also = at, [*kept, places[trial]]
            else:
                continue
            total = totals[to]
            for m in also:
                total += gains[to][m]
            if total / self.count + self.margin < self.best:
                self.best, self.total, at, kept = total / self.count, total, to, also
                self.accepts += 1
                self.flat[self.index[trial]] += self.step[trial]
        return at, kept

    def _z(self, slots: int) -> np.ndarray:
        """Return (slots - 1, S, O): the output before its chains, in slots 1, 2, .."""
        flat = self.z[self.tail : self.tail + (slots - 1) * self.count]
        return flat.reshape(slots - 1, len(self.inputs), self.n_out)

    def _errors(
        self, slots: int, outs: list[int], columns: list[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return errors (slots - 1, S, O), and errors and z (slots, S, outs) of changed columns."""
        tail_shape = (slots, len(self.inputs), len(outs))
        n_tail, floor = math.prod(tail_shape), self.floor
        part = slice(self.tail - n_tail, self.tail + (slots - 1) * self.count)
        tail_z = self.z[self.tail - n_tail : self.tail].reshape(tail_shape)
        if outs:
            moved = self.context.take([self.row[trial] - self.n_in for trial in outs], 0)[:, :slots]
            moved *= self.delta.take(outs)[:, None, None]
            tail_z[0] = self.base_z.take(columns, 1)
            tail_z[1:] = self._z(slots).take(columns, 2)
            tail_z += moved.transpose(1, 2, 0)
            chain = self.columns.take(columns, 1)
            for m, trial in enumerate(outs):
                if self.slot[trial] < len(chain):
                    chain[self.slot[trial], m] += self.step[trial]
                    floor = floor or _needs_floor(chain)
            tail = self.out[:, self.tail - n_tail : self.tail].reshape(-1, *tail_shape)
            tail[:-1], tail[-1] = chain[:, None, None], self.targets.take(columns, 1)
        error = _chain(self.z[part], self.out[:-1, part], floor) - self.out[-1, part]
        full = error[n_tail:].reshape(slots - 1, len(self.inputs), self.n_out)
        return full, error[:n_tail].reshape(tail_shape), tail_z

    def _keep_inner(self, trial: int) -> None:
        head, p, c = self.head[trial], self.position[trial], self.channel[trial]
        if self.width == 1 and self.kind[trial] != V:
            change = (self.moved[trial] - self.u[head, 0]) * self.scale
            if self.kind[trial] == Q:
                self.scores[p] += self.k[:, c, 0] * change
            else:
                self.scores[:, p] += self.q[:, c, 0] * change
            self.weight = _softmax(self.scores, 1)
        self.u[head, 0] = self.moved[trial]
        self.z_heads[head] += self.step[trial] * self.rows[self.row[trial]]
        if self.slot[trial] < 3 * self.depth:
            self.chains[self.slot[trial], head] += self.step[trial]

    def _keep_out(self, trial: int, column: int) -> None:
        slot = self.slot[trial]
        if slot == 3 * self.depth:
            self.out_weight[self.row[trial] - self.n_in, column] += self.step[trial]
            return
        self.columns[slot, column] += self.step[trial]
        full = self.out[slot, self.tail : self.end].reshape(-1, self.n_out)
        full[:, column] = self.columns[slot, column]
        self.floor = self.floor or _needs_floor(self.columns)

    def _attend(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Fill slots of the context; return scores and weights, (n, n, slots, S)."""
        q, k, v = (each[:, :, first:stop] for each in (self.q, self.k, self.v))
        scores = np.add.reduce((q * self.scale)[:, None] * k, 2)
        weight = _softmax(scores, 1)
        self.rows_of_context[:, :, first:stop] = np.add.reduce(weight[:, :, None] * v, 1)
        return scores, weight

    def _attend_moved(self, trial: int, copy: bool) -> None:
        """Fill slot 1 of z for one trial of q, k or v, and slot 1 of the context if `copy`."""
        where, part, move = self._move_context(trial)
        self.moved_context = where, move
        z = self._z(2)[0]
        np.dot(move.reshape(-1, len(self.inputs)).T, self.out_weight[part], z)
        z += self.base_z
        if copy:
            self.context[:-2, 1] = self.context[:-2, 0]
            self.rows_of_context[:, :, 1][where] += move

    def _move_context(self, trial: int) -> tuple[int | tuple | slice, slice, np.ndarray]:
        """Return where the context (n, r) moves, in which of its n r values, and by how much."""
        head, p, c = self.head[trial], self.position[trial], self.channel[trial]
        change = self.moved[trial] - self.u[head, 0]
        if self.kind[trial] == V:
            part = slice(c, self.n_ctx, self.d_k)
            return (slice(None), c), part, self.weight[:, p] * change
        before = self.rows_of_context[:, :, 0]
        change *= self.scale
        if self.kind[trial] == Q:
            weight = _softmax(self.scores[p] + self.k[:, c, 0] * change, 0)
            row = np.add.reduce(weight[:, None] * self.v[:, :, 0], 0)
            return p, slice(p * self.d_k, (p + 1) * self.d_k), row - before[p]
        # A weight w grows by the factor 1 + e; renormalised, its row moves by g (v_p - C) with
        # g = w e / (1 + w e), unless w is nearly all there is.
        share = np.expm1(self.q[:, c, 0] * change)
        share *= self.weight[:, p]
        rest = share + 1.0
        if np.minimum.reduce(rest, None) > 0.01:
            move = self.v[p, :, 0] - before
            move *= (share / rest)[:, None]
        else:
            self.u[:, 1] = self.u[:, 0]
            self.u[head, 1] = self.moved[trial]
            self._attend(1, 2)
            move = self.rows_of_context[:, :, 1] - before
        return slice(None), slice(0, self.n_ctx), move
