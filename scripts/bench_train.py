"""Training speed and memory of every kind of mixer: beside attention, beside its own torch form,
and beside the peers that are installed (mambapy, transformers).

One step is forward, loss, backward and AdamW over random bytes: vocabulary 256, d_model 256,
4 layers, float32; a mixer that mixes no channels is followed by a SwiGLU of 688. First the layer
must agree with its defining loop in float64 (outputs and gradients of the weights), or there is no
ratio. All that is compared takes its steps in turn in one process, so that whatever else the
machine does falls on all alike; seconds are the process's own CPU time unless --wall says
otherwise. Peak memory is measured in a process for each: what it ever held over what it held after
the imports.

--equal-params gives a kind the width of channel mixer, or where it has none the number of layers,
with which it has most nearly as many parameters as the attention model (but not its peer or its
torch form, which stay out). --flat LENGTHS times one sequence of each length: time per token.

example:
  python scripts/bench_train.py --kinds mamba rwkv7 --seq-len 1024 --batch 4 --repeats 5
  python scripts/bench_train.py --kinds mamba s4d --width 64 --layers 2 --flat 1024 32768
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

    from kizzasi.models import ModelSpec

VOCAB = 256
CHANNEL = {"swiglu": ("swiglu", {"hidden": 688}), "rwkv": ("rwkv_channel", {})}
MOE = ("moe", {"n_experts": 8, "top_k": 2, "hidden": 344})
LATENT = {"kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
FOUR, EIGHT = {"n_heads": 4}, {"n_heads": 8}
# name: mixer, fields of its spec, and its channel: a SwiGLU, one of its own, or none
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, dict[str, Any]] | None]] = {
    **{kind: (kind, {}, None) for kind in ("mamba", "mamba2")},
    **{
        kind: (kind, FOUR, CHANNEL["swiglu"])
        for kind in ("gla", "retention", "lightning", "gated_delta", "kda", "delta_product")
        + ("mlstm", "slstm", "rg_lru", "forgetting", "kernel_attention")
    },
    **{
        kind: (kind, {}, CHANNEL["swiglu"])
        for kind in ("mamba3", "rwkv5", "rwkv6", "rwkv7", "s4", "s4d", "s5", "short_conv")
    },
    "attention": ("attention", EIGHT, CHANNEL["swiglu"]),
    "mla": ("mla", EIGHT | LATENT, CHANNEL["swiglu"]),
    "rwkv4": ("rwkv4", {}, CHANNEL["rwkv"]),
    "long_conv": ("long_conv", {"max_len": 4096}, CHANNEL["swiglu"]),
    "mixtral": ("attention", EIGHT, MOE),
}
PEERS = {  # which peer stands beside which kind
    "mamba": "mambapy",
    "attention": "transformers-llama",
    "mamba2": "transformers-mamba2",
    "rwkv4": "transformers-rwkv",
    "mixtral": "transformers-mixtral",
}


def model_spec(name: str, args: argparse.Namespace, hidden: int = 0, layers: int = 0) -> ModelSpec:
    """`hidden`: width of the channel mixer, if not the usual one; `layers` likewise."""
    from kizzasi.models import BlockSpec, ModelSpec, Tokens
    from kizzasi.models.mixer import ChannelSpec, MixerSpec

    kind, fields, channel = KINDS[name]
    parts: list[Any] = [MixerSpec.registry[kind](**fields)]
    if channel is not None:
        given = channel[1] | ({"hidden": hidden} if hidden else {})
        given |= (
            {} if hidden or "hidden" not in given else {"hidden": scaled(given["hidden"], args)}
        )
        parts.append(ChannelSpec.registry[channel[0]](**given))
    return ModelSpec(args.width, (BlockSpec(*parts),) * (layers or args.layers), Tokens(VOCAB))


def scaled(hidden: int, args: argparse.Namespace) -> int:
    """A width at d_model 256, at this one."""
    return max(1, hidden * args.width // 256)


def equal_spec(name: str, args: argparse.Namespace) -> ModelSpec:
    """Of the specs of a kind, the one with most nearly the parameters of attention."""

    def params(spec: ModelSpec) -> int:
        return spec.cost(1).params

    wanted = params(model_spec("attention", args))
    if KINDS[name][2] is None:
        made = [model_spec(name, args, layers=n) for n in range(1, 4 * args.layers)]
    else:
        one, two = (params(model_spec(name, args, hidden=n)) for n in (1, 2))
        made = [model_spec(name, args, hidden=max(1, 1 + round((wanted - one) / (two - one))))]
    return min(made, key=lambda spec: abs(params(spec) - wanted))


def ours(name: str, engine: str, args: argparse.Namespace) -> nn.Module:
    from kizzasi.models import build_model

    spec = (equal_spec if args.equal_params else model_spec)(name, args)
    return build_model(spec, seed=args.seed, device=args.device, engine=engine)  # pyright: ignore[reportArgumentType]


def mambapy(args: argparse.Namespace) -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig
    from torch import nn

    body = Mamba(MambaConfig(d_model=args.width, n_layers=args.layers))
    head = nn.Linear(args.width, VOCAB, bias=False)
    return nn.Sequential(nn.Embedding(VOCAB, args.width), body, nn.RMSNorm(args.width), head)


def transformers(name: str, args: argparse.Namespace) -> nn.Module:
    """A model of transformers in the shape of ours."""
    import transformers as hf

    size = {"hidden_size": args.width, "num_hidden_layers": args.layers, "use_cache": False}
    size["vocab_size"] = VOCAB
    attention = {"num_attention_heads": 8, "num_key_value_heads": 8}
    inner = 2 * args.width
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaConfig(intermediate_size=scaled(688, args), **attention, **size),
        "mamba2": lambda: hf.Mamba2Config(
            num_heads=inner // 64, head_dim=64, state_size=128, n_groups=1, expand=2, **size
        ),
        "rwkv": lambda: hf.RwkvConfig(attention_hidden_size=args.width, **size),
        "mixtral": lambda: hf.MixtralConfig(
            intermediate_size=scaled(344, args),
            num_local_experts=8,
            num_experts_per_tok=2,
            **attention,
            **size,
        ),
    }
    return hf.AutoModelForCausalLM.from_config(configs[name]())


def peer_model(name: str, args: argparse.Namespace) -> nn.Module:
    import torch

    torch.manual_seed(args.seed)
    kind = name.partition("-")[2]
    return (transformers(kind, args) if kind else mambapy(args)).to(args.device)


def train_step(name: str, args: argparse.Namespace) -> Callable[[], None]:
    """name: a kind, "kind@engine", or a peer."""
    import torch
    import torch.nn.functional as F

    is_peer = name in PEERS.values()
    if is_peer:
        model = peer_model(name, args).train()
    else:
        kind, _, engine = name.partition("@")
        model = ours(kind, engine or "auto", args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(args.seed)
    data = torch.randint(VOCAB, (args.batch, args.seq_len + 1), generator=generator)
    x, y = data[:, :-1].to(args.device), data[:, 1:].to(args.device)

    def step() -> None:
        out = model(x)
        if is_peer:
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

    spec, results = model_spec(kind, args).blocks[0].mixer, []  # pyright: ignore[reportAttributeAccessIssue]
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


def flat(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: seconds per token at every length, one sequence at a time, lengths in turn."""
    clock = time.perf_counter if args.wall else time.process_time
    lengths = {t: argparse.Namespace(**vars(args) | {"batch": 1, "seq_len": t}) for t in args.flat}
    steps = {t: train_step(kind, given) for t, given in lengths.items()}
    seconds: dict[int, list[float]] = {t: [] for t in lengths}
    for _ in range(args.repeats + 1):
        for t, step in steps.items():
            start = clock()
            for _ in range(max(args.flat) // t):  # as many tokens of every length
                step()
            seconds[t].append((clock() - start) / (max(args.flat) // t * t))
    per_token = {t: statistics.median(taken[1:]) for t, taken in seconds.items()}
    growth = {t: s / per_token[args.flat[0]] for t, s in per_token.items()}
    return {"kind": kind, "seconds_per_token": per_token, "growth": growth}


def measure(kind: str, args: argparse.Namespace, given: list[str]) -> dict[str, Any]:
    """One row: this kind, its torch form where it runs on another, attention, and its peer."""
    import torch

    from kizzasi.models.mixer import Mixer

    model, device = ours(kind, "auto", args), torch.device(args.device)
    mixers = [m for m in model.modules() if isinstance(m, Mixer)]
    engines = {op.resolve("auto", device) for m in mixers for op in m.ops} or {"torch"}
    names = {kind: kind, "attention": "attention"}
    peer = PEERS.get(kind)
    if not args.equal_params:
        if engines != {"torch"} and not args.no_torch:
            names["torch"] = f"{kind}@torch"
        if peer and not args.no_peers and importlib.util.find_spec(peer.partition("-")[0]):
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


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown, the first two of which are the head."""

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
    return lines


def flat_table(rows: list[dict[str, Any]]) -> list[str]:
    """The same of `flat`: microseconds per token, and times those of the first length."""
    lengths = [*rows[0]["growth"]]
    head = " | ".join([f"us at {lengths[0]:,}", *(f"times it at {t:,}" for t in lengths[1:])])
    lines = [f"| kind | {head} |", "|---|" + "---:|" * len(lengths)]
    for r in rows:
        cells = [f"{1e6 * r['seconds_per_token'][lengths[0]]:.1f}"]
        cells += [f"{r['growth'][t]:.2f}" for t in lengths[1:]]
        lines.append(f"| {r['kind']} | {' | '.join(cells)} |")
    return lines


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="d_model (default 256)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--equal-params", action="store_true", help="as many as attention has")
    parser.add_argument("--flat", type=int, nargs="+", metavar="LENGTH", help="time per token")
    parser.add_argument("--repeats", type=int, default=5, help="steps whose median counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--wall", action="store_true", help="time by the clock on the wall")
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-torch", action="store_true", help="not beside its torch form")
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
        rows.append(flat(kind, args) if args.flat else measure(kind, args, given))
        if not args.json:
            lines = (flat_table if args.flat else table)(rows[-1:])
            print("\n".join(lines if len(rows) == 1 else lines[2:]), flush=True)
    if args.json:
        print(json.dumps({"load": os.getloadavg(), "threads": args.threads, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
