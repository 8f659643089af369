"""The README's table of architectures, worked out from who sits which test.

A cell is ticked if the kind is among the parameters of the test that stands for its column. If the
README has another table, the failing test prints the one that it should have.
"""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import replace
from pathlib import Path

import test_compile
import test_exam
from cases import CHANNELS, MIXERS

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, build_model, presets
from kizzasi.models.channels import MoESpec, RWKVChannelSpec
from kizzasi.models.checkpoints import foreign
from kizzasi.models.checkpoints.names import apply, written
from kizzasi.models.mixer import ChannelSpec
from kizzasi.models.mixers import Mamba2Spec, RWKV5Spec

COLUMNS = {
    "parallel": test_exam.test_reference_equals_torch_engine,
    "chunked": test_exam.test_any_split_with_the_state_carried_equals_one_call,
    "step": test_exam.test_forward_equals_fold_of_step,
    "packed": test_exam.test_packed_equals_separate,
    "padded": test_exam.test_left_padded_equals_unpadded,
    "compile": test_compile.test_forward_and_its_gradients_compile_to_one_graph,
}


# What a small config.json of a family says, beyond what its silence means.
SIZES = {
    **{"vocab_size": 32, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64},
}
DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 6},
    "linear_value_head_dim": 6,
}
KINDS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
LATENT = {
    **{"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    **{"moe_intermediate_size": 12, "num_experts_per_tok": 2},
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SAID = {
    "cohere": {},
    "cohere2": {"sliding_window": 5},
    "deepseek_v3": {
        **{**LATENT, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
        "first_k_dense_replace": 1,
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_ssm": 32},
    "gemma2": {"head_dim": 6},
    "gemma3_text": {"head_dim": 6},
    "gpt_neox": {"rotary_pct": 1.0},
    "gpt_oss": {**EXPERTS, "head_dim": 6},
    "granite": {},
    "granitemoehybrid": {**KINDS, **EXPERTS, "mamba_n_heads": 6, "mamba_d_state": 4},
    "kimi_linear": {
        **{**LATENT, **KINDS, "linear_num_heads": 3, "linear_head_dim": 6},
        **{"num_local_experts": 4, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 4},
    "nemotron_h": {
        **{"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 6, "ssm_state_size": 4},
        **{"n_groups": 2, "n_routed_experts": 4, "moe_intermediate_size": 12},
        **{"moe_shared_expert_intermediate_size": 10, "num_experts_per_tok": 2},
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
    },
    "olmo2": {},
    "olmo_hybrid": {**DELTA, **KINDS},
    "qwen3_5_text": {**DELTA, **KINDS, "head_dim": 8},
    "recurrent_gemma": {"hidden_size": 32, "lru_width": 32},
    "xlstm": {"hidden_size": 64, "num_heads": 2},
    "zamba2": {
        **{"layers_block_type": ["mamba", "hybrid", "hybrid"], "n_mamba_heads": 4},
        **{"mamba_d_state": 4, "adapter_rank": 3},
    },
}
SILENT = {  # of which words of SIZES are none
    "gpt_neox": ("num_key_value_heads",),
    "xlstm": ("intermediate_size", "max_position_embeddings"),
}
SILENT["xlstm"] += ("num_attention_heads", "num_key_value_heads")


def kinds_in(test) -> set[str]:
    """The kinds that a test is run for."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    names = next(mark.args[1] for mark in marks if mark.args[0] == "name")
    return {name.split("-")[0] for name in names}


def papers(part) -> str:
    """What the module's docstring names first as its source."""
    text = sys.modules[type(part).__module__].__doc__ or ""
    source = text.split("Source:")[-1]
    found = re.search(r"arXiv:\d{4}\.\d{5}", " ".join(source.split()))
    return f"[{found[0][6:]}](https://arxiv.org/abs/{found[0][6:]})" if found else ""


def said(name: str) -> ModelSpec:
    """The architecture of `SAID`, as the family reads it."""
    kept = {key: value for key, value in SIZES.items() if key not in SILENT.get(name, ())}
    tensors = {str(i): (10**4, 10**4) for i in range(9)}  # so many and so large may be stored
    routers = {f"{router}.weight": (4, 24) for router in ("mlp.router", "mixer.gate")}
    data = {**kept, **SAID[name], "model_type": name}
    return foreign.read_spec(foreign.FAMILIES[name], data, tensors | routers, name)


def published() -> list[ModelSpec]:
    """One architecture of each family that a checkpoint format may hold."""
    six, llama = presets.rwkv6(64, 2, 32), presets.llama(64, 2, 4, 2, 128, 32)
    plain = llama.blocks[0]

    def like_llama(norm: object, channel: ChannelSpec, **changes: object) -> ModelSpec:
        heads = replace(plain.mixer, qk_norm=norm, **changes)
        return llama.replace(blocks=(BlockSpec(heads, channel),) * 2, norm_eps=1e-6)

    five = BlockSpec(RWKV5Spec(), RWKVChannelSpec(version=4, hidden=224), "layer")
    rotated = BlockSpec(replace(plain.mixer, rope_dims=8), plain.channel)
    bamba = (BlockSpec(Mamba2Spec(head_dim=16, d_state=16), plain.channel), rotated)
    few_experts = MoESpec(n_experts=4, hidden=48)
    qwen = presets.qwen3_next_80b()
    few = [replace(b, channel=replace(b.channel, n_experts=16)) for b in qwen.blocks[:4]]
    jamba, seven = presets.jamba_52b(), presets.rwkv7(64, 2, 32)
    return [
        *map(said, SAID),
        like_llama(False, plain.channel, qkv_bias=True),
        like_llama(True, plain.channel),
        like_llama(True, few_experts),
        like_llama("full", replace(few_experts, normalize="all")),
        llama.replace(blocks=bamba),
        six,
        six.replace(blocks=(five, five)),
        qwen.replace(blocks=tuple(few)),
        jamba.replace(blocks=jamba.blocks[:8]),
        presets.rwkv4(64, 2, 32),
        seven,
        seven.replace(embed_norm=False),
        presets.mamba(64, 2, 32),
        presets.mamba2(64, 2, 32),
        presets.falcon_mamba_7b(),
        presets.smollm2_135m(),
        presets.gpt2_124m(),
        presets.mixtral_8x7b(),
    ]


@functools.cache
def formats() -> dict[str, set[str]]:
    """Kinds of mixer and channel -> names of the foreign formats that hold them, both ways."""
    held: dict[str, set[str]] = {}
    for spec in published():
        for family in foreign.FAMILIES.values():
            try:
                held_back = _there_and_back(family, spec)
            except (SpecError, CheckpointError):
                continue  # the format cannot express it
            if held_back:
                for _, part in spec.parts():
                    held.setdefault(part.kind, set()).add(family.name)
    return held


def _there_and_back(family: foreign.Family, spec: ModelSpec) -> bool:
    """What the format says of a spec, read again, is that spec."""
    spec = family.canonical(spec)
    data = {} if family.config is None else family.config(spec)
    ours = build_model(spec, device="meta").state_dict()
    tensors = written(apply(family.layouts(spec)[0], list(ours)), ours)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return foreign.read_spec(family, data, shapes, "") == spec


def table() -> str:
    """The table in Markdown."""
    columns = {name: kinds_in(test) for name, test in COLUMNS.items()}
    held = formats()
    head = ["architecture", "paper", *columns, "foreign checkpoints"]
    lines = [head, ["---", "---", *[":-:"] * len(columns), "---"]]
    parts = {}
    for name, part in {**MIXERS, **CHANNELS}.items():
        parts.setdefault(name.split("-")[0], part)
    for kind, part in parts.items():
        ticks = ["✓" if kind in kinds else "" for kinds in columns.values()]
        lines.append([f"`{kind}`", papers(part), *ticks, ", ".join(sorted(held.get(kind, ())))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def test_every_family_holds_something():
    held = set().union(*formats().values())
    assert held == set(foreign.FAMILIES), set(foreign.FAMILIES) - held


def test_readme_shows_the_table():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    expected = table()
    assert expected in readme, f"README.md: its table of architectures must be\n\n{expected}"
