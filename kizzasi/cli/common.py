"""What several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kizzasi.errors import SpecError

if TYPE_CHECKING:
    from kizzasi.models import ModelSpec


def check_device(name: str) -> None:
    """Raises SpecError when the device is not there."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"--device {name}: not usable here ({reason}); use cpu") from error


def read_spec(source: str) -> ModelSpec:
    """The spec in a .yaml or .json file, or of a checkpoint folder or file."""
    from kizzasi.models import ModelSpec
    from kizzasi.models.checkpoints import spec_of

    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".json"):
        return spec_of(path)
    spec = ModelSpec.from_file(path)
    spec.check()
    return spec


def columns(rows: list[list[str]]) -> str:
    """Align rows of cells; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
