"""The exam of a whole model, made to be cheap: hundreds of random ones sit it.

Every position is perturbed at once, one row of a batch for each, so that no leak hides between
those that are tried. Everything in float64 under the one tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kizzasi.models import ModelSpec, SequenceModel
from kizzasi.testing.mixer import (
    Exam,
    packed_equals_separate,
    steps_equal_one_call,
)
from kizzasi.testing.tolerance import TOLERANCE, assert_close

LENGTH = 20
SEEDS = 12  # among which a number that is drawn once differs somewhere
SPLITS = ((1,) * 21, (2, 7, 12), (20, 1))


def check_model(spec: ModelSpec, *, splits: Sequence[Sequence[int]] = SPLITS[1:2]) -> None:
    """No later input moves an earlier output; the recurrent form, these splits and packed documents
    equal one parallel call. In evaluation and in training, where training draws nothing.

    Args:
        spec: causal, on tokens.
        splits: lengths of pieces that sum to 21.
    """
    leak = first_leak(spec)
    assert leak is None, leak
    sure = spec.replace(dropout=0.0)
    for training in (False, True):
        exam = Exam(sure, sure, training=training)
        if training and (spec.encodes or _draws(exam.make(), exam.tokens(1, LENGTH))):
            continue
        steps_equal_one_call(exam, 13)
        for pieces in splits:
            pieces_equal_one_call(exam, pieces)
        packed_equals_separate(exam, None)


@torch.no_grad()
def pieces_equal_one_call(exam: Exam, pieces: Sequence[int]) -> None:
    """A sequence in pieces, the state carried, gives the outputs of one call, and goes on alike.

    States are compared by what follows: where tokens are routed, dead slots lie elsewhere.
    """
    model, x, more = exam.make(), exam.tokens(2, sum(pieces)), exam.tokens(2, 4, 5)
    whole = model(x)
    state, parts = None, []
    for piece in x.split(list(pieces), dim=1):
        out = model(piece, state)
        state = out.state
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1), whole.logits, msg=f"pieces of {tuple(pieces)}")
    assert_close(model(more, state).logits, model(more, whole.state).logits, msg="what follows")


def first_leak(spec: ModelSpec, length: int = LENGTH) -> str | None:
    """The first position whose change moves an output before it, and how; None if there is none."""
    if not all(layer.fixed_work for layer in spec.blocks):
        spec = spec.replace(dropout=0.0)  # other tokens, other shapes, and so other draws
    for training, way in ((False, "in evaluation"), (True, "in training")):
        if training and spec.encodes:
            continue  # what an encoder sees of the future is charged
        exam = Exam(spec, spec, training=training)
        model, tokens = exam.make(), exam.tokens(1, length)
        run = partial(_fixed, model)
        one_by_one = lambda x, run=run: torch.cat([run(row[None]) for row in x])  # noqa: E731
        alike = one_by_one if _draws(model, tokens) else run  # every row alone has equal chance
        if (found := moved(alike, tokens, exam.vocab_size)) is not None:
            t, before = found
            return f"a change of input {t} moves the output {before} {way}"
    return None


@torch.no_grad()
def _fixed(model: SequenceModel, x: Tensor, seed: int = 0) -> Tensor:
    """Logits with the same chance in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        return model(x).logits


def _draws(model: SequenceModel, tokens: Tensor) -> bool:
    """Whether logits depend on chance: equal rows differ, or calls (a loop draws once for all)."""
    rows = torch.cat([_fixed(model, tokens.repeat(2, 1), seed) for seed in range(SEEDS)])
    return not (rows == rows[:1]).all()


def moved(
    run: Callable[[Tensor], Tensor], tokens: Tensor, vocab_size: int
) -> tuple[int, int] | None:
    """The first (position changed, earlier output moved) of a function of ids (b, t).

    Args:
        run: ids (b, t) to outputs (b, t, n), rows by themselves.
        tokens: (1, t).
    """
    t = tokens.shape[1]
    changed = tokens.repeat(t, 1)
    index = torch.arange(t)
    changed[index, index] = (changed[index, index] + 1) % vocab_size
    whole = run(torch.cat([tokens, changed]))
    gap = (whole[1:] - whole[:1]).abs().amax(-1)  # row i: input i was changed
    bound = TOLERANCE[torch.float64]["atol"] + 1e-9 * whole[:1].abs().amax(-1)
    early = (gap > bound) & (index[None] < index[:, None])
    if not early.any():
        return None
    i, j = early.nonzero()[0].tolist()
    return i, j
