"""Training speed and memory of every kind of mixer: beside attention, beside its own torch form,
and beside the peers that are installed (mambapy, transformers).

One step is forward, loss, backward and AdamW over random bytes: vocabulary 256, d_model 256,
4 layers, float32; a mixer that mixes no channels is followed by a SwiGLU of 688. First the layer
must agree with its defining loop in float64 (outputs and gradients of the weights), or there is no
ratio. All that is compared takes its steps in turn in one process, so that whatever else the
machine does falls on all alike; seconds are the process's own CPU time unless --wall says
otherwise. Peak memory is measured in a process for each: what it ever held over what it held after
the imports.

example:
  python scripts/bench_train.py --kinds mamba rwkv7 --seq-len 1024 --batch 4 --repeats 5
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the parent of a memory measurement holds as little as it can
    from torch import nn

VOCAB, D_MODEL, LAYERS, FFN = 256, 256, 4, 688
# kind: fields of its spec, and its channel: "swiglu", one of its own, or none
KINDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "attention": ({"n_heads": 8}, "swiglu"),
    "mamba": ({}, None),
    "mamba2": ({}, None),
    "mamba3": ({}, "swiglu"),
    "rwkv4": ({}, "rwkv_channel"),
    "rwkv5": ({}, "swiglu"),
    "rwkv6": ({}, "swiglu"),
    "rwkv7": ({}, "swiglu"),
    "gla": ({"n_heads": 4}, "swiglu"),
    "retention": ({"n_heads": 4}, "swiglu"),
    "lightning": ({"n_heads": 4}, "swiglu"),
    "gated_delta": ({"n_heads": 4}, "swiglu"),
    "kda": ({"n_heads": 4}, "swiglu"),
    "mlstm": ({"n_heads": 4}, "swiglu"),
    "rg_lru": ({"n_heads": 4}, "swiglu"),
    "s4": ({}, "swiglu"),
    "s4d": ({}, "swiglu"),
    "s5": ({}, "swiglu"),
    "long_conv": ({"max_len": 4096}, "swiglu"),
    "short_conv": ({}, "swiglu"),
}
PEERS = {"mamba": "mambapy", "attention": "transformers-llama"}
NEEDS = {"mambapy": "mambapy", "transformers-llama": "transformers"}


def block(kind: str) -> Any:
    from kizzasi.models import BlockSpec
    from kizzasi.models.mixer import ChannelSpec, MixerSpec

    fields, channel = KINDS[kind]
    mixer = MixerSpec.registry[kind](**fields)
    if channel is None:
        return BlockSpec(mixer)
    sizes = {"hidden": FFN} if channel == "swiglu" else {}
    return BlockSpec(mixer, ChannelSpec.registry[channel](**sizes))


def ours(kind: str, engine: str, args: argparse.Namespace) -> nn.Module:
    from kizzasi.models import ModelSpec, Tokens, build_model

    spec = ModelSpec(D_MODEL, (block(kind),) * LAYERS, Tokens(VOCAB))
    return build_model(spec, seed=args.seed, device=args.device, engine=engine)  # pyright: ignore[reportArgumentType]


def mambapy(args: argparse.Namespace) -> nn.Module:
    import torch
    from mambapy.mamba import Mamba, MambaConfig
    from torch import nn

    torch.manual_seed(args.seed)
    body = Mamba(MambaConfig(d_model=D_MODEL, n_layers=LAYERS))
    head = nn.Linear(D_MODEL, VOCAB, bias=False)
    return nn.Sequential(nn.Embedding(VOCAB, D_MODEL), body, nn.RMSNorm(D_MODEL), head)


def llama(args: argparse.Namespace) -> nn.Module:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=D_MODEL,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            use_cache=False,
        )
    )


def train_step(name: str, args: argparse.Namespace) -> Callable[[], None]:
    """name: a kind, "kind@engine", or a peer."""
    import torch
    import torch.nn.functional as F

    peers = {"mambapy": mambapy, "transformers-llama": llama}
    if name in peers:
        model = peers[name](args).to(args.device)
    else:
        kind, _, engine = name.partition("@")
        model = ours(kind, engine or "auto", args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(args.seed)
    data = torch.randint(VOCAB, (args.batch, args.seq_len + 1), generator=generator)
    x, y = data[:, :-1].to(args.device), data[:, 1:].to(args.device)

    def step() -> None:
        out = model(x)
        if name in peers:
            logits = out if isinstance(out, torch.Tensor) else out.logits
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        else:
            loss = out.loss(y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()

    return step


def check(kind: str, args: argparse.Namespace) -> None:
    """Stop unless the layer agrees with its defining loop in float64, rtol 1e-9."""
    import torch

    from kizzasi.models.mixer import LayerContext

    spec, results = block(kind).mixer, []
    x = torch.randn(2, 70, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for engine in ("auto", "reference"):
        layer = spec.build(LayerContext(128)).double()
        layer.reset_parameters(1, torch.Generator().manual_seed(args.seed))
        layer.engine = engine
        y = layer.to(args.device)(x.to(args.device)).y
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        grads = torch.autograd.grad((y * weights).sum(), [*layer.parameters()], allow_unused=True)
        results.append([y, *grads])
    for a, b in zip(*results, strict=True):
        if a is not None and not torch.allclose(
            a, b, rtol=1e-9, atol=1e-9 * float(b.detach().abs().max())
        ):
            sys.exit(f"{kind}: differs from its loop by {(a - b).abs().max():.3g}; no ratio")


def race(names: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the steps of each, taken in turn, the first of which does not count."""
    clock = time.perf_counter if args.wall else time.process_time
    steps = {name: train_step(name, args) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.repeats + 1):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return {name: all_of[1:] for name, all_of in seconds.items()}


