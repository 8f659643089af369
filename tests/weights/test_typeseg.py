"""A trained Mamba from the package typeseg, which labels every byte of a text: 6 layers, 1.4 M
parameters, 35 kinds of text. Real weights, real text. `make test-weights`.

Its layers are those of Gu & Dao 2023 except for these, so the model is put together here:

- it reads both ways: two scans with the same weights, from left and from right, are added before
  the gate (D u is counted twice)
- its convolution sees one token before and two after ("SAME" padding), not three before
- dt = softplus(.) + 1e-4
- expand is 1, every linear map has a bias, norms are LayerNorms
"""

import importlib.util
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kizzasi.models.ops.conv import causal_conv1d, causal_conv1d_ref
from kizzasi.models.ops.selective_scan import selective_scan, selective_scan_ref

pytestmark = pytest.mark.weights
PACKAGE = importlib.util.find_spec("typeseg")
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("needs typeseg: make test-weights", allow_module_level=True)

DATA = Path(PACKAGE.origin).parent / "data"
OPS = {
    "fast": (causal_conv1d, selective_scan),
    "reference": (causal_conv1d_ref, selective_scan_ref),
}
LABELS = json.loads((DATA / "manifest.json").read_text())["labels"]
README = """# Tidewatch 🌊

Tidewatch reads the gauges of a harbour and says when a boat may leave. It keeps no data of its
own: every reading comes from the *national service*, and is forgotten after a day.

- works offline, with the last table it has seen
- one file of settings, see [settings](docs/settings.md)

## Installation

```bash
sudo apt-get update && sudo apt-get install -y libgeos-dev
export TIDE_HOME="$HOME/.tides"
for port in brest cuxhaven; do tidewatch fetch "$port" || exit 1; done
```

## Settings

```json
{"port": "brest", "draught": 1.8, "warn": ["mail", "horn"], "table": {"days": 14}}
```
"""


def middle(name):
    """1000 bytes of a file of the standard library."""
    text = (Path(sysconfig.get_path("stdlib")) / name).read_bytes()
    return text[len(text) // 2 :][:1000]


def encode(text):
    """(1, t) tokens: ASCII is itself, and all other bytes are 128."""
    return torch.tensor([[min(byte, 128) for byte in text]])


TEXTS = {
    **{name: middle(name) for name in ("argparse.py", "heapq.py", "turtle.py")},
    "topics.py": middle("pydoc_data/topics.py"),
    "README": README.encode(),
}


@pytest.fixture(scope="module")
def published():
    """The package's own graph, from (1, t) tokens to (1, t, 35) logits."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="it runs the package's graph")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = onnxruntime.InferenceSession(
        DATA / "mamba_al.onnx", options, providers=["CPUExecutionProvider"]
    )
    return lambda ids: torch.from_numpy(graph.run(None, {"ids": ids[0].numpy()})[0])[None]


def logits(ids, conv, scan):
    """(1, t) tokens to (1, t, 35)."""
    with np.load(DATA / "mamba_al.npz", allow_pickle=False) as file:
        weights = {name: torch.from_numpy(file[name]) for name in file.files}

    def linear(x, name):
        return F.linear(x, weights[f"{name}__kernel"].T, weights[f"{name}__bias"])

    def norm(x, name):
        return F.layer_norm(x, (256,), weights[f"{name}__scale"], weights[f"{name}__bias"], 1e-6)

    x = F.embedding(ids, weights["Embed_0__embedding"])
    for i in range(6):
        layer = f"CheckpointMambaBlock1D_{i}_"
        u, z = linear(norm(x, f"{layer}_LayerNorm_0"), f"{layer}_Dense_0").chunk(2, -1)
        taps, bias = weights[f"{layer}_Conv_0__kernel"][:, 0].T, weights[f"{layer}_Conv_0__bias"]
        u = conv(F.pad(u, (0, 0, 0, 2)), taps, bias, silu=True)[0][:, 2:]
        dt, B, C = linear(u, f"{layer}_Dense_1").split([16, 16, 16], -1)
        dt = F.softplus(linear(dt, f"{layer}_Dense_2")) + 1e-4
        A, D = -weights[f"{layer}_A_log"].exp(), weights[f"{layer}_D"]
        y, _ = scan(u, dt, A, B, C, D)
        back, _ = scan(u.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), D)
        x = x + linear((y + back.flip(1)) * F.silu(z), f"{layer}_Dense_3")
    return linear(norm(x, "LayerNorm_0"), "Dense_0")


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", TEXTS)
def test_logits_equal_the_published_graph(name, ops, published):
    ids = encode(TEXTS[name])
    given, wanted = logits(ids, *OPS[ops]), published(ids)
    assert (given - wanted).abs().max() < 3e-5  # 8e-6 was found; logits reach 9
    assert (given.argmax(-1) == wanted.argmax(-1)).all()


def test_kinds_of_text_are_told_apart():
    """Every line of prose, shell and JSON, by the label of most of its bytes."""
    text = TEXTS["README"]
    labels = logits(encode(text), *OPS["fast"])[0].argmax(-1)
    lines = labels.split([len(line) for line in text.splitlines(keepends=True)])
    given = [LABELS[line.mode().values] for line in lines]
    assert given == ["markdown"] * 11 + ["shell"] * 3 + ["markdown"] * 5 + ["json", "markdown"]
