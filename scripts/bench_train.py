"""Training speed and memory beside a peer: Mamba against mambapy, RWKV-7 against its own loop.

One step is forward, loss, backward and AdamW over random bytes: vocabulary 256, d_model 256,
4 layers, float32. Before a ratio is printed, the fast operators must agree with the loops that
define them in float64 (outputs, gradients, states), and Mamba with mambapy on the same weights.
Each model runs in its own process. Its peak memory is what that process ever held (ru_maxrss) over
what it held after the imports; on CUDA, what the allocator handed out.

example:
  python scripts/bench_train.py --seq-len 1024 --batch 4 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parent imports no torch: a child's ru_maxrss starts from its parent's
    from torch import Tensor, nn

VOCAB, D_MODEL, LAYERS = 256, 256, 4
PAIRS = {"mamba": "mambapy", "rwkv7": "rwkv7-loop"}  # ours and what it is compared with
MISSING = "mambapy is not installed, and Mamba has no peer without it: pip install mambapy"


def ours(kind: str, args: argparse.Namespace) -> nn.Module:
    from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
    from kizzasi.models.channels import RWKVChannelSpec
    from kizzasi.models.mixers import MambaSpec, RWKV7Spec

    if kind == "mamba":
        block = BlockSpec(MambaSpec())
    else:
        block = BlockSpec(RWKV7Spec(), RWKVChannelSpec(), norm="layer")
    spec = ModelSpec(D_MODEL, (block,) * LAYERS, Tokens(VOCAB))
    engine = "reference" if kind == "rwkv7-loop" else "torch"
    return build_model(spec, seed=args.seed, device=args.device, engine=engine)


def mambapy(args: argparse.Namespace) -> nn.Module:
    import torch
    from mambapy.mamba import Mamba, MambaConfig
    from torch import nn

    torch.manual_seed(args.seed)
    body = Mamba(MambaConfig(d_model=D_MODEL, n_layers=LAYERS))
    head = nn.Linear(D_MODEL, VOCAB, bias=False)
    model = nn.Sequential(nn.Embedding(VOCAB, D_MODEL), body, nn.RMSNorm(D_MODEL), head)
    return model.to(args.device)


def train_step(name: str, args: argparse.Namespace) -> Callable[[], object]:
    import torch
    import torch.nn.functional as F

    model = mambapy(args) if name == "mambapy" else ours(name, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(args.seed)
    data = torch.randint(VOCAB, (args.batch, args.seq_len + 1), generator=generator)
    x, y = data[:, :-1].to(args.device), data[:, 1:].to(args.device)

    def step() -> None:
        out = model(x)
        if name == "mambapy":
            loss = F.cross_entropy(out.flatten(0, 1), y.flatten())
        else:
            loss = out.loss(y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()

    return step


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step after one warm-up, and the peak memory of all steps."""
    import resource

    import torch

    unit = 1 if sys.platform == "darwin" else 1024

    def held() -> int:
        if args.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    torch.ones(256, 256, requires_grad=True).mm(torch.ones(256, 256)).sum().backward()
    ours("mamba", args) if name != "mambapy" else mambapy(args)  # the imports
    before = held()
    step = train_step(name, args)
    seconds = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    tokens = args.batch * args.seq_len
    return {
        "tokens_per_second": tokens / median,
        "step_seconds": median,
        "peak_bytes": held() - before,
    }


def compare(
    name: str,
    fast: Callable[..., tuple[Tensor, Tensor]],
    loop: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    starts: Tensor,
) -> None:
    """Stop unless output, state and every gradient agree in float64, rtol 1e-9."""
    import torch

    for extra in (None, starts):
        results = []
        for op in (fast, loop):
            y, state = op(*inputs, extra)
            weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
            loss = (y * weights).sum() + state.square().sum()
            results.append([y, state, *torch.autograd.grad(loss, inputs)])
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            if not torch.allclose(a, b, rtol=1e-9, atol=1e-10):
                worst = (a - b).abs().max().item()
                sys.exit(f"{name}: result {i} differs from the loop by {worst:.3g}; no ratio")


