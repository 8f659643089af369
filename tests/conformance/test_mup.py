"""muP: with the rates that it gives, no activation grows or vanishes as models widen."""

import math

import pytest
import torch

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, parameter_groups
from kizzasi.models.channels import MLPSpec, MoESpec, SwiGLUSpec
from kizzasi.models.mixer import ChannelSpec, MixerSpec
from kizzasi.models.mixers import AttentionSpec
from kizzasi.models.mup import mup_groups, mup_spec
from kizzasi.train.muon import Muon

WIDTHS = (32, 64, 128)
VOCAB = 29


def mixer(kind: str, d: int) -> MixerSpec:
    """A mixer at width d, its heads as wide at every width."""
    heads = {"n_heads": d // 8}
    settings = {
        "attention": heads,
        "delta_product": heads,
        "forgetting": heads,
        "gated_delta": heads,
        "gla": {**heads, "gate_rank": 4},
        "kda": heads,
        "kernel_attention": heads,
        "lightning": heads,
        "long_conv": {"max_len": 16, "n_bands": 3},
        "mamba": {"d_state": 4},
        "mamba2": {"d_state": 4, "head_dim": 8},
        "mamba3": {"d_state": 4, "head_dim": 8},
        "mla": {
            **heads,
            "kv_lora_rank": d // 2,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        "mlstm": heads,
        "retention": heads,
        "rg_lru": heads,
        "rwkv5": {"head_dim": 8},
        "rwkv6": {"head_dim": 8, "mix_rank": 4, "decay_rank": 4},
        "rwkv7": {"head_dim": 8, "decay_rank": 4, "a_rank": 4, "v_rank": 4, "gate_rank": 8},
        "s4": {"d_state": 4},
        "s4d": {"d_state": 4},
        "s5": {"d_state": 8, "n_blocks": 1},
        "slstm": heads,
    }
    return MixerSpec.from_dict({"kind": kind, **settings.get(kind, {})})


def model_spec(part: str, d: int) -> ModelSpec:
    plain = AttentionSpec(n_heads=d // 8)
    blocks = {
        "mlp": BlockSpec(plain, MLPSpec(hidden=2 * d)),
        "swiglu": BlockSpec(plain, SwiGLUSpec(hidden=2 * d)),
        "moe": BlockSpec(plain, MoESpec(n_experts=4, top_k=4, hidden=d)),
        "rwkv_channel": BlockSpec(plain, ChannelSpec.from_dict({"kind": "rwkv_channel"})),
    }
    block = blocks.get(part) or BlockSpec(mixer(part, d))
    return ModelSpec(d, (block, block), Tokens(VOCAB))


def sizes(part: str, optimizer: str, wise: bool, steps: int = 3) -> dict[str, list[float]]:
    """Mean size of every layer's outputs and of the logits after some steps, width by width."""
    base, ids = model_spec(part, WIDTHS[0]), torch.arange(48).view(3, 16) * 7 % VOCAB
    found: dict[str, list[float]] = {}
    for d in WIDTHS:
        spec = mup_spec(model_spec(part, d), base) if wise else model_spec(part, d)
        model = build_model(spec, seed=1)
        rates = {"lr": 0.01, "optimizer": optimizer}
        groups = mup_groups(model, base, **rates) if wise else parameter_groups(model, **rates)
        stepper = (Muon if optimizer == "muon" else torch.optim.AdamW)(groups)
        for _ in range(steps):
            loss = model(ids).loss(ids.roll(-1, 1))
            stepper.zero_grad()
            loss.backward()
            stepper.step()
        with torch.no_grad():
            before, after = model.hidden(ids, layer=0), model.hidden(ids, layer=2)
            seen = {"branches": after - before, "logits": model(ids).logits}
        for name, value in seen.items():
            found.setdefault(name, []).append(value.abs().mean().item())
    return found


def slope(values: list[float]) -> float:
    """Of log2 size over log2 width, by least squares."""
    x = [math.log2(d) for d in WIDTHS]
    y = [math.log2(v) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )


PARTS = sorted(
    (set(MixerSpec.known()) | {"mlp", "swiglu", "moe", "rwkv_channel"})
    - {"parallel", "routed", "sequence_routed", "bidirectional"}  # of whole mixers, and a router
)


@pytest.mark.parametrize("part", PARTS)
def test_nothing_grows_or_vanishes_with_the_width(part):
    found = sizes(part, "adamw", True)
    assert abs(slope(found["branches"])) <= 0.3, found
    # What is left of the initial logits falls with the root of the width.
    assert -0.5 <= slope(found["logits"]) <= 0.3, found


@pytest.mark.parametrize("part", ["attention", "mamba", "rwkv4", "swiglu"])
def test_equal_rates_for_all_widths_grow(part):
    found = sizes(part, "adamw", False)
    assert slope(found["branches"]) > 0.6, found
    assert slope(found["logits"]) > 0.5, found


@pytest.mark.parametrize("part", ["attention", "mamba", "moe"])
def test_under_muon_too(part):
    found = sizes(part, "muon", True)
    assert abs(slope(found["branches"])) <= 0.3, found
    assert slope(found["logits"]) <= 0.3, found
    assert slope(sizes(part, "muon", False)["logits"]) > 0.4


def test_rates_follow_the_table():
    base, wide = model_spec("rwkv7", 32), model_spec("rwkv7", 128)
    model = build_model(mup_spec(wide, base), device="meta")
    for optimizer, matrix in (("adamw", 0.1 / 4), ("muon", 0.1 / 2)):
        groups = mup_groups(model, base, 0.1, 0.01, optimizer=optimizer)
        rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        assert len(rates) == len(list(model.parameters()))
        mixer = model.blocks[0].mixer
        assert rates[id(mixer.key.weight)] == pytest.approx((matrix, 0.01 * 0.1 / matrix))
        assert rates[id(mixer.w2)][0] == pytest.approx(0.1)  # from a rank that stays
        assert rates[id(mixer.x_r)][0] == 0.1
        assert rates[id(model.stem.embedding.weight)][0] == 0.1
        assert rates[id(model.stem.lm_head.weight)][0] == 0.1


def test_what_does_not_fit_is_refused():
    base, wide = model_spec("mamba", 32), model_spec("mamba", 64)
    with pytest.raises(SpecError, match=r"logit_scale.*mup_spec"):
        mup_groups(build_model(wide, device="meta"), base, 0.1)
    other = build_model(mup_spec(model_spec("gla", 64), base), device="meta")
    with pytest.raises(SpecError, match="one model only"):
        mup_groups(other, base, 0.1)
