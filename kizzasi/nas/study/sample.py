"""What the best model of a search writes: one text, drawn once, the same in terminal and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kizzasi.errors import KizzasiError
from kizzasi.models import load
from kizzasi.nas.study.study import Study

PROMPT, SEED, TOKENS, TEMPERATURE = "\n", 0, 200, 0.8  # as `kizzasi generate` has them


def sample_of(folder: Path, saved: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of an event "sample": 200 bytes that a model of bytes writes after a new line.

    Args:
        folder: of the model.
        saved: the event that tells which one it is.

    Returns:
        None if it cannot write, as a model without a step.
    """
    try:
        prompt = torch.tensor(list(PROMPT.encode()))
        out = load(folder).generate(prompt, TOKENS, seed=SEED, temperature=TEMPERATURE)
    except KizzasiError:
        return None
    text = bytes(out.tolist()[len(prompt) :]).decode(errors="replace")
    own = {key: saved[key] for key in ("candidate", "seed")}
    return {**own, "prompt": PROMPT, "text": text}


def write_sample(study: Study, best: Path) -> None:
    """Let the saved model write something, once; a resumed run has it in its journal.

    Args:
        study: whose best model is saved.
        best: folder of the model.
    """
    saved = study.find("saved")
    if saved is None:  # a journal of version 0.1
        return
    own = {key: saved[key] for key in ("candidate", "seed")}
    if study.find("sample", **own) is None and (sample := sample_of(best, saved)):
        study.append({"event": "sample", **sample})
