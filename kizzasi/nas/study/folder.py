"""The folder of a run: made, held by one writer, and nothing in it touched that is not the run's.

journal.jsonl    the run's memory; see journal.py
trials           checkpoints, each under the id of its training
best             the best model
config.yaml      of a search made of names: its settings, for --config
report.md, .html
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kizzasi.errors import KizzasiError, StudyError
from kizzasi.files import clear_partial
from kizzasi.models import ModelSpec
from kizzasi.models.checkpoints import spec_of
from kizzasi.nas.results.events import checked
from kizzasi.nas.study.journal import Journal, read_events, read_run

JOURNAL, TRIALS, BEST, CONFIG = "journal.jsonl", "trials", "best", "config.yaml"
WRITTEN = (TRIALS, BEST, CONFIG, "report.md", "report.html")


@contextmanager
def claimed(folder: Path, *, resume: bool) -> Iterator[Journal]:
    """Hold a folder for a run and open its journal. A run that is refused leaves nothing behind.

    Args:
        folder: made when missing.
        resume: go on with the run that it holds, if there is one. A journal without a trial is of a
            run that was refused or stopped at once, and is in nobody's way.

    Raises:
        StudyError: it holds a run already (without resume), something of another program where a
            run would write, or a link there.
    """
    path = folder / JOURNAL
    for name in (TRIALS, BEST):
        if (folder / name).is_symlink():
            raise StudyError(
                f"{folder / name}: a link, and a run keeps to its own folder; remove the link or "
                "choose another folder"
            )
    begun = path.exists()
    if not begun:
        _require_free(folder)
    elif not resume and any(event["event"] == "trial" for event in read_run(path)):
        raise StudyError(f"{folder}: holds a run already; use --resume or another name")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with Journal(path) as journal:
            for _ in checked((event for _, event in journal.scan()), path):
                pass
            for place in (folder, folder / TRIALS):
                clear_partial(place)
            try:
                yield journal
            except KizzasiError:
                if not begun and not any(e["event"] == "trial" for e in read_events(path)):
                    path.unlink()
                    (folder / CONFIG).unlink(missing_ok=True)  # there was none, or see above
                raise
            clear_partial(folder / TRIALS)  # of workers that were killed on the way
    except KizzasiError:
        if not path.exists():
            _unmake(folder, made)
        raise


def _require_free(folder: Path) -> None:
    """Raises StudyError where a new run would write over what is there."""
    strange = []
    for name in WRITTEN:
        place = folder / name
        empty = place.is_dir() and not any(place.iterdir())
        if not empty and (place.exists() or place.is_symlink()):
            strange.append(name)
    if strange:
        raise StudyError(
            f"{folder}: holds {', '.join(strange)}, not of a run, since there is no {JOURNAL}; a "
            "search would write there: move that away or choose another folder"
        )


def _unmake(folder: Path, made: list[Path]) -> None:
    """Remove the folders that were made for nothing; those that hold something stay."""
    with suppress(OSError):
        if made:
            (folder / TRIALS).rmdir()
    for place in made:
        with suppress(OSError):
            place.rmdir()


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by its path there; {} if it is not there."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while piece := file.read(2**20):
                    digest.update(piece)
            found[str(path.relative_to(folder))] = digest.hexdigest()
    return found


def spec_in(folder: Path) -> ModelSpec | None:
    """The architecture of the model in a folder; None if there is none that can be read."""
    try:
        return spec_of(folder)
    except KizzasiError:
        return None
