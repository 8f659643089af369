"""Check model specs and pipelines, and say what is wrong with them.

A pipeline is a YAML file in EvoForge's words. What does not fit is named with its place, the rule
and the remedy; --repair writes the nearest file that fits, and says what it changed.

example:
  kizzasi validate my_model.yaml
  kizzasi validate pipelines/*.yaml --repair fitting
  kizzasi validate free_transformer.yaml --repair small.yaml --scale 0.1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kizzasi.cli.common import SeveralErrors, is_pipeline_file, read_spec
from kizzasi.errors import SpecError
from kizzasi.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "specs", nargs="+", metavar="FILE", help="a .yaml or .json file, or a checkpoint folder"
    )
    parser.add_argument(
        "--repair", metavar="OUT", help="write what fits there: a file, or a folder for several"
    )
    parser.add_argument(
        "--scale", type=float, help="shrink a pipeline's widths and vocabulary to this share"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    found, errors = [], []
    for source in args.specs:
        try:
            found.append(_one(source, args))
        except SpecError as error:
            errors += str(error).split("\n") if is_pipeline_file(source) else [str(error)]
    if errors:
        if len(args.specs) > 1:
            errors.append(f"{len(found)} of {len(args.specs)} fit")
        raise SeveralErrors(errors)
    text = "\n".join(text for _, text in found)
    if len(found) == 1:
        return found[0][0], text
    return {"files": {name: one for name, (one, _) in zip(args.specs, found, strict=True)}}, text


def _one(source: str, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    changes: list[str] = []
    if args.repair is None and args.scale is None:
        spec = read_spec(source)
    else:
        spec, changes = _changed(source, args)
    params = spec.cost(1).params
    text = f"{source}: valid; {len(spec.blocks)} blocks, {params:,} parameters, {spec.digest}"
    result = {"valid": True, "digest": spec.digest, "params": params, "changes": changes}
    return result, "\n  ".join([text, *changes])


def _changed(source: str, args: argparse.Namespace) -> tuple[Any, list[str]]:
    from kizzasi.nas.pipelines import Pipeline, load, repaired, scaled, to_yaml

    if not is_pipeline_file(source):
        raise SpecError(f"{source}: --repair and --scale are for pipelines (arch: ...), not specs")
    data, changes = load(source), []
    try:
        if args.repair is not None:
            data, changes = repaired(data)
        if args.scale is not None:
            data, smaller = scaled(data, args.scale)
            changes = changes + smaller
    except SpecError as error:
        raise SpecError(
            "\n".join(f"{source}: {line}" for line in str(error).split("\n"))
        ) from error
    pipeline = Pipeline.from_data(data)
    if args.repair is not None:
        out = Path(args.repair)
        if len(args.specs) > 1:
            out.mkdir(parents=True, exist_ok=True)
            out = out / Path(source).name
        if out.resolve() == Path(source).resolve():
            raise SpecError(f"{out}: would replace the input; give another --repair OUT")
        if out.exists():
            raise SpecError(f"{out}: there already; give another --repair OUT")
        write_text(out, to_yaml(data))
        changes = [*changes, f"written to {out}"]
    return pipeline.spec, changes
