"""Pipelines: what is read, refused, repaired, scaled and printed."""

# pyright: reportAttributeAccessIssue=false

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
import yaml

from kizzasi.cli import main
from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, presets
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.channels import MLPSpec, MoESpec, SwiGLUSpec
from kizzasi.models.mixers import (
    AttentionSpec,
    MambaSpec,
    MLASpec,
    ParallelSpec,
    RetentionSpec,
    RoutedSpec,
    RWKV7Spec,
)
from kizzasi.nas.pipelines import (
    Pipeline,
    document,
    examined,
    json_schema,
    parts,
    repaired,
    scaled,
    to_pipeline,
)
from kizzasi.nas.pipelines.misfits import DROP, changed, found_at
from kizzasi.nas.pipelines.observing import _loads

SMALL = {
    "arch": {
        "d_model": 16,
        "n_layers": 2,
        "norm": "RMSNorm",
        "mix_unit": {"kind": "single", "mixer": {"kind": "Attention", "heads": 4, "groups": 2}},
        "ffn": {"kind": "dense", "mult": 2.0, "act": "swiglu"},
        "pos": {"kind": "rope", "rope": {"theta": 5000, "dims": 2}},
    },
    "train": {"ctx_len": 32, "lr": 3e-3, "vocab_size": 50},
}


@pytest.mark.parametrize(("kind", "routed"), [("token", [1, 1, 1]), ("layer", [3])])
def test_tokens_pass_each_layer_or_all_of_them_by(kind, routed):
    """Around every layer a router of its own, or one around all that are routed."""
    router = {"kind": kind, "budget": 0.5, "min_layers": 1}
    data = {**SMALL, "arch": {**SMALL["arch"], "n_layers": 4, "depth_router": router}}
    first, *rest = Pipeline.from_data(data).spec.blocks
    assert first.kind == "block"
    assert [one.kind for one in rest] == ["depth_routed"] * len(routed)
    assert [len(one.body) for one in rest] == routed


def test_a_pipeline_is_a_spelling_of_a_spec():
    pipeline = Pipeline.from_data(SMALL)
    block = BlockSpec(
        AttentionSpec(n_heads=4, n_kv_heads=2, rope_theta=5000.0, rope_dims=2),
        SwiGLUSpec(hidden=32),
    )
    assert pipeline.spec == ModelSpec(16, (block,) * 2, Tokens(50))
    assert pipeline.recipe == {"lr": 3e-3, "seq_len": 32}
    again = yaml.safe_load(pipeline.to_yaml())
    assert again == SMALL
    assert Pipeline.from_data(again) == pipeline


MIXED = ModelSpec(
    32,
    (
        BlockSpec(MambaSpec(d_state=8)),
        BlockSpec(
            RoutedSpec((AttentionSpec(n_heads=2, window=8), RetentionSpec(n_heads=2)), top_k=2),
            MoESpec(n_experts=4, top_k=2, hidden=16),
        ),
        BlockSpec(MambaSpec(d_state=8)),
        BlockSpec(RWKV7Spec(head_dim=8), MLPSpec(activation="relu2"), norm="layer_unbiased"),
        BlockSpec(
            ParallelSpec((AttentionSpec(n_heads=2), MambaSpec(dt_rank=3)), combine="concat"),
            SwiGLUSpec(hidden=40, activation="gelu"),
            norm_at="both",
            residual_scale=0.5,
        ),
    ),
    Tokens(64, 128),
    norm="rms_plus_one",
    logit_cap=30.0,
)


@pytest.mark.parametrize(
    "spec",
    [
        MIXED,
        *(presets.at_size(family, 100_000, vocab_size=256) for family in presets.SMALL),
        presets.gpt2_124m(),
        presets.jamba_52b(),
        presets.qwen3_next_80b(),
    ],
    ids=lambda spec: spec.digest[:6],
)
def test_every_spec_prints_as_a_pipeline_and_back(spec):
    pipeline = to_pipeline(spec)
    assert pipeline.spec == spec
    assert Pipeline.from_data(yaml.safe_load(pipeline.to_yaml())).spec.digest == spec.digest


def test_printing_uses_the_words_where_they_reach():
    text = to_pipeline(MIXED).to_yaml()
    assert "kind: SSM, d_state: 8" in text
    assert "kind: route" in text
    assert "kind: Attention, heads: 2, groups: 2" not in text
    assert "custom" not in text


