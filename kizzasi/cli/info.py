"""Show what a model is made of and what it costs, layer by layer.

example:
  kizzasi info runs/first/best --seq-len 1024
  kizzasi info downloads/model --leak           # does it see the future?
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kizzasi.cli.common import checkpoint_of, columns, is_spec_file, read_spec
from kizzasi.errors import SpecError

if TYPE_CHECKING:
    from kizzasi.models import ModelSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", help="a .yaml or .json file, or a checkpoint folder")
    parser.add_argument(
        "--seq-len", type=int, default=1024, help="tokens of flops and state (default 1024)"
    )
    parser.add_argument(
        "--leak",
        action="store_true",
        help="look for a way in which later inputs move earlier outputs",
    )
    parser.add_argument("--mermaid", action="store_true", help="draw it as a Mermaid flowchart")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.seq_len < 1:
        raise SpecError(f"--seq-len {args.seq_len}: must be at least 1")
    from kizzasi.models import BlockSpec

    spec = read_spec(args.spec)
    if args.leak:
        return _leak(args, spec)
    if args.mermaid:
        from kizzasi.nas.pipelines import sketch

        drawing = sketch(spec)
        return {"digest": spec.digest, "mermaid": drawing}, drawing
    rows = []
    for i, layer in enumerate(spec.settled()):
        plain = isinstance(layer, BlockSpec)
        for part in [part for _, part in layer.parts()] if plain else [layer]:
            rows.append((f"{i} {part.kind}", part.cost(spec.layer_context(i), args.seq_len, 1)))
    total = spec.cost(args.seq_len)
    rows.append(("total", total))
    table = [["layer", "params", "active", "flops/token", "state bytes"]]
    for name, cost in rows:
        flops = cost.flops // args.seq_len
        numbers = (cost.params, cost.active_params, flops, cost.state_bytes)
        table.append([name, *(f"{n:,}" for n in numbers)])
    result = {
        "digest": spec.digest,
        "seq_len": args.seq_len,
        "layers": [{"name": name, **cost._asdict()} for name, cost in rows[:-1]],
        "total": total._asdict(),
    }
    head = f"d_model {spec.d_model}, stem {spec.stem.to_dict()}, {spec.digest}"
    note = f"flops and state at {args.seq_len} tokens; total includes stem and norms"
    return result, f"{head}\n{columns(table)}\n{note}"


def _leak(args: argparse.Namespace, spec: ModelSpec) -> tuple[dict[str, Any], str]:
    """What the gate says of a checkpoint, or of a spec's model as it starts."""
    from kizzasi.models import build_model, load
    from kizzasi.train.leak import find_leak

    if is_spec_file(args.spec):
        model = build_model(spec, seed=args.seed, device=args.device)
    else:
        model = load(checkpoint_of(args.spec), device=args.device)
    reason = find_leak(model, args.seq_len)
    said = f"{args.spec}: {reason or 'no output depends on later inputs'}"
    return {"digest": spec.digest, "leak": reason}, said