def peak(name: str, args: argparse.Namespace) -> int:
    """Bytes at most held by two steps, over those held after the imports."""
    import resource

    import torch

    unit = 1 if sys.platform == "darwin" else 1024

    def held() -> int:
        if args.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    torch.ones(256, 256, requires_grad=True).mm(torch.ones(256, 256)).sum().backward()
    short = argparse.Namespace(**{**vars(args), "batch": 1, "seq_len": 2})
    train_step(name, short)()  # the imports
    before, step = held(), train_step(name, args)
    step()
    step()
    return held() - before


def child_peak(name: str, given: list[str]) -> int:
    command = [sys.executable, os.path.abspath(__file__), *given, "--peak", name]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(kind: str, args: argparse.Namespace, given: list[str]) -> dict[str, Any]:
    """One row: this kind, its torch form where it runs on another, attention, and its peer."""
    import torch

    from kizzasi.models.mixer import Mixer

    model, device = ours(kind, "auto", args), torch.device(args.device)
    mixers = [m for m in model.modules() if isinstance(m, Mixer)]
    engines = {op.resolve("auto", device) for m in mixers for op in m.ops} or {"torch"}
    names = {kind: kind, "attention": "attention"}
    if engines != {"torch"}:
        names["torch"] = f"{kind}@torch"
    peer = PEERS.get(kind)
    if peer and not args.no_peers and importlib.util.find_spec(NEEDS[peer]):
        names["peer"] = peer
    seconds = race([*dict.fromkeys(names.values())], args)
    tokens = args.batch * args.seq_len
    speed = {name: tokens / statistics.median(s) for name, s in seconds.items()}
    row = {
        "kind": kind,
        "engine": "+".join(sorted(engines)),
        "params": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": speed[kind],
        "of_attention": speed[kind] / speed["attention"],
        "of_torch": speed[kind] / speed[names["torch"]] if "torch" in names else None,
        "peer": names.get("peer"),
        "of_peer": speed[kind] / speed[names["peer"]] if "peer" in names else None,
        "peak_bytes": None,
        "peer_peak_bytes": None,
    }
    if args.memory:
        row["peak_bytes"] = child_peak(kind, given)
        row["peer_peak_bytes"] = child_peak(names["peer"], given) if "peer" in names else None
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""

    def ratio(x: float | None) -> str:
        return "" if x is None else f"{x:.2f}"

    def mib(x: int | None) -> str:
        return "" if x is None else f"{x / 2**20:.0f}"

    head = "kind | engine | parameters | tokens/s | of attention | of its torch form | of a peer"
    lines = [f"| {head} | peak MiB | peer's |", "|---|---|" + "---:|" * 7]
    for r in rows:
        peer = f"{ratio(r['of_peer'])} {r['peer']}" if r["peer"] else ""
        cells = [r["kind"], r["engine"], f"{r['params']:,}", f"{r['tokens_per_second']:,.0f}"]
        cells += [ratio(r["of_attention"]), ratio(r["of_torch"]), peer]
        lines.append(f"| {' | '.join([*cells, mib(r['peak_bytes']), mib(r['peer_peak_bytes'])])} |")
    return "\n".join(lines)


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="steps whose median counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--wall", action="store_true", help="time by the clock on the wall")
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: list[str]) -> None:
    args = parse(given)
    import torch

    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(args.peak, args))
        return
    rows = []
    for kind in args.kinds:
        check(kind, args)
        rows.append(measure(kind, args, given))
        if not args.json:
            print(
                table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[-1],
                flush=True,
            )
    if args.json:
        print(json.dumps({"load": os.getloadavg(), "threads": args.threads, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