def wrong(path, value):
    return changed(SMALL, path, value)


REFUSED = [  # path, value, what is said, and what the repair leaves there; - for no repair
    ("arch.d_modle", 16, "arch.d_modle: unknown; did you mean d_model?", None),
    ("arch.pos.rope.dims", 128, "128 of the 4 entries of a head cannot be rotated", None),
    ("arch.pos.rope.dims", 3, "3 of the 4 entries of a head cannot be rotated in pairs", 2),
    ("arch.pos.kind", "alibi", "arch.pos.rope: 'alibi' rotates nothing", "alibi"),
    (
        "arch.pos.rope",
        {"scaling": {"type": "longrope", "factor": 4.0, "longrope": {"alpha": 2.0, "beta": 8.0}}},
        "give divisors, 2 numbers",
        {"scaling": {"type": "longrope", "factor": 4.0, "longrope": {"divisors": [2.0, 8.0]}}},
    ),
    (
        "arch.pos.rope.scaling",
        {"type": "linear", "factor": 2.0, "longrope": {"divisors": [2.0]}},
        "longrope: 'linear' does not read it",
        {"type": "linear", "factor": 2.0},
    ),
    (
        "arch.pos.rope.scaling",
        {"type": "longrope", "factor": 4.0},
        "a divisor for each pair of rotated entries",
        {"type": "longrope", "factor": 4.0, "longrope": {"divisors": [1.0]}},
    ),
    ("arch.mix_unit.mixer.heads", 5, "5 heads of d_model 16 have not a whole width", 4),
    ("arch.mix_unit.mixer.groups", 3, "3 groups do not divide 4 heads", 2),
    ("arch.mix_unit.mixer.d_state", 4, "d_state: Attention does not read it", None),
    ("arch.mix_unit.merge", "Add", "one mixer has nothing to merge", None),
    ("arch.mix_unit.mixer.kind", "Atention", "did you mean Attention?", "-"),
    (
        "arch.mix_unit",
        {"kind": "route", "choices": [{"kind": "SSM"}] * 2},
        "arch.mix_unit.router.topk: 'route' needs it",
        {"kind": "route", "choices": [{"kind": "SSM"}] * 2, "router": {"topk": 1}},
    ),
    (
        "arch.mix_unit.mixer.stencil",
        {"kind": "local"},
        "stencil.window: 'local' needs it",
        {"kind": "local", "window": 32},
    ),
    (
        "arch.kv_policy",
        {"cache": "none"},
        "a model steps from what its state remembers",
        {"cache": "full"},
    ),
    ("arch.n_layers", 0, "arch.n_layers: 0 is below 1; give 1", 1),
    ("arch.ffn.act", "swigle", "'swigle' is not one of", "-"),
    ("arch.ffn.experts", 4, "'dense' has no experts", None),
    ("arch.residual", {"kind": "dual"}, "leaves no norm, or says none", None),
    ("arch.model", {"blocks": []}, "arch.model.blocks: unknown", {}),
    ("train.dtype", "fp16", "train.dtype: fp16: the device decides", None),
    ("train.betas", [0.9, 0.999], "the trainer's are [0.9, 0.95]", None),
    (
        "train.budget",
        {"tokens_per_step": 40},
        "40 tokens are no whole number of windows of 32",
        {"tokens_per_step": 32},
    ),
    ("train.budget", {"flops_per_step": 1e3}, "flops forward and backward, more than", None),
    ("budget", {"params_target": 1e6}, "are not within a tenth of 1,000,000", None),
    ("budget", {"flops_target": "match:baseline"}, "names no number", {}),
]


@pytest.mark.parametrize(("path", "value", "said", "left"), REFUSED)
def test_what_does_not_fit_is_named_and_repaired(path, value, said, left):
    data = wrong(path, value)
    with pytest.raises(SpecError) as refusal:
        Pipeline.from_data(data)
    assert said in str(refusal.value)
    assert path.partition(".")[0] in str(refusal.value)
    if left == "-":
        with pytest.raises(SpecError):
            repaired(data)
        return
    fitting, changes = repaired(data)
    assert changes
    Pipeline.from_data(fitting)
    if left is not None:
        assert found_at(fitting, path) == left


