"""Check a model spec and say what is wrong with it.

example:
  kizzasi validate my_model.yaml
"""

from __future__ import annotations

import argparse
from typing import Any

from kizzasi.cli.common import read_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", help="a .yaml or .json file, or a checkpoint folder")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    spec = read_spec(args.spec)
    params = spec.cost(1).params
    text = f"{args.spec}: valid; {len(spec.blocks)} blocks, {params:,} parameters, {spec.digest}"
    return {"valid": True, "digest": spec.digest, "params": params}, text
