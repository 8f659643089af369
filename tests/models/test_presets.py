"""Presets have the published number of parameters, analytically and on the meta device."""

from typing import Any

import pytest
import torch

from kizzasi.errors import SpecError
from kizzasi.models import build_model, presets
from kizzasi.models.checkpoints.foreign import FAMILIES
from kizzasi.models.mixer import LayerContext

# As published: the Hugging Face model cards, table 2 of the RWKV-7 paper; for RWKV-6 its paper's
# 13 D^2 L + 464 D L + 4 D + 2 D V; GPT-2 as transformers counts it, not 117M.
PUBLISHED = {
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1_4b": 1_372_178_432,
    "mamba_2_8b": 2_768_345_600,
    "falcon_mamba_7b": 7_272_665_088,
    "mamba2_130m": 128_989_632,
    "mamba2_370m": 368_346_624,
    "mamba2_780m": 780_161_280,
    "mamba2_1_3b": 1_343_757_312,
    "mamba2_2_7b": 2_702_599_680,
    "rwkv4_169m": 169_342_464,
    "rwkv4_430m": 430_397_440,
    "rwkv4_1_5b": 1_515_106_304,
    "rwkv4_3b": 2_984_627_200,
    "rwkv4_7b": 7_392_649_216,
    "rwkv4_14b": 14_148_597_760,
    "rwkv6_1_6b": 1_599_873_024,
    "rwkv7_191m": 191_034_624,
    "rwkv7_450m": 450_767_872,
    "rwkv7_1_5b": 1_527_404_544,
    "rwkv7_2_9b": 2_947_735_040,
    "smollm2_135m": 134_515_008,
    "llama_7b": 6_738_415_616,
    "gpt2_124m": 124_439_808,
    "mixtral_8x7b": 46_702_792_704,
    "jamba_52b": 51_570_323_328,
    "qwen3_next_80b": 79_674_391_296,
}
# The model_type of transformers that has the same architecture.
PEERS = {
    "mamba_": "mamba",
    "falcon_mamba": "falcon_mamba",
    "mamba2": "mamba2",
    "rwkv4": "rwkv",
    "smollm2": "llama",
    "llama": "llama",
    "gpt2": "gpt2",
    "mixtral": "mixtral",
    "jamba": "jamba",
    "qwen3_next": "qwen3_next",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    spec = getattr(presets, name)()
    spec.check()
    assert spec.cost(1).params == PUBLISHED[name]
    if PUBLISHED[name] > 2e10:  # thousands of modules: one layer of each kind will do
        spec = spec.replace(blocks=tuple(dict.fromkeys(spec.blocks)))
    assert build_model(spec, device="meta").n_params == spec.cost(1).params


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith(tuple(PEERS))])
def test_transformers_counts_as_many(name):
    """From the config that we write; nothing is allocated."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind = next(kind for prefix, kind in PEERS.items() if name.startswith(prefix))
    family, spec = FAMILIES[kind], getattr(presets, name)()
    assert family.config is not None
    config = transformers.AutoConfig.for_model(**family.config(family.canonical(spec)))
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in peer.parameters()) == PUBLISHED[name]


def test_a_free_transformer_is_a_transformer_and_one_encoder():
    plain = presets.llama(32, 4, 2, 1, 48, 11)
    free = presets.free_transformer(plain, n_bits=3)
    latent: Any = free.blocks[-1]
    assert free.blocks[:2] == plain.blocks[:2]
    assert latent.body == plain.blocks[2:]
    layer = plain.blocks[0].cost(LayerContext(32), 1, 1).params
    more = 3 * 32 + 3 + 3 * 32 + 32 + 32  # reading bits, making keys of them, query, norm
    assert build_model(free).n_params == plain.cost(1).params + layer + more
    with pytest.raises(SpecError, match=r"plain.blocks\[1\]: .* give blocks of attention"):
        presets.free_transformer(presets.mamba(16, 2, 9))


@pytest.mark.parametrize("family", presets.SMALL)
@pytest.mark.parametrize("n_params", [60_000, 200_000, 1_000_000, 20_000_000])
def test_at_size_meets_the_budget(family, n_params):
    spec = presets.at_size(family, n_params, vocab_size=256)
    spec.check()
    assert abs(spec.cost(1).params / n_params - 1) <= 0.15
    assert 6 <= spec.d_model / len(spec.blocks) <= 128


def test_impossible_budgets_and_families_are_refused():
    with pytest.raises(SpecError, match="too few for rwkv; give at least"):
        presets.at_size("rwkv", 1000, vocab_size=256)
    with pytest.raises(SpecError, match="did you mean mamba"):
        presets.at_size("mamab", 10**6, vocab_size=256)
