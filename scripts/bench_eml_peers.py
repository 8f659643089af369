"""EML attention beside other optimisers and other models, at equal numbers of evaluations.

optimizers  one EML attention layer on the mean and identity tasks: our gradient-free optimisers,
            cma and nevergrad (CMA, DE), and Adam; its affine twin beside them
models      EML attention, its affine twin, a small MLP, pykan and gplearn on mean, identity and ten
            formulas of physics; the attention layers see every variable of a formula as a position,
            the others see one position, or all the variables, at once

Scores are held-out R2 on fresh samples: 0 is a constant predictor, 1 is perfect. An evaluation is
one pass of one candidate over the training samples; a gradient counts as two more. A package that
is not installed is left out, and a line says so.

examples:
  python scripts/bench_eml_peers.py optimizers --evaluations 4000 --seeds 11 12 13
  python scripts/bench_eml_peers.py models --tasks identity I.40.1 --out runs.jsonl
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kizzasi.eml.attention import EmlAttention, EmlAttentionSpec
from kizzasi.eml.search.coordinate import BlockDescent, CoordinateDescent
from kizzasi.eml.search.evolution import AntitheticES, SeparableCma, Spsa
from kizzasi.eml.search.gauss_newton import GaussNewton
from kizzasi.eml.search.minimize import minimize
from kizzasi.eml.search.objective import ModuleObjective
from kizzasi.eml.search.optimizer import Optimizer
from kizzasi.eml.search.pattern import PatternSearch
from kizzasi.eml.tasks import FEYNMAN, Formula, draw, identity, position_mean, r_squared
from kizzasi.models.mixer import LayerContext

SEQUENCE_TASKS = {"mean": (position_mean, 4), "identity": (identity, 8)}  # task, head_dim
D_MODEL, SEQ_LEN = 8, 4
N_SEQUENCES, N_SAMPLES, N_FRESH = 128, 200, 2000
FORMULA_HEAD_DIM = 8
ADAM_LR = 1e-2
BLOCK = 64  # parameters per step of Gauss-Newton
GRADIENT_COST = 3  # evaluations per step that needs a gradient
LBFGS_PASSES = 25  # pykan's L-BFGS takes up to so many gradients per step
FRESH_SEED = 10**6
Run = Callable[[], tuple[float, int]]  # returns a score and a size
Losses = Callable[[np.ndarray], list[float]]
ROW: tuple[str, ...] = ("part", "task", "learner", "seed", "evaluations", "r2", "size", "seconds")
# Packages and the modules they install.
PACKAGES = {
    "optimizers": {"cma": "cma", "nevergrad": "nevergrad"},
    "models": {"pykan": "kan", "gplearn": "gplearn"},
}


@dataclass(frozen=True)
class Data:
    """One task: positions for attention layers, plain rows for the others.

    x, y, fresh_x, fresh_y    (b, t, d), or y (b) for a formula, standardised; fresh is held out
    rows, fresh_rows          what the others see of x, (m, n_in)
    raw, fresh_raw            the same in physical units, for symbolic regression
    head_dim                  of an attention layer
    """

    x: Tensor
    y: Tensor
    fresh_x: Tensor
    fresh_y: Tensor
    rows: Tensor
    fresh_rows: Tensor
    raw: Tensor
    fresh_raw: Tensor
    head_dim: int

    @property
    def values(self) -> Tensor:
        """Targets of the rows, (m, n_out)."""
        return self.y.reshape(len(self.rows), -1)

    def score(self, prediction: Tensor) -> float:
        return r_squared(prediction.reshape(self.fresh_y.shape), self.fresh_y)


def sequence_data(name: str, seed: int) -> Data:
    task, head_dim = SEQUENCE_TASKS[name]
    x, y = draw(task, N_SEQUENCES, SEQ_LEN, D_MODEL, seed)
    fresh_x, fresh_y = draw(task, N_FRESH, SEQ_LEN, D_MODEL, FRESH_SEED + seed)
    rows, fresh_rows = x.flatten(0, 1), fresh_x.flatten(0, 1)
    return Data(x, y, fresh_x, fresh_y, rows, fresh_rows, rows, fresh_rows, head_dim)


def formula_data(formula: Formula, seed: int) -> Data:
    """Scale variables to [-1, 1] and values to mean 0, deviation 1; a variable is a position."""
    raw, y = formula.draw(N_SAMPLES, seed)
    fresh_raw, fresh_y = formula.draw(N_FRESH, FRESH_SEED + seed)
    low, high = torch.tensor(formula.ranges).unbind(1)
    rows, fresh_rows = ((x - low) / (high - low) * 2 - 1 for x in (raw, fresh_raw))
    fresh_y, y = ((value - y.mean()) / y.std() for value in (fresh_y, y))

    def positions(x: Tensor) -> Tensor:
        return torch.cat((x[..., None], torch.eye(x.shape[1]).expand(len(x), -1, -1)), -1)

    x, fresh_x = positions(rows), positions(fresh_rows)
    return Data(x, y, fresh_x, fresh_y, rows, fresh_rows, raw, fresh_raw, FORMULA_HEAD_DIM)


class Layer(nn.Module):
    """One attention layer; for a formula its outputs are averaged over positions and added up."""

    def __init__(self, data: Data, depth: int, seed: int) -> None:
        super().__init__()
        self.scalar = data.y.dim() == 1
        spec = EmlAttentionSpec(head_dim=data.head_dim, causal=False, depth=depth)
        self.attention: EmlAttention = spec.build(LayerContext(data.x.shape[-1]))
        self.attention.reset_parameters(1, torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x).y
        return y.mean(1).sum(-1) if self.scalar else y


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def squared_error(module: nn.Module, data: Data) -> ModuleObjective:
    return ModuleObjective(module, lambda out: (out - data.y).square().mean(), data.x)


def gauss_newton(module: Layer, data: Data, evaluations: int, block: int | None = BLOCK) -> None:
    """Fit by secants of the residuals: the output projection first, then blocks of everything.

    From the start both maps are small and their product bends; fitting one alone escapes that.
    """

    def run(names: list[str] | None, budget: int) -> None:
        objective = ModuleObjective(
            module, lambda out: (out - data.y).flatten(), data.x, names=names, batch_size=16
        )
        start = objective.start
        optimizer = GaussNewton(min(block or start.shape[1], start.shape[1]))
        found = minimize(objective, optimizer, start, evaluations=budget)
        objective.assign(found.x[0])

    first = evaluations // 12
    run([n for n, _ in module.named_parameters() if n.startswith("attention.o_proj.")], first)
    run(None, evaluations - first)


def adam(module: nn.Module, x: Tensor, y: Tensor, evaluations: int) -> None:
    steps = evaluations // GRADIENT_COST
    optimizer = torch.optim.Adam(module.parameters(), lr=ADAM_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (module(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def our_optimizers(n: int) -> dict[str, Optimizer]:
    return {
        "block descent": BlockDescent(),
        "block descent, one block": BlockDescent(n),
        "coordinate descent": CoordinateDescent(batch=1),  # what it asks in vain would not count
        "pattern search": PatternSearch(),
        "antithetic ES": AntitheticES(),
        "SPSA with Adam": Spsa(pairs=8, lr=0.01, adam=True),
        "separable CMA": SeparableCma(),
    }


def with_cma(losses: Losses, start: np.ndarray, budget: int, seed: int) -> np.ndarray:
    import cma  # pyright: ignore[reportMissingImports]

    options = {"maxfevals": budget, "verbose": -9, "seed": seed + 1}
    strategy = cma.CMAEvolutionStrategy(start, 0.1, options)
    while not strategy.stop():
        points = strategy.ask()
        strategy.tell(points, losses(np.array(points)))
    best = strategy.result.xbest
    assert best is not None
    return best


def with_nevergrad(
    name: str, losses: Losses, start: np.ndarray, budget: int, seed: int
) -> np.ndarray:
    import nevergrad  # pyright: ignore[reportMissingImports]

    space = nevergrad.p.Array(init=start).set_mutation(sigma=0.1)
    space.random_state.seed(seed)
    optimizer = nevergrad.optimizers.registry[name](space, budget=budget)
    return optimizer.minimize(lambda point: losses(point[None])[0]).value


def trained(data: Data, seed: int, train: Callable[[Layer], None], depth: int = 3) -> Run:
    """Make a run: build a layer, train it, score it on fresh samples."""

    def run() -> tuple[float, int]:
        module = Layer(data, depth, seed)
        train(module)
        with torch.no_grad():
            return data.score(module(data.fresh_x)), parameter_count(module)

    return run


def optimizer_runs(data: Data, evaluations: int, seed: int) -> dict[str, Run]:
    """Name every run of the `optimizers` part."""

    def ours(optimizer: Optimizer, module: Layer) -> None:
        objective = squared_error(module, data)
        found = minimize(objective, optimizer, objective.start, evaluations=evaluations, seed=seed)
        objective.assign(found.x[0])

    def foreign(search: Callable[..., np.ndarray], module: Layer) -> None:
        objective = squared_error(module, data)

        def losses(points: np.ndarray) -> list[float]:
            return objective(torch.from_numpy(points).float()[None])[0].tolist()

        best = search(losses, objective.start[0].double().numpy(), evaluations, seed)
        objective.assign(torch.from_numpy(best).float())

    trainers: dict[str, Callable[[Layer], None]] = {
        f"Gauss-Newton, blocks of {BLOCK}": lambda layer: gauss_newton(layer, data, evaluations),
        "Gauss-Newton, one block": lambda layer: gauss_newton(layer, data, evaluations, None),
    }
    n = parameter_count(Layer(data, 3, seed))
    trainers |= {name: partial(ours, optimizer) for name, optimizer in our_optimizers(n).items()}
    if installed("cma"):
        trainers["cma"] = partial(foreign, with_cma)
    if installed("nevergrad"):
        for name in ("CMA", "DE"):
            trainers[f"nevergrad {name}"] = partial(foreign, partial(with_nevergrad, name))
    trainers["Adam (gradients)"] = lambda layer: adam(layer, data.x, data.y, evaluations)
    runs = {name: trained(data, seed, train) for name, train in trainers.items()}
    twin = trained(data, seed, lambda layer: gauss_newton(layer, data, evaluations), depth=0)
    return runs | {f"affine layer, Gauss-Newton, blocks of {BLOCK}": twin}


def fit_mlp(data: Data, evaluations: int, seed: int) -> tuple[float, int]:
    """Fit one hidden layer of tanh, about as large as the EML layer."""
    torch.manual_seed(seed)
    n_in, n_out = data.rows.shape[1], data.values.shape[1]
    hidden = parameter_count(Layer(data, 3, seed)) // (n_in + n_out + 1)
    mlp = nn.Sequential(nn.Linear(n_in, hidden), nn.Tanh(), nn.Linear(hidden, n_out))
    adam(mlp, data.rows, data.values, evaluations)
    with torch.no_grad():
        return data.score(mlp(data.fresh_rows)), parameter_count(mlp)


def fit_kan(data: Data, evaluations: int, seed: int) -> tuple[float, int]:
    """Fit pykan with its own L-BFGS: one hidden layer of 5 nodes, or as many as outputs."""
    from kan import KAN  # pyright: ignore[reportMissingImports]

    n_in, n_out = data.rows.shape[1], data.values.shape[1]
    width = [n_in, max(5, n_out), n_out]
    kan: Any = KAN(width=width, grid=5, k=3, seed=seed, auto_save=False).speed()
    samples = {"train_input": data.rows, "train_label": data.values}
    samples |= {"test_input": data.rows[:1], "test_label": data.values[:1]}
    steps, updates = max(1, evaluations // (GRADIENT_COST * LBFGS_PASSES)), 5
    with open("/dev/null", "w") as quiet:
        shown, sys.stderr = sys.stderr, quiet  # its progress bar has no switch
        try:
            last = max(updates, steps // 2)
            grid = {"grid_update_num": updates, "stop_grid_update_step": last}
            kan.fit(samples, opt="LBFGS", steps=steps, **grid)
        finally:
            sys.stderr = shown
    with torch.no_grad():
        return data.score(kan(data.fresh_rows)), parameter_count(kan)


def fit_gplearn(data: Data, evaluations: int, seed: int) -> tuple[float, int]:
    """Evolve one program per output; they share the evaluations. The size is that of all."""
    from gplearn.functions import make_function  # pyright: ignore[reportMissingImports]
    from gplearn.genetic import SymbolicRegressor  # pyright: ignore[reportMissingImports]

    exp = make_function(function=lambda x: np.exp(np.clip(x, -20, 20)), name="exp", arity=1)
    raw, fresh_raw = (x.double().numpy() for x in (data.raw, data.fresh_raw))
    each = evaluations // data.values.shape[1]
    population = min(500, each // 10)
    columns, size = [], 0
    functions = ("add", "sub", "mul", "div", "sqrt", "log", "sin", "cos", exp)
    options = {"metric": "mse", "const_range": (-3.0, 3.0), "parsimony_coefficient": 1e-3}
    options |= {"population_size": population, "generations": each // population}
    for values in data.values.double().numpy().T:
        program = SymbolicRegressor(function_set=functions, random_state=seed, **options)
        program.fit(raw, values)
        columns.append(torch.from_numpy(np.asarray(program.predict(fresh_raw))))
        size += program._program.length_
    return data.score(torch.stack(columns, 1)), size


def model_runs(data: Data, evaluations: int, seed: int) -> dict[str, Run]:
    """Name every run of the `models` part; a run returns its score and size."""

    def secants(layer: Layer) -> None:
        gauss_newton(layer, data, evaluations)

    def gradients(layer: Layer) -> None:
        adam(layer, data.x, data.y, evaluations)

    runs: dict[str, Run] = {
        "EML, Gauss-Newton": trained(data, seed, secants),
        "EML, Adam": trained(data, seed, gradients),
        "affine, Gauss-Newton": trained(data, seed, secants, depth=0),
        "affine, Adam": trained(data, seed, gradients, depth=0),
        "MLP, Adam": lambda: fit_mlp(data, evaluations, seed),
    }
    if installed("kan"):
        runs["pykan, L-BFGS"] = lambda: fit_kan(data, evaluations, seed)
    if installed("gplearn"):
        runs["gplearn"] = lambda: fit_gplearn(data, evaluations, seed)
    return runs


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


PARTS = {"optimizers": optimizer_runs, "models": model_runs}


def load(path: Path | None) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Read what earlier runs have finished, by part, task, learner, seed and evaluations."""
    lines = path.read_text().splitlines() if path and path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {tuple(row[key] for key in ROW[:5]): row for row in rows}


