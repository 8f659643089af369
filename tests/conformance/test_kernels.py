"""How many kernels a layer launches where launches are what costs, in the form that CUDA gets.

Counted on CPU tensors, with the rules of the ops answered as on CUDA. Views are no kernels. Figures
are a layer's with its norm; a table that is passed is a loop over tokens, or a block rule without a
device in it.
"""

import pytest
from cases import LAYERS, MIXERS, make, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from kizzasi.models.ops import devices


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


# kind or variant: forward and backward of 2048 tokens, at most. Other mixers are made of these.
MOST = {
    "attention": (130, 120),
    "attention-nf4-ring": (200, 120),
    "attention-nf4-groups": (215, 120),
    "attention-int8-groups-ring": (260, 120),
    "gated_delta": (340, 1030),
    "gla": (180, 680),
    "kda": (410, 1150),
    "long_conv": (70, 100),
    "mamba": (180, 400),
    "mamba2": (125, 370),
    "mamba3": (175, 490),
    "mamba3-mimo": (250, 860),
    "mamba3-mimo-norm": (250, 860),
    "mla": (105, 125),
    "mla-int8": (145, 125),
    "mla-summaries": (215, 185),
    "mla-coded-summaries": (200, 125),
    "retention": (200, 390),
    "rwkv4": (380, 720),
    "rwkv5": (180, 680),
    "rwkv6": (200, 710),
    "rwkv7": (450, 1250),
    "s4": (175, 300),
    "s4d": (105, 270),
    "s5": (170, 460),
}


@pytest.mark.parametrize("name", [name for name in MIXERS if name.split("-")[0] in MOST])
def test_a_layer_launches_no_more_than_its_share(name, monkeypatch):
    monkeypatch.setattr(devices, "on_cpu", lambda x: False)
    monkeypatch.setattr(devices, "on_cuda", lambda x: True)
    model, x = make(name), tokens(1, 2048)
    with Kernels() as forward:
        out = model(x)
    with Kernels() as backward:
        out.logits.sum().backward()
    counts = forward.count / LAYERS, backward.count / LAYERS
    limits = MOST.get(name, MOST[name.split("-")[0]])
    assert all(c <= most for c, most in zip(counts, limits, strict=True)), counts
