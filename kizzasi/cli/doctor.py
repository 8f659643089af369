"""Show which engines run here, whether they agree with their definitions, and how fast they are.

example:
  kizzasi doctor --json
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kizzasi.cli.common import check_device, columns

if TYPE_CHECKING:
    from torch import Tensor

# Layers that between them use every op with compiled kernels, at a width of 32.
SELF_TEST: dict[str, dict[str, Any]] = {
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 8, "head_dim": 16},
    "mamba3": {"d_state": 8, "head_dim": 16},
    "gla": {"n_heads": 2},
    "rwkv6": {"head_dim": 16},
    "rwkv7": {"head_dim": 16},
    "gated_delta": {"n_heads": 2},
    "rg_lru": {"n_heads": 2},
}
AGREE = 1e-9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-speed", action="store_true", help="measure no speed (saves seconds)")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import torch

    check_device(args.device)
    result = {
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "kernels": kernels(),
        "engines": {name: op.resolve("auto", torch.device(args.device)) for name, op in tables()},
        "refused": (refused := {}),
        "self_test": {
            **{kind: agreement(kind, args.device, refused) for kind in SELF_TEST},
            "eml_descent": descent_agreement(args.device),
        },
        "speed": {} if args.no_speed else speed(args.device),
    }
    return result, report(result)


def kernels() -> str:
    """Which instruction set the compiled kernels use, or why there are none."""
    try:
        from kizzasi.models.ops.native import library
    except ImportError as error:
        return f"absent: {error}"
    return f"{library.instruction_set()} (of {', '.join(library.AVAILABLE)})"


def tables() -> list[tuple[str, Any]]:
    """Every op's table of engines, and that of EML's descent."""
    import kizzasi.models.ops as ops
    from kizzasi.eml.core.descent import DESCENT
    from kizzasi.models.ops.engines import Engines

    names = [module.name for module in pkgutil.iter_modules(ops.__path__) if not module.ispkg]
    modules = [importlib.import_module(f"{ops.__name__}.{name}") for name in names]
    found = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, Engines)}
    return sorted((op.op, op) for op in (*found.values(), DESCENT))


def agreement(kind: str, device: str, refused: dict[str, str]) -> float | None:
    """The largest difference, relative to the largest number, between a layer and its defining
    loops in float64: of outputs and of the gradients of its weights. None where an engine
    refuses to run; `refused` then says why."""
    from kizzasi.errors import SpecError

    try:
        return _agreement(kind, device)
    except SpecError as error:
        refused[kind] = str(error)
        return None


def _agreement(kind: str, device: str) -> float:
    import torch

    from kizzasi.models.mixer import LayerContext, MixerSpec

    spec, results = MixerSpec.registry[kind](**SELF_TEST[kind]), []
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for engine in ("auto", "reference"):
        layer = spec.build(LayerContext(32)).double()
        layer.reset_parameters(1, torch.Generator().manual_seed(0))
        layer.engine = engine
        y = layer.to(device)(x.to(device)).y
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        grads = torch.autograd.grad((y * weights).sum(), [*layer.parameters()], allow_unused=True)
        results.append([y.detach(), *(g for g in grads if g is not None)])
    return max(map(_apart, *results))


def descent_agreement(device: str) -> float:
    """The same of EML's descent: of the parameters and errors that its trials end at."""
    import torch

    from kizzasi.eml import EndToEndTrainConfig, ToyEmlAttention
    from kizzasi.eml.core.descent import DESCENT, draw_trials

    x = torch.rand(6, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for engine in ("auto", "reference"):
        model = ToyEmlAttention("doctor", 4, 2, 6, 3).to(device)
        trials = draw_trials(EndToEndTrainConfig(trials=80), 1, model.param_count, "fixed")
        descend = DESCENT.pick(engine, torch.device(device))
        *errors, _ = descend(model, x.to(device), x.flip(1).to(device), *trials)
        results.append([torch.tensor(errors), *(p.detach() for p in model.parameters())])
    return max(map(_apart, *results))


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def speed(device: str) -> dict[str, float]:
    """What to expect, each with its own inputs: of products, and of the scan of Mamba."""
    import torch

    from kizzasi.models.ops.linear import LINEAR
    from kizzasi.models.ops.selective_scan import SELECTIVE_SCAN

    there, found = torch.device(device), {}
    x, w = (torch.randn(n, 256, device=device) for n in (2048, 512))
    u, dt = torch.randn(2, 1, 256, 256, device=device).abs()
    B = torch.randn(1, 256, 16, device=device)
    A = -torch.rand(256, 16, device=device)
    for engine in dict.fromkeys(("torch", LINEAR.resolve("auto", there))):
        product = LINEAR.pick(engine, there)
        seconds = median(lambda run=product: run(x, w, None), device)
        found[f"products, {engine}: GFLOP/s"] = 2e-9 * x.numel() * len(w) / seconds
    for engine in dict.fromkeys(("torch", SELECTIVE_SCAN.resolve("auto", there))):
        scan = SELECTIVE_SCAN.pick(engine, there)
        seconds = median(lambda run=scan: run(u, dt, A, B, B), device)
        found[f"selective scan, {engine}: million states/s"] = 1e-6 * u.numel() * 16 / seconds
    return found


def median(work: Callable[[], object], device: str) -> float:
    import torch

    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def report(result: dict[str, Any]) -> str:
    lines = [f"torch {result['torch']}, {result['device']}, {result['threads']} threads"]
    lines += [f"compiled kernels: {result['kernels']}", ""]
    lines += [columns([["op", "engine"], *([*row] for row in result["engines"].items())]), ""]
    rows = [["layer", "from its loops", ""]]
    for kind, far in result["self_test"].items():
        if far is None:
            rows.append([kind, "-", "refused"])
        else:
            rows.append([kind, f"{far:.1e}", "agrees" if far <= AGREE else "WRONG: please report"])
    lines.append(columns(rows))
    lines += [f"{kind}: {why}" for kind, why in result["refused"].items()]
    if result["speed"]:
        lines += [
            "",
            columns([["speed", ""]] + [[k, f"{v:,.0f}"] for k, v in result["speed"].items()]),
        ]
    return "\n".join(lines)