def test_a_latent_cache_is_latent_attention():
    data = wrong("arch.kv_policy", {"cache": "latent", "quant": "nf4", "latent": {"dim": 6}})
    data = changed(changed(data, "arch.mix_unit.mixer.groups", DROP), "arch.pos.rope.dims", DROP)
    mixer = Pipeline.from_data(data).spec.blocks[0].mixer
    heads = {"qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 4}
    assert mixer == MLASpec(4, 6, **heads, rope_theta=5000.0, kv_quant="nf4")
    for path, value, said in (
        ("arch.kv_policy.latent", DROP, "latent.dim: 'latent' needs it; give 8"),
        ("arch.kv_policy.latent.heads", 4, "4 parts of 6 numbers are not read by equally many"),
        ("arch.kv_policy.latent.update", {"kind": "ema"}, "tau: 'ema' needs it; give 0.9"),
        ("arch.kv_policy.latent.update", {"kind": "ema", "tau": 1.0}, "1.0 of 'ema' is outside"),
        ("arch.kv_policy.latent.update", {"kind": "linear", "freq": 4}, "a latent of every token"),
        ("arch.kv_policy.latent.update", {"kind": "linear", "tau": 0.5}, "'linear' fades nothing"),
        ("arch.kv_policy.window", 8, "a cache 'latent' does not read it"),
        ("arch.mix_unit.mixer.groups", 2, "every head makes keys and values of its own"),
        ("arch.pos.rope.dims", 4, "4 of the 4 entries of a head, of which a latent makes some"),
    ):
        broken = changed(data, path, value)
        assert any(said in str(misfit) for misfit in examined(broken)[1]), said
        assert Pipeline.from_data(repaired(broken)[0]).spec.blocks[0].mixer.kind == "mla"
    for name, value in (
        ("stencil", {"kind": "local", "window": 8}),
        ("softmax", {"softcap": 5.0}),
        ("value_glu", True),
    ):
        broken = changed(data, f"arch.mix_unit.mixer.{name}", value)
        assert "arch.kv_policy.cache: attention that makes keys" in str(examined(broken)[1][0])
        assert Pipeline.from_data(repaired(broken)[0]).spec.blocks[0].mixer.kind == "attention"


def test_a_latent_cache_fades_keeps_one_of_some_tokens_and_has_parts():
    update = {"kind": "ema", "tau": 0.5, "freq": 4}
    policy = {"cache": "latent", "latent": {"dim": 6, "heads": 2, "update": update}}
    data = changed(wrong("arch.kv_policy", policy), "arch.mix_unit.mixer.groups", DROP)
    rope = {"theta": 5000.0, "scaling": {"type": "linear", "factor": 2.0}}
    spec = Pipeline.from_data(changed(data, "arch.pos.rope", rope)).spec
    mixer = spec.blocks[0].mixer
    heads = {"qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 4}
    fades = {"n_latents": 2, "every": 4, "fade": 0.5}
    linear = RopeScaling("linear", 2.0)
    assert mixer == MLASpec(4, 6, **heads, **fades, rope_theta=5000.0, rope_scaling=linear)
    printed = to_pipeline(spec)
    assert printed.spec == spec
    assert yaml.safe_load(printed.to_yaml())["arch"]["kv_policy"] == policy


def test_a_cache_bounds_the_mixer_that_sees_more():
    """A window that one mixer does not fill is read by another, and then no misfit."""
    near = {"kind": "Attention", "heads": 4, "stencil": {"kind": "local", "window": 8}}
    unit = {"kind": "par", "merge": "Add", "choices": [near, {"kind": "Attention", "heads": 4}]}
    data = changed(SMALL, "arch.mix_unit", unit)
    data = changed(data, "arch.kv_policy", {"cache": "window", "window": 16})
    mixers = Pipeline.from_data(data).spec.blocks[0].mixer.mixers
    assert [mixer.window for mixer in mixers] == [8, 16]
    alone = changed(data, "arch.mix_unit.choices", [near, near])
    misfit = examined(alone)[1][0]
    assert "16 positions are kept, of which arch.mix_unit.choices[0] sees 8" in str(misfit)


def test_every_form_of_retention_is_one_model():
    unit = {"kind": "single", "mixer": {"kind": "Retention", "heads": 4}}
    plain = changed(SMALL, "arch", {**SMALL["arch"], "mix_unit": unit, "pos": {"kind": "rope"}})
    spec = Pipeline.from_data(plain).spec
    for name, value in (("chunk", 1024), ("mode", "parallel"), ("mode", "recurrent")):
        read = Pipeline.from_data(changed(plain, f"arch.mix_unit.mixer.{name}", value))
        assert read.spec == spec
        assert f"{name}: {value}" in read.to_yaml()


def test_a_loop_of_evoforge_says_what_training_and_evaluation_run():
    schedule = {"kind": "poisson_lognormal", "mean": 2.0, "min": 1, "max": 4}
    schedule |= {"curriculum": "linear", "warmup_steps": 500}
    loops = {"train": 2, "eval": 3, "schedule": schedule}
    looped = {"prelude": 1, "body": 1, "coda": 0, "adapter": "residual", "loops": loops}
    data = wrong("arch.recurrence", looped)
    loop = Pipeline.from_data(data).spec.blocks[1]
    assert (loop.n_loops, loop.n_train, loop.min_loops, loop.max_loops) == (3, 2, 1, 4)
    assert (loop.curriculum, loop.warmup_steps) == ("linear", 500)
    where = "arch.recurrence.loops.schedule"
    for name, value, said, left in (
        ("mean", 4.0, "4, but loops.train is 2", 2.0),
        ("min", 5, "5 is more than max 4", 4),
        ("curriculum", "none", "no curriculum grows over it", "none"),
        ("warmup_steps", 0, "'linear' needs it", 100),
    ):
        broken = changed(data, f"{where}.{name}", value)
        assert any(said in str(misfit) for misfit in examined(broken)[1]), said
        fitting, _ = repaired(broken)
        assert found_at(fitting, f"{where}.{name}") == left
    single = changed(data, "arch.recurrence.loops.train", 1)
    assert [str(m).partition(":")[0].rpartition(".")[2] for m in examined(single)[1]] == [
        "mean",
        "curriculum",
        "warmup_steps",
    ]
    drawn = changed(changed(data, "arch.recurrence.loops.train", DROP), f"{where}.mean", 2.5)
    assert "a whole number" in str(examined(drawn)[1][0])
    assert Pipeline.from_data(repaired(drawn)[0]).spec.blocks[1].n_train == 2


@pytest.mark.parametrize("own", ["xpos", "none"])
def test_a_mixers_own_positions_do_without_the_rope_of_the_rest(own):
    choices = [{"kind": "Attention", "heads": 4}, {"kind": "Attention", "heads": 4, "pos": own}]
    unit = {"kind": "route", "choices": choices, "router": {"topk": 1}}
    rotated, other = Pipeline.from_data(wrong("arch.mix_unit", unit)).spec.blocks[0].mixer.experts
    assert rotated == AttentionSpec(n_heads=4, rope_theta=5000.0, rope_dims=2)
    assert other == AttentionSpec(n_heads=4, position=own)


def test_the_load_of_a_router_has_a_share_for_each_of_its_mixers():
    mixers = RoutedSpec(tuple(RetentionSpec(n_heads=n) for n in (1, 2, 4)), top_k=1)
    model = build_model(ModelSpec(16, (BlockSpec(mixers),), Tokens(50)))
    said = []
    gate = model.get_submodule("blocks.0.mixer.gate")
    with _loads(model) as loads:
        gate.register_forward_hook(lambda gate, given, logits: said.append(logits))
        for seed in range(2):
            model(torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed)))
    likeliest = torch.cat(said).argmax(-1).flatten()
    shares = [(likeliest == i).double().mean().item() for i in range(3)]
    assert loads == {"blocks.0.mixer.gate": pytest.approx(shares)}


