"""Where a run's results come from: places, device and versions, for the journal."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from kizzasi.nas.executors import Executor
from kizzasi.nas.searchers import TPE
from kizzasi.nas.study.identity import versions


def session_of(executor: Executor, searcher: Any = None) -> dict[str, Any]:
    """Facts of this machine that results may depend on, and the number of places."""
    cuda = executor.device.startswith("cuda")
    name = torch.cuda.get_device_name(torch.device(executor.device)) if cuda else None
    gpu = {"gpu": name} if name else {}
    used = {"optuna": version("optuna")} if isinstance(searcher, TPE) else {}
    return {"places": executor.places, "device": executor.device, **gpu, **versions(), **used}
