"""EvoForge's own files: what does not fit, repaired, scaled, trained, stepped, saved, exported.

python scripts/check_evoforge.py FOLDER --scale 0.1
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kizzasi.cli.common import columns
from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec, SequenceModel, build_model, load
from kizzasi.models.export import StepModule
from kizzasi.nas.pipelines import Pipeline, examined, repaired, scaled
from kizzasi.nas.pipelines import load as read
from kizzasi.testing.mixer import fold
from kizzasi.testing.tolerance import assert_close

STEPS, WINDOW, ROWS = 5, 48, 2


def trained(spec: ModelSpec) -> tuple[SequenceModel, float, float]:
    """A model after five steps on one batch of random tokens, with the first and last loss."""
    model = build_model(spec, seed=0)
    vocab_size = spec.stem.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    tokens = torch.randint(vocab_size, (ROWS, WINDOW), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses[0], losses[-1]


def exported(model: SequenceModel, token: Tensor) -> str:
    """Whether torch.export makes a step of the model that gives what the model gives."""
    step = StepModule(model, len(token))
    try:
        program = torch.export.export(step, (token, *step.flat()), strict=False)
    except (SpecError, RuntimeError, ValueError) as error:
        return f"no: {' '.join(str(error).split()):.40}"
    apart = (program.module()(token, *step.flat())[0] - step(token, *step.flat())[0]).abs().max()
    return "yes" if apart < 1e-5 else f"apart by {apart:.1g}"


@torch.no_grad()
def stepped(model: SequenceModel, tokens: Tensor) -> str:
    twin = model.double()
    assert_close(fold(twin, tokens)[0], twin(tokens).logits)
    return "equal"


@torch.no_grad()
def saved(model: SequenceModel, tokens: Tensor) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = load(folder)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    return "equal"


def row(path: Path, scale: float) -> list[str]:
    data: Any = read(path)
    _, misfits = examined(data)
    fitting, changes = repaired(data)
    whole = Pipeline.from_data(fitting).spec
    twin = Pipeline.from_data(scaled(fitting, scale)[0]).spec
    model, first, last = trained(twin)
    tokens = torch.arange(20)[None] % twin.stem.vocab_size  # pyright: ignore
    kept, out = saved(model, tokens), exported(model, tokens[:, 0])
    sizes = [f"{spec.cost(1).params:,}" for spec in (whole, twin)]
    losses = f"{first:.2f} -> {last:.2f}"
    numbers = [str(len(misfits)), str(len(changes)), *sizes, losses]
    return [path.stem, *numbers, stepped(model, tokens), kept, out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=0.1)
    args = parser.parse_args()
    head = [
        "file",
        "misfits",
        "changes",
        "params",
        "at scale",
        "5 steps",
        "step",
        "saved",
        "export",
    ]
    rows = [row(path, args.scale) for path in sorted(args.folder.glob("*.yaml"))]
    print(columns([head, *rows]))


if __name__ == "__main__":
    main()