def measure(args: argparse.Namespace, tasks: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one row per learner, task and seed: score, size and seconds of a core."""
    formulas = {formula.name: formula for formula in FEYNMAN}
    done = load(args.out)
    # Seeds outermost: an interrupted run leaves whole seeds, not whole learners.
    grid: list[tuple[int, str]] = [*product(args.seeds, tasks)]
    for seed, task in tqdm(grid, desc=args.part):
        formula = formulas.get(task)
        data = formula_data(formula, seed) if formula else sequence_data(task, seed)
        for learner, run in PARTS[args.part](data, args.evaluations, seed).items():
            cell = args.part, task, learner, seed, args.evaluations
            if not any(word in learner for word in args.learners):
                continue
            if cell not in done:
                started = time.process_time()
                result = *run(), time.process_time() - started
                done[cell] = dict(zip(ROW, cell + result, strict=True))
                if args.out:
                    with args.out.open("a") as file:
                        print(json.dumps(done[cell]), file=file)
            yield done[cell]


def show(rows: list[dict[str, Any]]) -> None:
    """Print, per task and learner, the mean R2 and its range over the seeds, and median seconds."""
    print("| task | learner | R2, mean | worst | best | size | seconds |\n" + "|---" * 7 + "|")
    for key in dict.fromkeys((row["task"], row["learner"]) for row in rows):
        r2, size, seconds = (
            [row[name] for row in rows if (row["task"], row["learner"]) == key] for name in ROW[5:]
        )
        scores = f"{statistics.mean(r2):.3f} | {min(r2):.3f} | {max(r2):.3f}"
        print(f"| {' | '.join(key)} | {scores} | {max(size)} | {statistics.median(seconds):.1f} |")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names = [*SEQUENCE_TASKS, *(formula.name for formula in FEYNMAN)]
    parser.add_argument("part", choices=[*PARTS])
    parser.add_argument("--tasks", nargs="+", choices=names, metavar="TASK", help=", ".join(names))
    parser.add_argument("--learners", nargs="+", default=[""], help="names, or parts of names")
    parser.add_argument("--evaluations", type=int, default=6000, help="per learner (6000)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="runs per task (0)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, help="append a JSON line per run; runs in it are kept")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for package, module in PACKAGES[args.part].items():
        if not installed(module):
            print(f"{package}: not installed, left out; `pip install {package}`", file=sys.stderr)
    tasks = args.tasks or (names if args.part == "models" else [*SEQUENCE_TASKS])
    show([*measure(args, tasks)])


if __name__ == "__main__":
    main()
