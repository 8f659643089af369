"""Presets have the published number of parameters, analytically and on the meta device."""

import pytest

from kizzasi.errors import SpecError
from kizzasi.models import build_model, presets

# As published: the Hugging Face model cards, and table 2 of the RWKV-7 paper.
PUBLISHED = {
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1_4b": 1_372_178_432,
    "mamba_2_8b": 2_768_345_600,
    "rwkv7_191m": 191_034_624,
    "rwkv7_450m": 450_767_872,
    "rwkv7_1_5b": 1_527_404_544,
    "rwkv7_2_9b": 2_947_735_040,
    "smollm2_135m": 134_515_008,
    "llama_7b": 6_738_415_616,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    spec = getattr(presets, name)()
    spec.check()
    assert spec.cost(1).params == PUBLISHED[name]
    meta = build_model(spec, device="meta")
    assert sum(p.numel() for p in meta.parameters()) == PUBLISHED[name]


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
