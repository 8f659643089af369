"""Speed of every op with compiled kernels beside its torch form: forward, and with backward.

First both must agree with the defining loop in float64 (outputs, states, gradients of every input),
or there is no ratio. Both then take turns in one process, so that whatever else the machine does
falls on both alike. --busy keeps as many other processes spinning as there are cores, less one.
The roof is what a copy and a product reach in the same run.

The rows moe_64 and moe_8 are whole layers, of 64 experts of width 128 and of 8 of width 512, on
2,048 tokens: "dense" is how many times a dense SwiGLU of as many flops they take.

example:
  python scripts/bench_ops.py --ops selective_scan wkv7 --seq-len 1024 --batch 4 --threads 2 --wall
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.ops.conv import CAUSAL_CONV1D
from kizzasi.models.ops.decay_scan import DECAY_SCAN
from kizzasi.models.ops.delta import DELTA_RULE
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.linear import LINEAR
from kizzasi.models.ops.linear_attention import LINEAR_ATTENTION
from kizzasi.models.ops.selective_scan import SELECTIVE_SCAN
from kizzasi.models.ops.sorted_experts import MIX_SORTED
from kizzasi.models.ops.ssd import SSD
from kizzasi.models.ops.wkv7 import WKV7

CPU = torch.device("cpu")


class Case(NamedTuple):
    """An op, its inputs for (b, t, width) and what it is called with besides."""

    table: Engines[Any]
    inputs: Callable[[Draw, int, int, int], list[Tensor]]
    options: dict[str, Any]


class Draw:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def decay(self, *shape: int) -> Tensor:
        return -0.02 - 0.3 * self(*shape).square()


def scan(draw: Draw, b: int, t: int, d: int) -> list[Tensor]:
    d, n = 2 * d, 16
    streams = [draw(b, t, d), draw(b, t, d) - 3, -draw(d, n).exp(), draw(b, t, n), draw(b, t, n)]
    return [*streams, draw(d), draw(b, d, n)]


def heads(draw: Draw, b: int, t: int, d: int, count: int, n: int = 64) -> list[Tensor]:
    n = min(n, d)
    return [draw(b, t, d // n, n) / n**0.5 for _ in range(count)]


def linear_attention(draw: Draw, b: int, t: int, d: int) -> list[Tensor]:
    q, k, v = heads(draw, b, t, d, 3)
    return [q, k, v, draw.decay(*q.shape)]


def dual(draw: Draw, b: int, t: int, d: int) -> list[Tensor]:
    x, B, C = heads(draw, b, t, 2 * d, 1)[0], draw(b, t, 1, 64), draw(b, t, 1, 64)
    return [x, draw.decay(*x.shape[:3]), B, C]


def delta(draw: Draw, b: int, t: int, d: int) -> list[Tensor]:
    q, k, v = heads(draw, b, t, d, 3)
    k = F.normalize(k, dim=-1)
    return [q, k, v, draw.decay(*q.shape[:3], 1), draw(*q.shape[:3]).sigmoid()]


def wkv7(draw: Draw, b: int, t: int, d: int) -> list[Tensor]:
    r, k, v, removal, rate = heads(draw, b, t, d, 5)
    removal = F.normalize(removal, dim=-1)
    return [r, draw.decay(*r.shape), k, v, -removal, removal * rate.sigmoid()]


CASES = {
    "selective_scan": Case(SELECTIVE_SCAN, scan, {"softplus": True}),
    "causal_conv1d": Case(
        CAUSAL_CONV1D,
        lambda draw, b, t, d: [draw(b, t, 2 * d), draw(2 * d, 4), draw(2 * d)],
        {"silu": True},
    ),
    "linear_attention": Case(LINEAR_ATTENTION, linear_attention, {}),
    "ssd": Case(SSD, dual, {}),
    "delta_rule": Case(DELTA_RULE, delta, {}),
    "wkv7": Case(WKV7, wkv7, {}),
    "decay_scan": Case(DECAY_SCAN, lambda draw, b, t, d: [draw.decay(b, t, d), draw(b, t, d)], {}),
    "linear": Case(LINEAR, lambda draw, b, t, d: [draw(b, t, d), draw(2 * d, d), draw(2 * d)], {}),
}
MIXTURES = {"moe_64": (2048, 256, 128, 64, 4), "moe_8": (2048, 256, 512, 8, 2)}  # n, d, h, e, k


EVERY = [*CASES, *MIXTURES]
Run: TypeAlias = Callable[[], Any]


def results(case: Case, engine: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    out = case.table.pick(engine, CPU)(*inputs, **case.options)
    outputs = [out] if isinstance(out, Tensor) else [*out]
    weighted = [y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
    loss = torch.stack([y.sum() for y in weighted]).sum()
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def check(name: str, case: Case) -> None:
    """Stop unless both engines agree with the loop in float64, rtol 1e-9."""
    inputs = [x.requires_grad_() for x in case.inputs(Draw(torch.float64), 2, 70, 24)]
    expected = results(case, "reference", inputs)
    for engine in ("torch", "native"):
        for i, (a, b) in enumerate(zip(results(case, engine, inputs), expected, strict=True)):
            if not torch.allclose(
                a, b, rtol=1e-9, atol=1e-10 * max(1.0, float(b.detach().abs().max()))
            ):
                worst = (a - b).detach().abs().max().item()
                sys.exit(f"{name}: result {i} of {engine} is {worst:.3g} off its loop; no ratio")


def mixture(name: str, dtype: torch.dtype) -> dict[str, tuple[Run, list[Tensor]]]:
    """A mixture on every engine, and its dense twin: what runs, and what gets gradients."""
    n, d, h, e, k = MIXTURES[name]
    draw, seed = Draw(dtype), torch.Generator().manual_seed(0)
    x = draw(1, n, d).requires_grad_()
    moe = MoESpec(e, k, h, balance_weight=0.0, z_loss_weight=0.0).build(LayerContext(d))
    dense = SwiGLUSpec(k * h).build(LayerContext(d))
    for layer in (moe, dense):
        layer.reset_parameters(1, seed)
        layer.to(dtype)

    def on(engine: str) -> Run:
        def run() -> Tensor:
            moe.engine = engine
            return moe(x).y

        return run

    runs = {engine: (on(engine), [x, *moe.parameters()]) for engine in ("native", "torch")}
    runs["reference"] = (on("reference"), [x, *moe.parameters()])
    return runs | {"dense": (lambda: dense(x).y, [x, *dense.parameters()])}


def check_mixture(name: str) -> None:
    """Stop unless the engines agree with the definition in float64, rtol 1e-9."""
    runs = mixture(name, torch.float64)
    found = {}
    for engine in ("reference", "torch", "native"):
        run, leaves = runs[engine]
        y = run()
        found[engine] = [y, *torch.autograd.grad(y.cos().sum(), leaves)]
    for engine in ("torch", "native"):
        for i, (a, b) in enumerate(zip(found[engine], found["reference"], strict=True)):
            if not torch.allclose(
                a, b, rtol=1e-9, atol=1e-10 * max(1.0, float(b.detach().abs().max()))
            ):
                sys.exit(f"{name}: result {i} of {engine} is off its definition; no ratio")


def case_runs(case: Case, args: argparse.Namespace) -> dict[str, tuple[Run, list[Tensor]]]:
    inputs = case.inputs(Draw(torch.float32), args.batch, args.seq_len, args.width)
    leaves = [x.requires_grad_() for x in inputs]
    return {
        engine: (partial(case.table.pick(engine, CPU), *leaves, **case.options), leaves)
        for engine in ("torch", "native")
    }


def race(
    runs: dict[str, tuple[Run, list[Tensor]]], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Median seconds of each: forward alone, and forward with backward."""
    clock = time.perf_counter if args.wall else time.process_time
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    dy = None
    for _ in range(args.repeats + 1):
        for name, (run, leaves) in runs.items():
            start = clock()
            out = run()
            middle = clock()
            y = out if isinstance(out, Tensor) else out[0]
            dy = torch.randn_like(y) if dy is None else dy
            again = clock()
            torch.autograd.grad(y, leaves, dy, allow_unused=True)
            seconds[name].append((middle - start, middle - start + clock() - again))
    return {
        name: {
            part: statistics.median(x[i] for x in taken[1:])
            for i, part in enumerate(("forward", "both"))
        }
        for name, taken in seconds.items()
    }