BOUNDS = """
    Arch: d_model >= 1, n_layers >= 1
    Budget: params_target > 0
    DepthRouter: budget <= 1 > 0, tau > 0, min_layers >= 0, balance > 0
    FFN: mult > 0, experts >= 1, topk >= 1, capacity > 0
    KVPolicy: window >= 1, group >= 2
    Kernel: features >= 1, redraw >= 0
    LatentCache: dim >= 1, heads >= 1
    Level: downsample <= 1 > 0, chunk > 1, balance > 0
    LoopSchedule: mean > 0, sigma >= 0, min >= 1, max >= 1, warmup_steps >= 0, backprop >= 1
    Loops: train >= 1, eval >= 1, tolerance >= 0
    Mixer: heads >= 1, groups >= 1, head_dim >= 1, chunk >= 1, d_state >= 1, expand > 0, \
kernel_len >= 1
    Module: d_model >= 1, n_layers >= 1, output_dim >= 1
    ModuleBudget: tokens_per_step >= 1, flops_per_token >= 0, latency_ms >= 0
    Op: r >= 1
    Params: vocab_size >= 1, latent_dim >= 1
    Projection: rank >= 1
    Recurrence: prelude >= 0, body >= 1, coda >= 0, noise_std >= 0, seed >= 0
    Reg: kappa >= 0
    Residual: scale > 0
    Rope: theta > 1, dims >= 2
    Router: topk >= 1, temp > 0, balance >= 0
    Scaling: factor >= 1, original_context >= 2
    Softmax: softcap > 0
    Source: H >= 1, segment >= 1, seed >= 0
    Stack: d_model >= 1, n_layers >= 1
    Stage: repeat >= 1
    StageBudget: tokens_multiplier > 0, compute_multiplier > 0
    Stencil: window >= 1, dilation >= 1, block >= 1, stride >= 1, globals >= 0
    Train: ctx_len >= 1, lr > 0, wd >= 0, clip > 0, vocab_size >= 1
    TrainBudget: tokens_per_step >= 1, max_steps >= 1, flops_per_step > 0
    Update: freq >= 1, tau >= 0 <= 1
"""


