"""Time a SwiGLU mixture of experts, forward and backward, against its peers in one run.

Peers: the equal-FLOP dense SwiGLU, and the eager expert loop of transformers if it is installed.
Prints medians, least times and ratios after checking that all ways of dispatch agree.

    python scripts/bench_moe.py [--threads 1] [--repeats 9] [--device cpu] [--dtype float32]

With --cpu-time the clock counts this process only, which is steadier on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kizzasi.models.channels.moe import MoE, MoESpec
from kizzasi.models.mixer import ChannelSpec, LayerContext
from kizzasi.models.ops import experts

SHAPES = ((2048, 256, 128, 64, 4), (2048, 256, 512, 8, 2), (256, 256, 256, 16, 2))
WAYS = ("sorted", "grouped", "masked")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a mixture of experts.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {device}, {dtype}, {arguments.threads} threads")
    for shape in SHAPES:
        bench(shape, device, dtype, arguments.repeats, clock)


def bench(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    clock: Callable[[], float],
) -> None:
    n, d, h, e, k = shape
    layer = LayerContext(d)
    spec = MoESpec(n_experts=e, top_k=k, hidden=h, balance_weight=0, z_loss_weight=0)
    moe = spec.build(layer)
    moe.reset_parameters(1, torch.Generator().manual_seed(0))
    moe.to(device=device, dtype=dtype)
    dense = ChannelSpec.registry["swiglu"](hidden=k * h).build(layer)
    dense.reset_parameters(1, torch.Generator().manual_seed(0))
    dense.to(device=device, dtype=dtype)
    x = torch.randn(1, n, d, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    check(moe, x)
    calls: dict[str, Callable[[], object]] = {"dense": lambda: run(dense, lambda v: dense(v).y, x)}
    for how in WAYS:
        calls[how] = lambda how=how: run(moe, dispatched(moe, how), x)
    eager = transformers_loop(moe)
    if eager is not None:
        calls["transformers"] = lambda: run(eager, eager, x)
    times = measure(calls, repeats, clock)
    print(f"n={n} d={d} h={h} e={e} k={k}")
    for name, (median, least) in times.items():
        ratios = [a / b for a, b in zip((median, least), times["dense"], strict=True)]
        print(f"  {name:13} median {1e3 * median:7.1f} ms {ratios[0]:6.2f} x dense", end="")
        print(f"   least {1e3 * least:7.1f} ms {ratios[1]:6.2f} x dense")


def dispatched(moe: MoE, how: str) -> Callable[[Tensor], Tensor]:
    """The layer's call with a way of dispatch in place of the rule's."""

    def call(x: Tensor) -> Tensor:
        rule = experts.dispatch_rule
        experts.dispatch_rule = lambda x, down, engine: how
        try:
            return moe(x).y
        finally:
            experts.dispatch_rule = rule

    return call


def run(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """One forward and backward; returns the result and the gradients."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = call(x)
    y.backward(torch.cos(y.detach()))
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]  # pyright: ignore[reportReturnType]


def check(moe: MoE, x: Tensor) -> None:
    tolerance = 3e-2 if x.dtype == torch.bfloat16 else 1e-4
    want = run(moe, dispatched(moe, "masked"), x)
    for how in WAYS:
        for a, b in zip(run(moe, dispatched(moe, how), x), want, strict=True):
            wrong = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
            assert wrong < tolerance, f"{how} is off by {wrong:.1e}; no timing before it agrees"


def transformers_loop(moe: MoE) -> nn.Module | None:
    """The Qwen3-MoE block with the same weights, running its eager loop over experts."""
    try:
        from transformers import Qwen3MoeConfig  # pyright: ignore[reportMissingImports]
        from transformers.models.qwen3_moe import modeling_qwen3_moe as hf  # pyright: ignore
    except ImportError:
        return None
    d, e, k = moe.gate.choice.d_model, moe.spec.n_experts, moe.spec.top_k
    config = Qwen3MoeConfig(
        hidden_size=d,
        moe_intermediate_size=moe.experts.tensors(0)[0].shape[0],
        num_experts=e,
        num_experts_per_tok=k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "eager"
    block = hf.Qwen3MoeSparseMoeBlock(config)
    weight = next(moe.experts.parameters())
    block.to(weight.device, weight.dtype)
    block.load_state_dict(moe.state_dict())
    return block


def measure(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """Median and least seconds; calls take turns, so that a busy moment hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {n: (statistics.median(v), min(v)) for n, v in seconds.items()}


if __name__ == "__main__":
    main()
