"""Settings of the whole suite."""

import peers
import torch
from hypothesis import settings

# Small tensors on a shared machine: a second thread costs more than it gives.
torch.set_num_threads(1)

# A test is wrong when its claim is, not when it is late.
settings.register_profile("kizzasi", deadline=None)
settings.load_profile("kizzasi")


def pytest_report_header() -> str | None:
    return peers.complaint()
