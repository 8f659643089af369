"""Measure EML attention: `python scripts/bench_eml.py speed | learn | recover`.

speed    trials per second of coordinate descent, after checking that its engines take one path
learn    held-out R2 on the mean and identity tasks, gradient-free
recover  exact-tree recovery by depth

bench_eml_peers.py compares with other optimisers and models, bench_eml_lm.py in a language model.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kizzasi.eml import EndToEndTrainConfig, ToyEmlAttention
from kizzasi.eml.attention import EmlAttention, EmlAttentionSpec
from kizzasi.eml.core.descent import DESCENT, draw_trials
from kizzasi.eml.exact.anneal import relative_error, train_master_formula
from kizzasi.eml.exact.enumerate import TreeSearch
from kizzasi.eml.exact.tree import ONE, Tree, evaluate, leaf, node
from kizzasi.eml.search.gauss_newton import GaussNewton
from kizzasi.eml.search.minimize import minimize
from kizzasi.eml.search.objective import ModuleObjective
from kizzasi.eml.search.rows import output_rows
from kizzasi.eml.tasks import Task, draw, identity, position_mean, r_squared
from kizzasi.models.mixer import LayerContext, MixerOut

# Trials per second of eml-core's compiled Rust on the same kind of machine, and the factor wanted.
SEED_SPEED = {
    (4, 2, 2, 3): (37_500, 1.5),
    (8, 4, 4, 3): (9_500, 5),
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
        def residuals(output: MixerOut) -> Tensor:
            return (output.y - self.y).flatten()

        objective = ModuleObjective(self.layer, residuals, self.x, names=names, batch_size=16)
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
    started = time.process_time()
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
    seconds = time.process_time() - started
    assert kept is not None
    fresh_x, fresh_y = draw(task, 128 if d_model > 8 else 2000, seq_len, d_model, 10**6 + seed)
    with torch.no_grad():
        score = r_squared(kept(fresh_x).y, fresh_y)
    return score, evaluations, seconds


def _fit_in_stages(work: Fit, target: float) -> None:
    """Fit everything together where that is small enough, else outputs and values in turn."""
    values = [f"v_proj.{name}" for name in ("affine.weight", "affine.bias", "chain")]
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


def learn(seeds: list[int], tasks: list[str]) -> None:
    print("Held-out R2 on fresh samples; no gradients. One evaluation of the larger layers tries")
    print("one candidate for each output channel at once.")
    for task, sizes, heads, wanted, n_samples in LEARNING:
        if not any(name in task.__name__ for name in tasks):
            continue
        runs = [fit(task, sizes, heads, wanted, n_samples, seed) for seed in seeds]
        scores = [score for score, _, _ in runs]
        verdict = "ok" if min(scores) >= wanted else "MISSED"
        print(
            f"{task.__name__:14} (d_model, d_k, seq)={sizes} heads={heads}  "
            f"R2 {' '.join(f'{score:.4f}' for score in scores)}  "
            f"wanted {wanted}: {verdict}  "
            f"evaluations {max(e for _, e, _ in runs)}  "
            f"seconds {statistics.median(s for _, _, s in runs):.1f}",
            flush=True,
        )


def speed(seconds: float, clock: Callable[[], float], device: str) -> None:
    """Time trials of coordinate descent on 16 samples, float64, and check them first."""
    named = "CPU seconds" if clock is time.process_time else "seconds"
    chosen = DESCENT.resolve("auto", torch.device("cpu"))
    print(f"{torch.get_num_threads()} threads of torch, {named}; 16 samples, float64.")
    print(f"Trials per second of the one-by-one path on the mean task: '{chosen}' on the CPU,")
    print(f"which auto takes there, and 'torch' on {device}; the share that succeeded.")
    for sizes, (seed_speed, factor) in SEED_SPEED.items():
        ends, count, ways = [], 0, (("auto", "cpu"), ("torch", device))
        for way in ways:
            run, count = _runner(sizes, *way)
            trials = draw_trials(EndToEndTrainConfig(trials=64), 1, count, "fixed")
            ends.append(run(*trials))
        assert ends[0][2] == ends[1][2], ends
        assert abs(ends[0][1] - ends[1][1]) <= 1e-9 * ends[0][1], ends
        (path, success), (tensors, _) = (
            _speed(*_runner(sizes, *way), seconds / 2, clock) for way in ways
        )
        print(
            f"{count:7} parameters  seed {seed_speed:6}/s  "
            f"{chosen} {path:8.0f}/s = {path / seed_speed:5.1f}x at {success:.0%} success  "
            f"torch {tensors:8.0f}/s = {tensors / seed_speed:5.2f}x  (wanted {factor}x)",
            flush=True,
        )


def _runner(
    sizes: tuple[int, int, int, int], engine: str, place: str
) -> tuple[Callable[..., tuple[float, ...]], int]:
    """Return the descent of a fresh model there, a function of trials, and its parameters."""
    d_model, _, seq_len, _ = sizes
    where = torch.device(place)
    x, y = draw(position_mean, 16, seq_len, d_model, 0, torch.float64, where)
    model = ToyEmlAttention("speed", *sizes).to(where)
    run = partial(DESCENT.pick(engine, where), model, x.flatten(1), y.flatten(1))
    return run, model.param_count


def _speed(
    run: Callable[..., tuple[float, ...]],
    n_params: int,
    seconds: float,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Return the median of trials per second and the share that succeeded, in rounds of 500."""
    rates, accepted, stop = [], 0.0, time.perf_counter() + seconds
    config = EndToEndTrainConfig(trials=500, step_final=0.01)
    while time.perf_counter() < stop:
        trials = draw_trials(config, len(rates) + 1, n_params, "fixed")
        started = clock()
        accepted += run(*trials)[-1]
        rates.append(config.trials / (clock() - started))
    return statistics.median(rates), accepted / (config.trials * len(rates))


