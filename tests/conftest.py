"""Settings of the whole suite."""

import os

import peers
import torch
from hypothesis import settings

# Triton's kernels run anywhere, in its interpreter; it looks when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors on a shared machine: a second thread costs more than it gives.
torch.set_num_threads(1)

# A test is wrong when its claim is, not when it is late.
settings.register_profile("kizzasi", deadline=None)
settings.load_profile("kizzasi")


def pytest_collection_modifyitems(config, items: list) -> None:
    """Where no CUDA device is, those that need one are deselected; skipping 3,000 takes time."""
    if not torch.cuda.is_available():
        needing = [item for item in items if item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]


def pytest_report_header() -> str | None:
    return peers.complaint()
