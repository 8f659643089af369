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


def pytest_report_header() -> str | None:
    return peers.complaint()