def recover(count: int, depths: list[int], lookups: int) -> None:
    """Recover random trees of one variable from 10 samples: by search, and by training.

    A tree counts if it equals the target at 23 other points too.
    """
    x = {"x": torch.linspace(0.3, 1.7, 10, dtype=torch.float64)}
    fresh = {"x": torch.linspace(0.25, 1.8, 23, dtype=torch.float64)}

    def equal(found: Tree | None, tree: Tree) -> bool:
        if found is None:
            return False
        return float(relative_error(evaluate(found, fresh), evaluate(tree, fresh))) < 1e-6

    search = TreeSearch(x)
    for depth in depths:
        seconds, missed = [], []
        for at, tree in enumerate(_random_trees(depth, count, x)):
            started = time.process_time()
            found = search.find(evaluate(tree, x), depth, lookups=lookups)
            seconds.append(time.process_time() - started)
            if not equal(found.tree, tree):
                missed.append(at)
        print(
            f"{'search':11}depth {depth}: {count - len(missed)}/{count}  seconds of a core: median "
            f"{statistics.median(seconds):.2f}, most {max(seconds):.1f}  missed {missed}",
            flush=True,
        )
    # Gradients alone, or with single choices mended after they are snapped.
    for name, sweeps in {"gradients": 0, "and mended": 4}.items():
        for depth in [depth for depth in depths if depth < 6]:
            started, missed = time.process_time(), []
            for at, tree in enumerate(_random_trees(depth, count, x)):
                # Up to 4 batches of 256 restarts; the first that fits ends the search.
                value = evaluate(tree, x)
                runs = (
                    train_master_formula(x, value, depth, steps=200, seed=seed, sweeps=sweeps)
                    for seed in range(4)
                )
                if not any(equal(run.tree, tree) for run in runs):
                    missed.append(at)
            each = (time.process_time() - started) / count
            print(
                f"{name:11}depth {depth}: {count - len(missed)}/{count}  seconds of a core: mean "
                f"{each:.2f}  missed {missed}",
                flush=True,
            )


def _random_trees(depth: int, count: int, x: dict[str, Tensor]) -> list[Tree]:
    """Draw random trees of exactly this depth, with values finite, moderate and not constant."""
    generator = torch.Generator().manual_seed(depth)

    def grow(levels: int) -> Tree:
        if levels == 0:
            return ONE if torch.rand(1, generator=generator) < 0.5 else leaf("x")
        other = int(torch.randint(levels, (1,), generator=generator))
        left, right = grow(levels - 1), grow(other)
        swap = bool(torch.rand(1, generator=generator) < 0.5)
        return node(right, left) if swap else node(left, right)

    trees: list[Tree] = []
    while len(trees) < count:
        tree = grow(depth)
        value = evaluate(tree, x)
        if bool((value.abs() < 1e4).all()) and float(value.real.std()) > 1e-3:
            trees.append(tree)
    return trees


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure EML attention.")
    parser.add_argument("what", choices=["speed", "learn", "recover"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(5)], help="learn")
    parser.add_argument("--tasks", nargs="+", default=["mean", "identity"], help="learn")
    parser.add_argument("--seconds", type=float, default=5.0, help="speed: per size")
    parser.add_argument("--cpu-time", action="store_true", help="speed: where others use the cores")
    parser.add_argument("--device", default="cpu", help="speed: of the tensor operations")
    parser.add_argument("--count", type=int, default=20, help="recover: targets per depth")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 3, 4, 5, 6], help="recover")
    parser.add_argument("--lookups", type=float, default=2.5e8, help="recover: of one search")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "speed":
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        speed(arguments.seconds, clock, arguments.device)
    elif arguments.what == "learn":
        learn(arguments.seeds, arguments.tasks)
    else:
        recover(arguments.count, arguments.depths, int(arguments.lookups))


if __name__ == "__main__":
    main()