def test_numbers_have_the_bounds_of_their_meaning():
    signs = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">"}
    kinds = {k for module in (document, parts) for k in vars(module).values() if is_dataclass(k)}
    found = []
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        told = {
            f.name: "".join(f" {signs[k]} {v}" for k, v in f.metadata.items()) for f in fields(kind)
        }
        if bounded := ", ".join(f"{name}{bounds}" for name, bounds in told.items() if bounds):
            found.append(f"    {kind.__name__}: {bounded}")
    assert found == BOUNDS.strip("\n").splitlines()


def test_a_module_of_a_pipeline_is_a_run_of_layers():
    data = {
        "arch": {
            "d_model": 16,
            "norm": "LayerNorm",
            "pos": {"kind": "alibi"},
            "modules": {
                "tokens": {"kind": "embedding", "params": {"vocab_size": 50}},
                "low": {
                    "kind": "transformer",
                    "n_layers": 2,
                    "mix_unit": {"kind": "single", "mixer": {"kind": "SSM", "d_state": 4}},
                    "pos": {"kind": "none"},
                },
                "high": {
                    "kind": "transformer",
                    "n_layers": 1,
                    "norm": "ScaleNorm",
                    "mix_unit": {"kind": "single", "mixer": {"kind": "Attention", "heads": 2}},
                },
                "out": {"kind": "readout", "output_dim": 50},
            },
            "pipeline": [
                {"name": "tokens"},
                {"name": "low"},
                {"name": "high", "inputs": ["low"]},
                {"name": "again", "module": "low"},
                {"name": "out", "kind": "readout"},
            ],
        },
        "train": {"ctx_len": 32, "vocab_size": 50},
    }
    spec = Pipeline.from_data(data).spec
    assert [(b.mixer.kind, b.norm) for b in spec.blocks] == [
        ("mamba", "layer"),
        ("mamba", "layer"),
        ("attention", "scale"),
        ("mamba", "layer"),
        ("mamba", "layer"),
    ]
    assert spec.blocks[2].mixer.position == "alibi"
    for path, value, said in (
        ("arch.n_layers", 3, "arch.n_layers: the modules of the pipeline say it"),
        ("arch.pipeline[2].inputs", ["tokens"], "reads the stream that 'low' leaves"),
        ("arch.pipeline[1].mode", "train", "another model when decoding"),
        ("arch.modules.low.d_model", 32, "32, but the stream is 16 wide"),
        ("arch.modules.out.output_dim", 60, "60, but train.vocab_size is 50"),
        ("arch.modules.low.budget", {"flops_per_token": 10.0}, "flops, more than 10"),
        ("arch.modules.more", {"kind": "embedding"}, "no stage names it"),
    ):
        broken = changed(data, path, value)
        _, found = examined(broken)
        assert any(said in str(misfit) for misfit in found), (said, found)
        Pipeline.from_data(repaired(broken)[0])


def test_scaling_keeps_the_kinds():
    twin, changes = scaled(changed(SMALL, "arch.d_model", 160), 0.1)
    pipeline = Pipeline.from_data(twin)
    assert "arch.d_model: 16, was 160" in changes
    assert pipeline.spec.d_model == 16
    assert [b.mixer.kind for b in pipeline.spec.blocks] == ["attention"] * 2
    with pytest.raises(SpecError, match="outside"):
        scaled(SMALL, 2.0)


