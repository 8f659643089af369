"""Measure EML attention: `python scripts/bench_eml.py speed | learn | recover | peers`.

speed    trials per second of coordinate descent, after checking incremental against plain
learn    held-out R2 on the mean and identity tasks, gradient-free, 5 seeds
recover  exact-tree recovery by depth
peers    the same objective at equal evaluations: ours, Adam, and cma and nevergrad if installed
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from kizzasi.eml import ToyEmlAttention
from kizzasi.eml.attention import EmlAttention, EmlAttentionSpec
from kizzasi.eml.least_squares import GaussNewton
from kizzasi.eml.rows import output_rows
from kizzasi.eml.tasks import Task, draw, identity, position_mean, r_squared
from kizzasi.eml.trainer import ModuleObjective, minimize
from kizzasi.models.mixer import LayerContext

# Trials per second of the seed's compiled Rust on the same kind of machine, and the factor wanted.
SEED_SPEED = {
    (4, 2, 2, 3): (37_500, 1),
    (8, 4, 4, 3): (9_500, 4),
    (16, 8, 8, 3): (1_500, 20),
    (32, 16, 8, 3): (433, 50),
}
# task, (d_model, head_dim, seq_len), heads, the R2 wanted, training samples
LEARNING: list[tuple[Task, tuple[int, int, int], int, float, int]] = [
    (position_mean, (4, 2, 2), 1, 0.99, 1024),
    (position_mean, (8, 4, 4), 1, 0.95, 512),
    (position_mean, (32, 16, 8), 1, 0.9, 160),
    (position_mean, (64, 32, 16), 2, 0.9, 48),
    (position_mean, (256, 32, 64), 8, 0.8, 16),
    (identity, (8, 8, 4), 1, 0.95, 512),
]
JOINT_LIMIT = 1000  # parameters that are fitted together, at most


class Output(nn.Module):
    """An attention layer as a plain function of x."""

    def __init__(self, layer: EmlAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).y


def build(d_model: int, head_dim: int, heads: int, seed: int) -> EmlAttention:
    spec = EmlAttentionSpec(n_heads=heads, head_dim=head_dim, causal=False, depth=3)
    layer = spec.build(LayerContext(d_model))
    layer.reset_parameters(1, torch.Generator().manual_seed(seed))
    return layer


class Fit:
    """Gauss-Newton on secants, in stages; counts candidate evaluations."""

    def __init__(self, layer: EmlAttention, x: Tensor, y: Tensor, seed: int) -> None:
        self.layer, self.x, self.y, self.seed, self.evaluations = layer, x, y, seed, 0

    def joint(self, steps: int, names: list[str] | None = None, target: float = 0.0) -> None:
        def residuals(output: Tensor) -> Tensor:
            return (output - self.y).flatten()

        objective = ModuleObjective(
            Output(self.layer), residuals, self.x, names=names, batch_size=16
        )
        self._run(objective, objective.start, steps, target, lambda x: objective.assign(x[0]))

    def rows(self, steps: int) -> None:
        objective = output_rows(self.layer, self.x, self.y)
        self._run(objective, objective.start, steps, 0.0, objective.assign)

    def _run(
        self,
        objective: Callable[[Tensor], Tensor],
        start: Tensor,
        steps: int,
        target: float,
        assign: Callable[[Tensor], None],
    ) -> None:
        n = start.shape[1]
        result = minimize(
            objective,
            GaussNewton(n),
            start,
            evaluations=1 + steps * (n + 4),
            seed=self.seed,
            target=target,
        )
        assign(result.x)
        self.evaluations += result.evaluations


def fit(task: Task, sizes: tuple[int, int, int], heads: int, n_samples: int, seed: int):
    """Train one layer without gradients; return held-out R2, evaluations and seconds."""
    d_model, head_dim, seq_len = sizes
    layer = build(d_model, head_dim, heads, seed)
    x, y = draw(task, n_samples, seq_len, d_model, seed)
    work = Fit(layer, x, y, seed)
    started = time.perf_counter()
    n_params = sum(p.numel() for p in layer.parameters())
    values = ["layer.v_proj.affine.weight", "layer.v_proj.affine.bias", "layer.v_proj.chain"]
    if n_params <= JOINT_LIMIT:
        work.joint(40, target=1e-3 * float(y.var()))
    elif sum(p.numel() for p in layer.v_proj.parameters()) <= JOINT_LIMIT:
        for _ in range(6):
            work.rows(4)
            work.joint(1, values)
        work.rows(4)
    else:
        work.rows(5)
    seconds = time.perf_counter() - started
    fresh_x, fresh_y = draw(task, 128 if d_model > 8 else 2000, seq_len, d_model, 10**6 + seed)
    with torch.no_grad():
        score = r_squared(layer(fresh_x).y, fresh_y)
    return score, work.evaluations, seconds


def learn(seeds: int) -> None:
    print("Held-out R2 on fresh samples; no gradients. One evaluation of the larger layers tries")
    print("one candidate for each output channel at once.")
    for task, sizes, heads, wanted, n_samples in LEARNING:
        runs = [fit(task, sizes, heads, n_samples, seed) for seed in range(seeds)]
        scores = [score for score, _, _ in runs]
        verdict = "ok" if min(scores) >= wanted else "MISSED"
        print(
            f"{task.__name__:14} (d_model, d_k, seq)={sizes} heads={heads}  "
            f"R2 min {min(scores):.4f} median {statistics.median(scores):.4f}  "
            f"wanted {wanted}: {verdict}  "
            f"evaluations {max(e for _, e, _ in runs)}  "
            f"seconds {statistics.median(s for _, _, s in runs):.1f}",
            flush=True,
        )
