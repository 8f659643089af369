"""The exam of a task."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import islice

import torch

from kizzasi.models import BlockSpec, ModelSpec, build_model
from kizzasi.models.mixers import MambaSpec
from kizzasi.train.task import Batch, Shape, Task


def check_task(task: Task, shape: Shape) -> None:
    """Batches that depend on (seed, step) alone, a loss with gradients, scores that add up.

    Args:
        task: yours.
        shape: a small one that fits it.
    """
    spec = ModelSpec(8, (BlockSpec(MambaSpec(d_state=4)),), task.stem)
    model = build_model(spec).eval()
    task.check(shape, spec.stem)
    assert int(task.digest, 16) >= 0, "digest: not a hexadecimal number"
    copied: Task = pickle.loads(pickle.dumps(task))
    assert copied.digest == task.digest, "a copy, as workers get it, has another digest"
    for split in ("train", "valid"):
        assert task.has(split), f"there is no {split}"
    later = next(iter(task.batches("train", 1, 3, shape)))
    ahead = next(islice(task.batches("train", 1, 0, shape), 3, None))
    assert _same(later, ahead), "batches: step 3 is another one when it is reached from step 0"
    assert _same(next(iter(copied.batches("train", 1, 3, shape))), later), "a copy draws others"
    other = next(iter(task.batches("train", 2, 3, shape)))
    assert not _same(other, later), "batches: two seeds draw the same"
    assert len(later.inputs) == shape.batch_size, "batches: another number of windows"

    loss = task.loss(model(later.inputs), later)
    assert loss.ndim == 0, f"loss: shape {tuple(loss.shape)}, expected one number"
    assert bool(loss.isfinite()), f"loss: {loss}"
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(g.abs().sum() > 0 for g in grads), "loss: no gradient reaches the model"

    with torch.no_grad():
        whole = task.score(model, "valid", shape)
        again = task.score(model, "valid", shape)
        halves = [task.score(model, "valid", replace(shape, rank=r, world=2)) for r in (0, 1)]
        few = task.score(model, "valid", replace(shape, score_windows=2))
    assert whole.values.shape == whole.weights.shape, "score: values and weights differ in shape"
    assert whole.values.ndim == 1, "score: expected one value for each window"
    assert bool(whole.values.isfinite().all()), "score: not finite"
    assert whole.values.equal(again.values), "score: two calls differ"
    assert len(few.values) == min(2, len(whole.values)), "score: score_windows is not kept"
    sums = [float((s.values * s.weights).sum()) for s in (whole, *halves)]
    apart = abs(sums[0] - sums[1] - sums[2])
    assert apart <= 1e-6 * max(1.0, abs(sums[0])), "score: two processes do not add up to one"
    assert whole.mean(task.metric) == again.mean(task.metric)
    for name, value in task.baselines().items():
        assert value == value, f"baselines: {name} is no number"
    assert isinstance(task.facts(), dict), "facts: not a dict"


def _same(a: Batch, b: Batch) -> bool:
    return a.inputs.equal(b.inputs) and a.targets.equal(b.targets)
