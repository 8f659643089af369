"""What several verbs share."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from kizzasi.errors import DataError, SpecError

if TYPE_CHECKING:
    from kizzasi.models import ModelSpec, SequenceModel
    from kizzasi.progress import Line


CONFIG, BEST = "config.json", "best"
MOST = 2**31
SCORE_WINDOWS = 512  # held-out windows of a score, unless told otherwise
SPEC_FILES = (".yaml", ".yml", ".json")


class SeveralErrors(SpecError):
    """Faults that are told in a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


def import_own(names: Sequence[str]) -> None:
    """Import modules that register specs of the user's own; the current folder is searched first.

    Raises:
        SpecError: a module is not found, or fails when it is imported.
    """
    here = str(Path.cwd())
    if names and here not in sys.path:
        sys.path.insert(0, here)
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise SpecError(
                f"--import {name}: {reason}; give the name of a module in {here} or on PYTHONPATH"
            ) from error


def is_spec_file(source: str) -> bool:
    """Whether this names a spec in words; everything else is a checkpoint, folder or file."""
    return Path(source).suffix in SPEC_FILES and not Path(source).is_dir()


def is_pipeline_file(source: str) -> bool:
    """Whether this names a YAML file with a pipeline in it, which has a key `arch`."""
    from kizzasi.nas.pipelines import is_pipeline, load

    with suppress(SpecError):  # whoever reads it says what is wrong
        return Path(source).suffix in (".yaml", ".yml") and is_pipeline(load(source))
    return False


def checkpoint_of(source: str) -> str:
    """Where the weights are: a checkpoint itself, or best/ in a search's folder, which is said.

    Raises:
        DataError: a spec in words, which has no weights.
    """
    path = Path(source)
    if is_spec_file(source):
        raise DataError(
            f"{source}: a spec, which has no weights; train it first (kizzasi train {source} "
            "--data ... --out run), or give the folder of a trained model"
        )
    if path.is_dir() and not (path / CONFIG).exists() and (path / BEST / CONFIG).exists():
        said = f"{source}: a search; taking its best model, {path / BEST}"
        tqdm.write(said, file=sys.stderr)  # above a line of progress, if there is one
        return str(path / BEST)
    return source


def usable_device(name: str) -> str:
    """The device that a name stands for: "auto" is CUDA where there is a GPU, or else the CPU.
    Raises SpecError when it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def check_device(name: str) -> None:
    """Raises SpecError when the device is not there."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"--device {name}: not usable here ({reason}); use cpu") from error


def read_spec(source: str) -> ModelSpec:
    """The spec in a .yaml or .json file, of a pipeline, or of a checkpoint folder or file."""
    from kizzasi.models import ModelSpec
    from kizzasi.models.checkpoints import spec_of

    if not is_spec_file(source):
        return spec_of(checkpoint_of(source))
    if is_pipeline_file(source):
        from kizzasi.nas.pipelines import Pipeline

        return Pipeline.from_file(source).spec
    spec = ModelSpec.from_file(source)
    spec.check()
    return spec


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "torch", "reference", "native"),
        help="what recurrences run on (default auto: the fastest that is there; kizzasi doctor)",
    )


def check_numbers(args: argparse.Namespace, *names: str) -> None:
    """Raises SpecError unless these flags are at least 1, and --score-windows at least 0."""
    for name in (*names, "score_windows"):
        value, least = getattr(args, name, None), int(name != "score_windows")
        if value is not None and not least <= value < MOST:
            flag = f"--{name.replace('_', '-')}"
            raise SpecError(f"{flag} {value!s:.30}: must be at least {least}, and below 2^31")


@contextmanager
def scoring(line: Line, model: SequenceModel, n_windows: int, batch_size: int) -> Iterator[None]:
    """Count on a line the batches that a model scores meanwhile."""
    line.count_to(-(-n_windows // batch_size) or None, unit="batches", at_most=True)
    line.say("scoring")
    hook = model.register_forward_hook(lambda *_: line.update(1))
    try:
        yield
    finally:
        hook.remove()


def markdown(rows: list[list[str]]) -> str:
    """A table in Markdown, the first row its head; aligned as `columns` does."""
    under = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], under, *rows[1:]))


def columns(rows: list[list[str]]) -> str:
    """Align rows of cells; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