EVOFORGE = Path(__file__).parents[3] / "shared" / "data" / "evoforge_configs"
FILES = sorted(EVOFORGE.glob("*.yaml"))


@pytest.mark.skipif(not FILES, reason="EvoForge's own files are not here")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_evoforge_files_are_read_as_they_are(path):
    data = yaml.safe_load(path.read_text())
    _, found = examined(data)
    assert all(misfit.path and misfit.rule and misfit.changes for misfit in found)
    assert any("fp16" in str(misfit) for misfit in found)  # all of them ask for it
    fitting, changes = repaired(data)
    assert 0 < len(changes) < 30
    twin, _ = scaled(fitting, 0.06)
    model = build_model(Pipeline.from_data(twin).spec, device="meta")
    assert model.n_params < 2e6


def test_the_schema_knows_what_the_reader_reads():
    schema = json_schema()
    mixer = schema["$defs"]["Mixer"]["anyOf"][0]
    assert mixer["additionalProperties"] is False
    assert mixer["properties"]["heads"]["minimum"] == 1
    assert mixer["properties"]["kind"]["enum"][0] == "Attention"
    assert "groups" in mixer["properties"]
    assert schema["$defs"]["Document"]["required"] == ["arch", "train"]
    assert "MambaSpec" in schema["$defs"]


