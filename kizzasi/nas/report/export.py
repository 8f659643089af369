"""The winner out: a folder that another program, or another person, can use without the run.

config.json, model.safetensors    what `kizzasi.models.load` reads
spec.yaml, spec.json              the architecture alone, to train anew
README.md                         a model card; see `kizzasi.nas.report.model_card`
lineage.json                      every candidate, its parents and scores
generate.py                       loads the model and continues a text
"""

from __future__ import annotations

import os
from pathlib import Path

from kizzasi.errors import StudyError
from kizzasi.models import load
from kizzasi.nas.report.model_card import model_card
from kizzasi.nas.results.lineage import lineage, to_json
from kizzasi.nas.results.summary import summarise
from kizzasi.nas.study.journal import read_events

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


def export(run: Path, out: Path) -> Path:
    """Write a finished search's winner into a folder of its own.

    Args:
        run: folder of the search.
        out: created when missing; files of an earlier export are replaced.

    Returns:
        out.

    Raises:
        StudyError: the search has no winner yet, `out` is the run itself or its checkpoint, or the
            saved weights are another architecture's.
        CheckpointError: the saved weights are damaged, or `out` cannot be written.
    """
    summary = summarise(read_events(run / "journal.jsonl"))
    best = summary.saved or summary.winner
    if not summary.finished or best is None:
        raise StudyError(f"{run}: has no winner yet; finish the search with --resume, then export")
    if out.resolve() in (run.resolve(), (run / "best").resolve()):
        raise StudyError(f"{out}: holds the run's own files; export into another folder")
    model = load(run / "best")
    if model.spec.to_dict() != best.entry["spec"]:
        raise StudyError(
            f"{run / 'best'}: not the architecture that the journal calls the best, "
            f"{best.entry['name']}; delete the folder's copy or restore the original"
        )
    model.save_pretrained(out, overwrite=True)
    model.spec.to_file(out / "spec.yaml")
    model.spec.to_file(out / "spec.json")
    texts = {
        "README.md": model_card(summary, model.spec),
        "lineage.json": to_json(lineage(summary).values()) + "\n",
        "generate.py": SCRIPT,
    }
    for name, text in texts.items():
        partial = out / f"{name}.partial"
        partial.write_text(text, "utf-8", errors="replace")  # names of files may be no text
        os.replace(partial, out / name)
    return out
