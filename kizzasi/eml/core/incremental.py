"""Evaluate one-parameter changes of flattened attention by what they touch, not by a full forward.

A parameter of the out tree moves one output; one of q, k or v moves one channel of one position,
hence a low-rank part of the context. Both are worked out for many candidates at once; only the
out tree's chain is run in full, and only for q, k and v. Names are those of `trials.py`.
"""

import numpy as np
import torch
from torch import Tensor

from kizzasi.eml.core.tree import SafeTree
from kizzasi.eml.core.trials import FlatAttention, PlainTrials
from kizzasi.eml.operator import EXP_LIMIT

# Per thread: two float64 arrays of it stay in a second-level cache, and torch gives no thread less.
_CHUNK_ELEMENTS = 1 << 15
Q, K, V, SOFTMAX, OUT = range(5)  # kinds of parameters


def _chain(v: Tensor, c0: list[Tensor], c1: list[Tensor], guard: list[Tensor]) -> Tensor:
    """`tree_chain` in place on v, with guard = c2 + 1."""
    floor = torch.finfo(v.dtype).tiny
    y = torch.empty_like(v)
    for scale, shift, offset in zip(c0, c1, guard, strict=True):
        torch.abs(v, out=y)
        y.add_(offset).clamp_min_(floor).log_()
        torch.addcmul(shift, v, scale, out=v)
        v.clamp_(-EXP_LIMIT, EXP_LIMIT).exp_().sub_(y)
    return v


