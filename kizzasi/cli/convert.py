"""Rewrite a checkpoint in another format: ours, one that transformers reads, or GGUF.

The input's format is found out. What the other format cannot express is an error, not a loss. The
tokenizer, special ids, the longest document and settings of generation go along.

example:
  kizzasi convert downloads/smollm2 runs/smollm2
  kizzasi convert runs/smollm2 exports/smollm2 --to llama
  kizzasi convert runs/smollm2 exports/smollm2.gguf --to gguf --type Q8_0
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kizzasi.cli.common import check_device, checkpoint_of
from kizzasi.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="a checkpoint folder, or a single file of weights")
    parser.add_argument("output", help="the folder to write, or a file that ends in .gguf")
    parser.add_argument(
        "--to",
        "--format",
        dest="format",
        default="kizzasi",
        help="kizzasi (default), gguf, or of transformers: llama, qwen3, mamba2, ... "
        "(a wrong one lists all)",
    )
    parser.add_argument(
        "--type",
        default="F32",
        choices=("F32", "F16", "Q8_0"),
        help="of matrices in GGUF (default F32)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model in the output folder"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", help="of a file of weights (default 5GB)"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.models.checkpoints import companions_of, load, save

    check_device(args.device)
    if Path(args.input).resolve() == Path(args.output).resolve():
        raise CheckpointError(f"{args.output}: would replace the input; give another folder")
    source = checkpoint_of(args.input)
    model = load(source, device=args.device)
    save(
        model,
        args.output,
        args.format,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        like=source,
        gguf_type=args.type,
    )
    spec, params = model.spec, model.n_params
    result = {
        "output": args.output,
        "format": args.format,
        "params": params,
        "dtype": str(next(model.stem.parameters()).dtype).removeprefix("torch."),
        "digest": spec.digest,
        "tokenizer": sorted(companions_of(Path(source)).files),
    }
    layers = f"{len(spec.blocks)} layers, {params:,} parameters, {result['dtype']}"
    return result, f"{args.output}: {args.format}, {layers}"