def check(kind: str, args: argparse.Namespace) -> None:
    """The fast operators of one architecture against their definitions."""
    import torch

    from kizzasi.models.ops.conv import causal_conv1d, causal_conv1d_ref
    from kizzasi.models.ops.selective_scan import selective_scan, selective_scan_ref
    from kizzasi.models.ops.wkv7 import wkv7, wkv7_ref

    generator = torch.Generator().manual_seed(args.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(args.device)

    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [v.requires_grad_() for v in tensors]

    b, t, d, n = 2, 100, 24, 8
    starts = (torch.rand(b, t, generator=generator) < 0.1).to(args.device)
    if kind == "mamba":
        rates, dt = -draw(d, n).exp(), 0.1 * draw(b, t, d).abs()
        skip, state = draw(d), draw(b, d, n)
        inputs = leaves(draw(b, t, d), dt, rates, draw(b, t, n), draw(b, t, n), skip, state)
        compare("selective_scan", selective_scan, selective_scan_ref, inputs, starts)
        inputs = leaves(draw(b, t, d), draw(d, 4), draw(d), draw(b, d, 3))
        compare("causal_conv1d", causal_conv1d, causal_conv1d_ref, inputs, starts)
        check_against_mambapy(args)
    else:
        shape = b, t, 3, n
        removal = torch.nn.functional.normalize(draw(*shape), dim=-1)
        log_decay, rate = -0.6 * draw(*shape).sigmoid(), draw(*shape).sigmoid()
        inputs = [draw(*shape), log_decay, draw(*shape), draw(*shape), -removal, removal * rate]
        compare("wkv7", wkv7, wkv7_ref, leaves(*inputs, draw(b, 3, n, n)), starts)


def check_against_mambapy(args: argparse.Namespace) -> None:
    """The same weights must give the same function, or the race is between different things."""
    import torch
    from mambapy.mamba import MambaBlock, MambaConfig

    from kizzasi.models.mixer import LayerContext
    from kizzasi.models.mixers import MambaSpec

    torch.manual_seed(args.seed)
    theirs = MambaBlock(MambaConfig(d_model=D_MODEL, n_layers=LAYERS)).to(args.device)
    mixer = MambaSpec().build(LayerContext(D_MODEL)).to(args.device)
    mixer.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 65, D_MODEL, device=args.device)
    with torch.no_grad():
        worst = (mixer(x).y - theirs(x)).abs().max().item()
    if worst > 1e-4:
        sys.exit(f"mamba: mambapy's output on the same weights differs by {worst:.3g}; no ratio")


def child(task: str, name: str, given: list[str]) -> dict[str, float]:
    """Run `task name` of this program in a fresh process and read its answer."""
    command = [sys.executable, os.path.abspath(__file__), *given, f"--{task}", name]
    # Where other programs use the cores too, threads that wait by spinning ruin any measurement.
    env = {"GOMP_SPINCOUNT": "1000", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout or "{}")


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*PAIRS], default=[*PAIRS])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="steps whose median counts")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", choices=[*PAIRS], help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=[*PAIRS, *PAIRS.values()], help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: list[str]) -> None:
    args = parse(given)
    if args.check or args.measure:
        work(args)
        return
    for name in args.models:
        child("check", name, given)
    rows = []
    for name in args.models:
        peer = PAIRS[name]
        mine, theirs = child("measure", name, given), child("measure", peer, given)
        speed = mine["tokens_per_second"] / theirs["tokens_per_second"]
        memory = mine["peak_bytes"] / theirs["peak_bytes"]
        row = {"model": name, **mine, "peer": peer, "of_peer": theirs}
        rows.append({**row, "speed_ratio": speed, "memory_ratio": memory})
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        for name, m in ((row["model"], row), (row["peer"], row["of_peer"])):
            peak = m["peak_bytes"] / 2**20
            print(f"{name:10} {m['tokens_per_second']:8.0f} tokens/s  {peak:6.0f} MiB")
        print(f"{'':10} {row['speed_ratio']:7.2f} x speed   {row['memory_ratio']:6.2f} x memory")


def work(args: argparse.Namespace) -> None:
    """What a child does."""
    import importlib.util

    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    needed = (args.check or args.measure) in ("mamba", "mambapy")
    if needed and importlib.util.find_spec("mambapy") is None:
        sys.exit(MISSING)
    if args.check:
        check(args.check, args)
    else:
        print(json.dumps(measure(args.measure, args)))


if __name__ == "__main__":
    main(sys.argv[1:])