def _columns(coefficients: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Split (..., depth * 3) into c0, c1 and c2 + 1 per level."""
    c0, c1, c2 = coefficients.unflatten(-1, (-1, 3)).unbind(-1)
    return list(c0.unbind(-1)), list(c1.unbind(-1)), list((c2 + 1.0).unbind(-1))


def parameter_table(a: FlatAttention, n_softmax: int) -> np.ndarray:
    """Say for every parameter: kind, head, input row, chain slot, position, channel.

    Heads of q, k, v and out are numbered through. Rows are those of the inputs, the context, a
    row of ones (for biases) and one of zeros (for chains). A parameter of no chain has the slot
    after the last.
    """
    n_in, n_ctx, slots = a.q.inputs, a.out.inputs, 3 * a.q.depth
    d_k = n_ctx // a.seq_len
    ones, zeros = n_in + n_ctx, n_in + n_ctx + 1
    blocks, first_head = [], 0
    trees: list[tuple[int, SafeTree | None]] = [
        (Q, a.q), (K, a.k), (V, a.v), (SOFTMAX, None), (OUT, a.out),
    ]  # fmt: skip
    for kind, tree in trees:
        if tree is None:
            row = np.array([[kind], [0], [zeros], [slots], [0], [0]])
            blocks.append(np.repeat(row, n_softmax, axis=1))
            continue
        heads = np.arange(tree.heads)
        first_row = n_in if kind == OUT else 0
        head = [np.repeat(heads, tree.inputs), heads, np.repeat(heads, slots)]
        row = [np.tile(np.arange(tree.inputs) + first_row, tree.heads)]
        row += [np.full(tree.heads, ones), np.full(tree.heads * slots, zeros)]
        slot = [np.full(tree.heads * (tree.inputs + 1), slots)]
        slot += [np.tile(np.arange(slots), tree.heads)]
        local = np.concatenate(head)
        place = [local, np.zeros_like(local)]
        if kind != OUT:
            place = [local // d_k, local % d_k]
        block = [np.full_like(local, kind), local + first_head]
        blocks.append(np.stack([*block, np.concatenate(row), np.concatenate(slot), *place]))
        first_head += tree.heads
    return np.concatenate(blocks, axis=1).astype(np.int64)


class IncrementalTrials:
    """The same answers as `PlainTrials` under the numerical softmax, at a fraction of the work.

    Args:
        attention: read at the start; `commit` changes its parameters.
        parameters: as for `PlainTrials`: q, k, v, an unused softmax tree or none, out.
        inputs, targets: (S, seq * d_model).
    """

    def __init__(
        self, attention: FlatAttention, parameters: list[Tensor], inputs: Tensor, targets: Tensor
    ) -> None:
        assert attention.softmax is None
        self.plain = PlainTrials(attention, parameters, inputs, targets)
        self.attention, self.inputs, self.targets = attention, inputs, targets
        self.n, self.d_k = attention.seq_len, attention.q.heads // attention.seq_len
        self.depth = attention.q.depth
        n_softmax = len(parameters[3]) if len(parameters) == 5 else 0
        self.table = torch.from_numpy(parameter_table(attention, n_softmax)).to(inputs.device)
        self.kinds = self.table[0].cpu().numpy().astype(np.int8)
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Recompute everything a candidate is compared with."""
        a, n, d_k = self.attention, self.n, self.d_k
        n_samples = len(self.inputs)
        weights, biases, chains = zip(*(t.split() for t in (a.q, a.k, a.v, a.out)), strict=True)
        slots = [c.reshape(len(c), -1) for c in chains]
        coefficients = torch.cat(slots)
        self.coefficients = torch.nn.functional.pad(coefficients, (0, 1))
        x = self.inputs.T
        z_qkv = torch.addmm(torch.cat(biases[:3])[:, None], torch.cat(weights[:3]), x)
        qkv_columns = _columns(torch.cat(slots[:3])[:, None])
        u_qkv = _chain(z_qkv.clone(), *qkv_columns)
        q, k, v = u_qkv.view(3, n, d_k, n_samples)
        q, k, v = (t.permute(2, 0, 1) for t in (q, k, v))  # (S, n, r)
        scores = q @ k.transpose(1, 2) * a.scale
        weight = torch.softmax(scores, -1)
        context = weight @ v
        self.q_scaled = (q * a.scale).permute(2, 0, 1).contiguous()  # (r, S, n)
        self.k_scaled = (k * a.scale).permute(2, 0, 1).contiguous()
        self.v = v.contiguous()
        self.v_rows = v.transpose(0, 1).contiguous()  # (n, S, r)
        self.score_rows = scores.transpose(0, 1).contiguous()  # (n, S, n)
        self.weight_columns = weight.permute(2, 0, 1).contiguous()  # (n, S, n): column j
        self.context = context.contiguous()
        self.context_rows = context.transpose(0, 1).contiguous()  # (n, S, r)
        flat = context.reshape(n_samples, -1)
        ones = torch.ones_like(x[:1])
        self.rows = torch.cat((x, flat.T, ones, torch.zeros_like(ones)))
        self.out_weight = weights[3].T.contiguous()  # (n r, O)
        by_place = self.out_weight.view(n, d_k, -1)
        self.out_by_position = by_place
        self.out_by_channel = by_place.transpose(0, 1).contiguous()  # (r, n, O)
        self.z_out = torch.addmm(biases[3], flat, self.out_weight)  # (S, O)
        self.out_columns = _columns(slots[3])
        u_out = _chain(self.z_out.clone(), *self.out_columns)
        self.z = torch.cat((z_qkv, self.z_out.T))
        self.u = u_qkv
        self.out_squares = (u_out - self.targets).square().sum(0)
        self.target_columns = self.targets.T.contiguous()
        self.total = self.out_squares.sum()

    def loss(self) -> float:
        return float(self.total) / self.targets.numel()

    def commit(self, index: int, delta: float) -> None:
        self.plain.commit(index, delta)
        self._refresh()

    @torch.no_grad()
    def evaluate(self, index: np.ndarray, delta: np.ndarray) -> Tensor:
        """Return (P) losses; see `Objective.evaluate`."""
        kinds = self.kinds[index]
        order = np.argsort(kinds, kind="stable")
        at_q, at_k, at_v, at_softmax, at_out = np.cumsum(np.bincount(kinds, minlength=5)).tolist()
        device = self.inputs.device
        where = torch.from_numpy(index[order]).to(device)
        step = torch.from_numpy(delta[order]).to(device, self.inputs.dtype)[:, None]
        _, head, row, slot, position, channel = self.table.index_select(1, where).unbind(0)
        z = self.z.index_select(0, head).addcmul_(self.rows.index_select(0, row), step)
        chain = self.coefficients.index_select(0, head).scatter_add_(1, slot[:, None], step)
        u = _chain(z, *_columns(chain[:, None, :-1]))
        total = self.total.repeat(len(index))
        if at_out > at_softmax:
            out = head[at_softmax:] - len(self.u)
            squares = (u[at_softmax:] - self.target_columns.index_select(0, out)).square_().sum(1)
            total[at_softmax:] += squares - self.out_squares.index_select(0, out)
        if at_v > 0:
            moved = u[:at_v] - self.u.index_select(0, head[:at_v])
            bounds = (at_q, at_k, at_v)
            total[:at_v] = self._through_out(moved, position[:at_v], channel[:at_v], bounds)
        losses = torch.empty_like(total)
        losses[torch.from_numpy(order).to(device)] = total
        return losses / self.targets.numel()

    def _through_out(
        self, moved: Tensor, position: Tensor, channel: Tensor, bounds: tuple[int, int, int]
    ) -> Tensor:
        """Return the squared error of candidates that moved one channel of q, k or v."""
        at_q, at_k, at_v = bounds
        n_samples, n_out = self.z_out.shape
        z = torch.empty(at_v, n_samples, n_out, dtype=moved.dtype, device=moved.device)
        if at_q > 0:
            part = slice(0, at_q)
            change = self._context_from_q(moved[part], position[part], channel[part])
            weight = self.out_by_position.index_select(0, position[part])
            torch.baddbmm(self.z_out.expand(at_q, -1, -1), change, weight, out=z[part])
        if at_k > at_q:
            part = slice(at_q, at_k)
            change = self._context_from_k(moved[part], position[part], channel[part])
            torch.mm(change, self.out_weight, out=z[part].view(-1, n_out))
            z[part] += self.z_out
        if at_v > at_k:
            part = slice(at_k, at_v)
            change = self.weight_columns.index_select(0, position[part]) * moved[part, :, None]
            weight = self.out_by_channel.index_select(0, channel[part])
            torch.baddbmm(self.z_out.expand(at_v - at_k, -1, -1), change, weight, out=z[part])
        total = torch.empty(at_v, 1, 1, dtype=moved.dtype, device=moved.device)
        size = max(1, _CHUNK_ELEMENTS * torch.get_num_threads() // (n_samples * n_out))
        for chunk, squares in zip(z.split(size), total.split(size), strict=True):
            error = _chain(chunk, *self.out_columns).sub_(self.targets).view(len(chunk), 1, -1)
            torch.bmm(error, error.mT, out=squares)
        return total.flatten()

    def _context_from_q(self, moved: Tensor, position: Tensor, channel: Tensor) -> Tensor:
        """Return (P, S, r): how row `position` of the context moves when one q value does."""
        scores = self.score_rows.index_select(0, position)
        scores.addcmul_(moved[..., None], self.k_scaled.index_select(0, channel))
        weight = torch.softmax(scores, -1)
        row = torch.bmm(weight.transpose(0, 1), self.v).transpose(0, 1)
        return row - self.context_rows.index_select(0, position)

    def _context_from_k(self, moved: Tensor, position: Tensor, channel: Tensor) -> Tensor:
        """Return (P S, n r): how the context moves when one score per row does.

        A row's weight w grows by the factor 1 + e; renormalised, the row moves by
        g (v_j - C_i) with g = w e / (1 + w e).
        """
        growth = self.q_scaled.index_select(0, channel) * moved[..., None]
        growth.clamp_(max=700.0).expm1_()
        share = growth.mul_(self.weight_columns.index_select(0, position))
        share = share.div_(share + 1.0)
        value = self.v_rows.index_select(0, position)[:, :, None]
        return ((value - self.context) * share[..., None]).flatten(2).flatten(0, 1)
