"""The winner out: a folder that another program, or another person, can use without the run.

config.json, model.safetensors    what `kizzasi.models.load` reads
spec.yaml, spec.json              the architecture alone, to train anew
README.md                         a model card; see `kizzasi.nas.report.model_card`
lineage.json                      every candidate, its parents and scores
generate.py                       loads the model and continues a text
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from filecmp import cmp
from pathlib import Path

from kizzasi.errors import StudyError
from kizzasi.models import load
from kizzasi.models.checkpoints.native import CONFIG, save
from kizzasi.models.checkpoints.storage.files import earlier_weights
from kizzasi.nas.report.model_card import model_card
from kizzasi.nas.results.lineage import lineage, to_json
from kizzasi.nas.results.summary import summarise
from kizzasi.nas.study.folder import BEST, JOURNAL, contents
from kizzasi.nas.study.journal import Event, read_run

SCRIPT = '''\
"""Continue a text, byte by byte: python generate.py "Once upon" """

import sys
from pathlib import Path

import torch

from kizzasi.models import load

model = load(Path(__file__).parent)
prompt = sys.argv[1] if len(sys.argv) > 1 else "\\n"
ids = torch.tensor(list(prompt.encode()))
out = model.generate(ids, max_new_tokens=200, temperature=0.8, seed=0)
text = bytes(out.tolist()).decode("utf-8", errors="replace")
sys.stdout.buffer.write(text.encode() + b"\\n")
'''


def export(run: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write a finished search's winner into a folder of its own, all of it or nothing.

    Args:
        run: folder of the search.
        out: created when missing. An export of the same search may be there already.
        overwrite: replace also files that are something else.

    Returns:
        out.

    Raises:
        StudyError: the search has no winner yet, `out` is the run itself or its checkpoint or holds
            other files, or the saved weights are not those that the search saved.
        CheckpointError: the saved weights are damaged, or `out` cannot be written.
    """
    events = read_run(run / JOURNAL)
    summary = summarise(events)
    best = summary.saved or summary.winner
    if not summary.finished or best is None:
        raise StudyError(f"{run}: has no winner yet; finish the search with --resume, then export")
    if out.resolve() in (run.resolve(), (run / BEST).resolve()):
        raise StudyError(f"{out}: holds the run's own files; export into another folder")
    if out.is_symlink() and out.parent.resolve() == run.resolve():
        raise StudyError(f"{out}: a link out of the run; export into another folder with --out")
    model = load(run / BEST)
    if model.spec.to_dict() != best.entry["spec"]:
        raise StudyError(
            f"{run / BEST}: not the architecture that the journal calls the best, "
            f"{best.entry['name']}; delete the folder's copy or restore the original"
        )
    _require_saved(run / BEST, events)
    texts = {
        "README.md": model_card(summary, model.spec),
        "lineage.json": to_json(lineage(summary).values()) + "\n",
        "generate.py": SCRIPT,
        "spec.yaml": model.spec.to_text(".yaml"),
        "spec.json": model.spec.to_text(".json"),
    }
    # Names of files in these texts may be no text.
    files = {name: text.encode(errors="replace") for name, text in texts.items()}
    if not overwrite:
        _require_free(out, run / BEST, files)
    save(model, out, overwrite=True, files=files)
    return out


def _require_saved(best: Path, events: Sequence[Event]) -> None:
    """Raise StudyError if the weights are not those that the search put there."""
    told = next((e for e in reversed(events) if e["event"] == "saved"), None)
    if told is None:
        return
    there = contents(best)
    if changed := [name for name, digest in told["files"].items() if there.get(name) != digest]:
        raise StudyError(
            f"{best / changed[0]}: not as the search wrote it; move the folder away and run the "
            "search again with --resume, which makes it anew"
        )


def _require_free(out: Path, best: Path, files: Mapping[str, bytes]) -> None:
    """Raise StudyError where a file is something else than the export would write."""
    weights = [*earlier_weights(out), out / CONFIG]
    for path in [*weights, *(out / name for name in files)]:
        if not path.exists() and not path.is_symlink():
            continue
        if path.name in files:
            same = path.is_file() and path.read_bytes() == files[path.name]
        else:
            other = best / path.name
            same = path.is_file() and other.is_file() and cmp(path, other, shallow=False)
        if not same:
            raise StudyError(
                f"{path}: there already, and not of this export; use --overwrite to replace it, or "
                "another --out"
            )