def roof(args: argparse.Namespace) -> dict[str, float]:
    """What this machine reaches now: GB/s of a copy, GFLOP/s of a product."""
    clock = time.perf_counter if args.wall else time.process_time
    a, b, x = torch.randn(2**24), torch.empty(2**24), torch.randn(1024, 1024)
    best = {"copy_gb_per_second": 0.0, "product_gflop_per_second": 0.0}
    for _ in range(5):
        start = clock()
        b.copy_(a)
        middle = clock()
        torch.mm(x, x)
        end = clock()
        best["copy_gb_per_second"] = max(
            best["copy_gb_per_second"], 8e-9 * 2**24 / (middle - start)
        )
        best["product_gflop_per_second"] = max(
            best["product_gflop_per_second"], 2e-9 * 1024**3 / (end - middle)
        )
    return best


def spin() -> None:
    while True:
        pass


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| op | forward ms | torch | ratio | with backward ms | torch | ratio | dense |"]
    lines.append("|---|" + "---:|" * 7)
    for r in rows:
        cells = [r["op"]]
        for part in ("forward", "both"):
            fast, slow = r["native"][part], r["torch"][part]
            cells += [f"{1e3 * fast:.2f}", f"{1e3 * slow:.2f}", f"{slow / fast:.2f}"]
        cells.append(f"{r['native']['both'] / r['dense']['both']:.2f}" if "dense" in r else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=EVERY, default=EVERY)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="d_model (default 256)")
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--wall", action="store_true", help="time by the clock on the wall")
    parser.add_argument("--busy", action="store_true", help="keep the other cores busy")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(given)


def main(given: list[str]) -> None:
    args = parse(given)
    torch.set_num_threads(args.threads)
    others = [
        multiprocessing.Process(target=spin, daemon=True) for _ in range((os.cpu_count() or 1) - 1)
    ]
    rows, names = [], []
    for name in args.ops:
        table = MIX_SORTED if name in MIXTURES else CASES[name].table
        if table.resolve("auto", CPU) != "native":
            print(f"{name}: no compiled kernel here; kizzasi doctor says why", file=sys.stderr)
            continue
        names.append(name)
        if name in MIXTURES:
            check_mixture(name)
        else:
            check(name, CASES[name])
    for other in others if args.busy else ():
        other.start()
    for name in names:
        runs = mixture(name, torch.float32) if name in MIXTURES else case_runs(CASES[name], args)
        runs.pop("reference", None)
        taken = race(runs, args)
        ratio = taken["torch"]["both"] / taken["native"]["both"]
        rows.append({"op": name, **taken, "ratio": ratio})
    best = roof(args)
    for other in others if args.busy else ():
        other.terminate()
    if args.json:
        print(json.dumps({"rows": rows, **best, "threads": args.threads, "load": os.getloadavg()}))
        return
    print(as_table(rows))
    print(
        f"\ncopy {best['copy_gb_per_second']:.1f} GB/s, product "
        f"{best['product_gflop_per_second']:.0f} GFLOP/s, {args.threads} threads, "
        f"load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
