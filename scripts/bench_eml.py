"""Measure EML attention: `python scripts/bench_eml.py speed | learn | recover`.

speed    trials per second of coordinate descent, after checking incremental against plain
learn    held-out R2 on the mean and identity tasks, gradient-free, 5 seeds
recover  exact-tree recovery by depth

bench_eml_peers.py compares with other optimisers and models, bench_eml_lm.py in a language model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from kizzasi.eml import EndToEndTrainConfig, ToyEmlAttention
from kizzasi.eml.attention import EmlAttention, EmlAttentionSpec
from kizzasi.eml.exact import ONE, Tree, evaluate, leaf, node
from kizzasi.eml.incremental import IncrementalTrials
from kizzasi.eml.least_squares import GaussNewton
from kizzasi.eml.recovery import search_tree, train_master_formula
from kizzasi.eml.rows import output_rows
from kizzasi.eml.tasks import Task, draw, identity, position_mean, r_squared
from kizzasi.eml.trainer import ModuleObjective, minimize
from kizzasi.eml.trials import FlatAttention, PlainTrials, descend, draw_trials
from kizzasi.models.mixer import LayerContext

# Trials per second of eml-core's compiled Rust on the same kind of machine, and the factor wanted.
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
    (identity, (8, 8, 4), 1, 0.95, 128),
]
MAX_STARTS = 5
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


def fit(
    task: Task, sizes: tuple[int, int, int], heads: int, wanted: float, n_samples: int, seed: int
) -> tuple[float, int, float]:
    """Train one layer without gradients; return held-out R2, evaluations and seconds.

    A small layer may get stuck, which its training error shows; it is then started afresh.
    """
    d_model, head_dim, seq_len = sizes
    x, y = draw(task, n_samples, seq_len, d_model, seed)
    started = time.perf_counter()
    evaluations, best, kept = 0, float("inf"), None
    unexplained = (1 - wanted) * float(y.var())
    for attempt in range(MAX_STARTS):
        layer = build(d_model, head_dim, heads, seed + 1000 * attempt)
        work = Fit(layer, x, y, seed)
        _fit_in_stages(work, unexplained / 5)
        evaluations += work.evaluations
        with torch.no_grad():
            error = float((layer(x).y - y).square().mean())
        if error < best:
            best, kept = error, layer
        if best < unexplained / 2:
            break
    seconds = time.perf_counter() - started
    assert kept is not None
    fresh_x, fresh_y = draw(task, 128 if d_model > 8 else 2000, seq_len, d_model, 10**6 + seed)
    with torch.no_grad():
        score = r_squared(kept(fresh_x).y, fresh_y)
    return score, evaluations, seconds


def _fit_in_stages(work: Fit, target: float) -> None:
    """Fit everything together where that is small enough, else outputs and values in turn."""
    values = [f"layer.v_proj.{name}" for name in ("affine.weight", "affine.bias", "chain")]
    if sum(p.numel() for p in work.layer.parameters()) <= JOINT_LIMIT:
        if work.layer.head_dim == work.x.shape[-1]:
            # Values and outputs both start small, and their product bends. Outputs first escapes
            # that, but with fewer channels than d_model it settles on the wrong ones.
            work.rows(5)
        work.joint(20, target=target)
    elif sum(p.numel() for p in work.layer.v_proj.parameters()) <= JOINT_LIMIT:
        for _ in range(3):
            work.rows(4)
            work.joint(1, values)
        work.rows(4)
    else:
        work.rows(5)


def learn(seeds: int) -> None:
    print("Held-out R2 on fresh samples; no gradients. One evaluation of the larger layers tries")
    print("one candidate for each output channel at once.")
    for task, sizes, heads, wanted, n_samples in LEARNING:
        runs = [fit(task, sizes, heads, wanted, n_samples, seed) for seed in range(seeds)]
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


def speed(seconds: float) -> None:
    """Time trials of coordinate descent on 16 samples, float64, and check them first."""
    print(f"threads {torch.get_num_threads()}; 16 samples, float64. 'batch': candidates per second")
    print("in batches of 256. 'path': trials per second of the sequential path while descending on")
    print("the mean task, whatever speculation discards; it depends on how many trials succeed.")
    for sizes, (seed_speed, factor) in SEED_SPEED.items():
        d_model, d_k, seq_len, depth = sizes
        model = ToyEmlAttention("speed", d_model, d_k, seq_len, depth)
        x, y = draw(position_mean, 16, seq_len, d_model, 0, torch.float64)
        x, y = x.flatten(1), y.flatten(1)
        q, k, v, softmax, out = model.trees()
        attention = FlatAttention(q, k, v, out, seq_len)
        parameters: list[Tensor] = [tree.params for tree in (q, k, v, softmax, out)]
        fast = IncrementalTrials(attention, parameters, x, y)
        plain = PlainTrials(attention, parameters, x, y)
        random = np.random.default_rng(0)
        index = random.integers(0, model.param_count, 256)
        delta = random.normal(size=256) * 0.1
        sample = slice(0, 32)
        torch.testing.assert_close(
            fast.evaluate(index[sample], delta[sample]),
            plain.evaluate(index[sample], delta[sample]),
            rtol=1e-9,
            atol=1e-12,
        )
        rates = []
        for _ in range(7):
            started = time.perf_counter()
            fast.evaluate(index, delta)
            rates.append(256 / (time.perf_counter() - started))
        batch = statistics.median(rates)
        path, success = _path_speed(fast, model.param_count, seconds)
        print(
            f"{model.param_count:7} parameters  seed {seed_speed:6}/s  "
            f"batch {batch:8.0f}/s = {batch / seed_speed:5.1f}x (wanted {factor}x)  "
            f"path {path:8.0f}/s = {path / seed_speed:5.1f}x at {success:.0%} success",
            flush=True,
        )


def _path_speed(trials: IncrementalTrials, n_params: int, seconds: float) -> tuple[float, float]:
    """Return trials per second and the share that succeeded, over a run of about `seconds`."""
    done, accepted, started, round_ = 0, 0, time.perf_counter(), 0
    config = EndToEndTrainConfig(trials=500, step_final=0.01)
    while time.perf_counter() - started < seconds:
        round_ += 1
        accepted += descend(trials, *draw_trials(config, round_, n_params, "fixed"))[1]
        done += config.trials
    return done / (time.perf_counter() - started), accepted / done


def recover(count: int) -> None:
    """Recover random trees of one variable from 10 samples: by search, and by training."""
    x = {"x": torch.linspace(0.3, 1.7, 10, dtype=torch.float64)}
    for depth in (2, 3, 4, 5, 6):
        targets = _random_targets(depth, count, x)
        started = time.perf_counter()
        found = sum(search_tree(x, value, depth).tree is not None for value in targets)
        each = (time.perf_counter() - started) / count
        print(f"search    depth {depth}: {found}/{count}  {each:.2f} s each", flush=True)
    for depth in (2, 3, 4, 5):
        targets = _random_targets(depth, count, x)
        started, found = time.perf_counter(), 0
        for value in targets:
            # Up to 4 batches of 256 restarts; the first that fits ends the search.
            found += any(
                train_master_formula(x, value, depth, steps=200, seed=seed).tree is not None
                for seed in range(4)
            )
        each = (time.perf_counter() - started) / count
        print(f"training  depth {depth}: {found}/{count}  {each:.2f} s each", flush=True)


def _random_targets(depth: int, count: int, x: dict[str, Tensor]) -> list[Tensor]:
    """Draw values of random trees of exactly this depth, finite, moderate and not constant."""
    generator = torch.Generator().manual_seed(depth)

    def grow(levels: int) -> Tree:
        if levels == 0:
            return ONE if torch.rand(1, generator=generator) < 0.5 else leaf("x")
        other = int(torch.randint(levels, (1,), generator=generator))
        left, right = grow(levels - 1), grow(other)
        swap = bool(torch.rand(1, generator=generator) < 0.5)
        return node(right, left) if swap else node(left, right)

    values: list[Tensor] = []
    while len(values) < count:
        value = evaluate(grow(depth), x)
        if bool((value.abs() < 1e4).all()) and float(value.real.std()) > 1e-3:
            values.append(value)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure EML attention.")
    parser.add_argument("what", choices=["speed", "learn", "recover"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5, help="learn: runs per task")
    parser.add_argument("--seconds", type=float, default=5.0, help="speed: per size")
    parser.add_argument("--count", type=int, default=20, help="recover: targets per depth")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "speed":
        speed(arguments.seconds)
    elif arguments.what == "learn":
        learn(arguments.seeds)
    else:
        recover(arguments.count)


if __name__ == "__main__":
    main()
