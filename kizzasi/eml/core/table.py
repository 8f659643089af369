"""What each parameter of flattened attention touches, as `Walk` needs to know it."""

from collections.abc import Sequence

import numpy as np

from kizzasi.eml.core.tree import SafeTree

Q, K, V, SOFTMAX, OUT = range(5)  # kinds of parameters


def parameter_table(trees: Sequence[SafeTree], seq_len: int) -> np.ndarray:
    """Say for every parameter: kind, head, input row, chain slot, position, channel.

    Heads of q, k, v and out are numbered through. Rows are those of the inputs, the context, a
    row of ones (for biases) and one of zeros (for chains). A parameter of no chain has the slot
    after the last.
    """
    q, k, v, *softmax, out = trees
    n_in, n_ctx, slots = q.inputs, out.inputs, 3 * q.depth
    d_k = n_ctx // seq_len
    ones, zeros = n_in + n_ctx, n_in + n_ctx + 1
    blocks, first_head = [], 0
    kinds = (Q, K, V, *[SOFTMAX] * len(softmax), OUT)
    for kind, tree in zip(kinds, (q, k, v, *softmax, out), strict=True):
        if kind == SOFTMAX:
            row = np.array([[kind], [0], [zeros], [slots], [0], [0]])
            blocks.append(np.repeat(row, tree.param_count, axis=1))
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