def test_programs(capsys, tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump(SMALL))
    bad.write_text(yaml.safe_dump(wrong("train.dtype", "fp16")).replace("0.003", "3e-3"))
    assert main(["validate", str(good)]) == 0
    assert Pipeline.from_data(SMALL).spec.digest in capsys.readouterr().out
    assert main(["validate", str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert f"{bad}: train.dtype: fp16" in error
    assert "1 of 2 fit" in error
    out = tmp_path / "fitting.yaml"
    assert main(["validate", str(bad), "--repair", str(out), "--scale", "0.5"]) == 0
    assert "train.dtype: 'fp16' left out" in capsys.readouterr().out
    assert Pipeline.from_file(out).spec.d_model == 8
    assert main(["info", str(good), "--json"]) == 0
    assert main(["schema"]) == 0
    assert "$defs" in json.loads(capsys.readouterr().out.split("\n", 1)[1])


FREE = {
    "arch": {
        "d_model": 16,
        "norm": "RMSNorm",
        "modules": {
            "encoder": {
                "kind": "transformer",
                "n_layers": 2,
                "mix_unit": {"kind": "single", "mixer": {"kind": "Attention", "heads": 2}},
            },
            "sampler": {
                "kind": "latent_sampler",
                "cond": {
                    "source": {"kind": "pool-mlp", "H": 8},
                    "reg": {"kind": "freebits", "kappa": 0.25},
                    "ops": [{"where": "pre_mixer", "op": "lora", "r": 2}],
                },
            },
            "decoder": {
                "kind": "transformer",
                "n_layers": 1,
                "mix_unit": {"kind": "single", "mixer": {"kind": "Attention", "heads": 2}},
            },
        },
        "pipeline": [
            {"name": "encoder", "mode": "train_prefill"},
            {"name": "sampler", "inputs": ["encoder"], "mode": "train_prefill"},
            {"name": "low", "module": "decoder"},
            {"name": "high", "module": "decoder", "kv_from": ["sampler"]},
        ],
    },
    "train": {"ctx_len": 32, "vocab_size": 50},
}


def test_an_encoder_and_a_latent_stand_beside_the_line():
    spec = Pipeline.from_data(FREE).spec
    assert [layer.kind for layer in spec.blocks] == ["block", "latent"]
    latent = spec.blocks[1]
    assert (latent.n_bits, latent.free_bits, latent.inject, latent.rank) == (8, 0.25, ("lora",), 2)
    assert [len(latent.encoder), len(latent.body)] == [2, 1]
    assert not latent.encoder[0].mixer.causal
    assert spec.causal
    assert to_pipeline(spec).spec == spec
    for path, value, said in (
        ("arch.pipeline[2].kv_from", ["encoder"], "would show the future"),
        ("arch.pipeline[0].mode", "all", "run where the tokens are known"),
        ("arch.modules.sampler.cond.ops[0].where", "token", "layers read the bits first"),
        ("arch.modules.sampler.params", {"latent_dim": 4}, "as wide as its bits"),
        ("arch.modules.sampler.cond.ops[0].where", "proj_kv", "made of what is added"),
        ("arch.modules.sampler.cond.source.kind", "ema", "a latent has bits of every token"),
        (
            "arch.modules.sampler.cond.source",
            {"kind": "pool-mlp", "H": 12, "form": "table"},
            "H: a table has a row for each pattern of bits; give 8",
        ),
        (
            "arch.modules.sampler.cond.ops",
            [{"where": "pre_mixer", "op": "add"}, {"where": "proj_kv", "op": "add"}],
            "'add' is there already, for keys and values too",
        ),
    ):
        broken = changed(FREE, path, value)
        assert any(said in str(misfit) for misfit in examined(broken)[1]), said
        assert Pipeline.from_data(repaired(broken)[0]).spec.blocks[1].kind == "latent"


def test_bits_turn_queries_where_there_are_some():
    ops = [{"where": "ln", "op": "film"}, {"where": "proj_q", "op": "lora", "r": 2}]
    data = changed(FREE, "arch.modules.sampler.cond.ops", ops)
    latent = Pipeline.from_data(data).spec.blocks[1]
    assert (latent.film_at, latent.lora_at) == ("norm", "q")
    mixer = "arch.modules.decoder.mix_unit.mixer"
    fitting, changes = repaired(changed(data, mixer, {"kind": "SSM"}))
    assert changes == ["arch.modules.sampler.cond.ops[1].where: 'pre_mixer', was 'proj_q'"]
    assert Pipeline.from_data(fitting).spec.blocks[1].lora_at == "stream"


def test_conditions_stand_where_evoforge_says():
    ops = [
        {"where": "ln", "op": "film", "share": "global"},
        {"where": "q", "op": "scale", "share": "per_head"},
        {"where": "proj_v", "op": "add", "share": "per_head"},
        {"where": "proj_q", "op": "lora", "r": 3},
    ]
    cond = {"source": {"kind": "segment", "segment": 8, "H": 6}, "ops": ops}
    data = wrong("arch.cond", cond)
    found, layer = [], Pipeline.from_data(data).spec.blocks[0]
    while layer.kind == "condition":
        assert (layer.source, layer.segment, layer.hidden) == ("segment", 8, 6)
        found.append((layer.at, layer.op, layer.groups, layer.rank))
        (layer,) = layer.body
    assert found[::-1] == [  # of 4 heads of queries, and 2 of values
        ("norm", "film", 1, None),
        ("q", "scale", 4, None),
        ("v", "add", 2, None),
        ("q", "lora", None, 3),
    ]
    for path, value, said in (
        ("arch.mix_unit.mixer", {"kind": "SSM"}, "ops[1].where: 'q': of this layer's mixers none"),
        ("arch.residual", {"kind": "deepnet", "scale": 1.0}, "'ln': this layer has no norms"),
        ("arch.cond.source", {"kind": "segment"}, "'segment' needs its tokens; give 64"),
        ("arch.cond.ops[0].where", "proj_kv", "and no summary"),
    ):
        broken = changed(data, path, value)
        assert any(said in str(misfit) for misfit in examined(broken)[1]), said
        assert Pipeline.from_data(repaired(broken)[0]).spec.blocks[0].kind == "condition"


def test_what_looks_at_another_stream_is_attention():
    """The paper's injection and query are refused, and repaired, where no keys could be made."""
    kv = changed(FREE, "arch.modules.sampler.cond.ops", [{"where": "proj_kv", "op": "add"}])
    kv = changed(kv, "arch.modules.sampler.cond.source.query", "learned")
    latent = Pipeline.from_data(kv).spec.blocks[1]
    assert (latent.inject, latent.query) == (("kv",), "learned")
    glu = {"kind": "Attention", "heads": 2, "value_glu": True}
    for module, said, left in (
        (
            "decoder",
            "ops[0].where: the first layer that reads the bits is no",
            (("add",), "learned"),
        ),
        ("encoder", "source.query: the first layer of the encoder is no", (("kv",), "stream")),
    ):
        broken = changed(kv, f"arch.modules.{module}.mix_unit.mixer", glu)
        assert any(said in str(misfit) for misfit in examined(broken)[1]), said
        latent = Pipeline.from_data(repaired(broken)[0]).spec.blocks[1]
        assert (latent.inject, latent.query) == left
