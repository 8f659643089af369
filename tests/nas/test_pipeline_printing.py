"""A pipeline has words for what a `ModelSpec` says: every field of every kind of layer is written
in them and read back, or stands here with the reason why it has none."""

from dataclasses import replace

import pytest
import yaml

from kizzasi.models import BlockSpec, LayerSpec, ModelSpec, Tokens, presets
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.channels import MLPSpec, SwiGLUSpec
from kizzasi.models.layers.aside import AsideSpec
from kizzasi.models.layers.chunked import ChunkedSpec
from kizzasi.models.layers.condition import ConditionSpec
from kizzasi.models.layers.depth_routed import DepthRoutedSpec
from kizzasi.models.layers.downsample import DownsampleSpec
from kizzasi.models.layers.latent import LatentSpec
from kizzasi.models.layers.loop import LoopSpec
from kizzasi.models.layers.shared import SharedSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec, MLASpec, ParallelSpec, RetentionSpec
from kizzasi.nas.pipelines import Pipeline, to_pipeline
from kizzasi.strict import field_types

ONE = BlockSpec(AttentionSpec(n_heads=2), SwiGLUSpec(hidden=24))
OTHER = BlockSpec(MambaSpec(d_state=4), MLPSpec(hidden=32))
SEES_ALL = replace(ONE, mixer=replace(ONE.mixer, causal=False))
LOOP = LoopSpec((ONE,), 3, adapter="residual", noise_std=0.1)
DRAWN = replace(LOOP, schedule="poisson_lognormal")
GROWS = {"curriculum": "linear", "warmup_steps": 50}
FIRST = LoopSpec((ONE,), 3, keys="first")
LATENT = LatentSpec((ONE,), (SEES_ALL,), inject=("film", "lora"), rank=2)

# kind -> (a layer, field -> layers that differ in it). Every field of every kind stands here.
SAID = {
    "block": (
        ONE,
        {
            "mixer": [OTHER, replace(ONE, mixer=RetentionSpec(n_heads=2, rope_theta=500.0))],
            "channel": [replace(ONE, channel=None), replace(ONE, channel=MLPSpec(hidden=8))],
            "norm": [replace(ONE, norm=n) for n in ("layer", "scale", "layer_unbiased")],
            "norm_at": [replace(ONE, norm_at="post"), replace(ONE, norm_at="both")],
            "parallel": [
                replace(ONE, parallel="shared"),
                replace(ONE, parallel="separate", norm_at="both"),
            ],
            "residual_scale": [
                replace(ONE, residual_scale=0.5),
                replace(ONE, residual_scale=0.5, norm_at="post"),
            ],
            "stream_scale": [replace(ONE, norm_at="post", stream_scale=1.5)],
        },
    ),
    "loop": (
        LOOP,
        {
            "body": [
                replace(LOOP, body=(ONE, ONE)),
                replace(LOOP, body=(ConditionSpec((ONE,)),)),
                LoopSpec((ONE, OTHER), 2),  # stage.repeat of layers
            ],
            "n_loops": [replace(LOOP, n_loops=2)],
            "adapter": [replace(LOOP, adapter=a) for a in ("identity", "concat_linear")],
            "schedule": [DRAWN],
            "sigma": [replace(DRAWN, sigma=0.25)],
            "max_loops": [replace(DRAWN, max_loops=5)],
            "noise_std": [replace(LOOP, noise_std=0.0)],
            "seed": [replace(LOOP, seed=3)],
            "n_backprop": [replace(LOOP, n_backprop=1), replace(DRAWN, n_backprop=2)],
            "norm": [replace(LOOP, norm="rms"), replace(LOOP, norm="rms_plus_one")],
            "keys": [FIRST],
            "tolerance": [replace(FIRST, tolerance=0.01)],
            "n_train": [replace(one, n_train=2) for one in (LOOP, DRAWN)],
            "min_loops": [replace(DRAWN, min_loops=2)],
            "curriculum": [replace(one, **GROWS) for one in (LOOP, DRAWN)],
            "warmup_steps": [replace(LOOP, curriculum="sqrt", warmup_steps=9)],
        },
    ),
    "downsample": (
        DownsampleSpec((ONE,), 2),
        {
            "body": [
                DownsampleSpec((OTHER,), 2),
                DownsampleSpec((ONE, DownsampleSpec((ONE,), 3), ONE), 2),
            ],
            "factor": [DownsampleSpec((ONE,), 49)],
            "pooling": [DownsampleSpec((ONE,), 2, pooling="linear")],
            "upsampling": [DownsampleSpec((ONE,), 2, upsampling="linear")],
        },
    ),
    "chunked": (
        ChunkedSpec((ONE,)),
        {
            "body": [ChunkedSpec((ONE, DownsampleSpec((ONE,), 2), ONE))],
            "rate": [ChunkedSpec((ONE,), rate=4.9)],
            "weight": [ChunkedSpec((ONE,), weight=0.1)],
        },
    ),
    "depth_routed": (
        DepthRoutedSpec((ONE,)),
        {
            "body": [DepthRoutedSpec((ONE, ONE)), DepthRoutedSpec((ConditionSpec((ONE,)),))],
            "capacity": [DepthRoutedSpec((ONE,), capacity=0.3)],
            "weight": [DepthRoutedSpec((ONE,), weight=0.1)],
            "temperature": [DepthRoutedSpec((ONE,), temperature=0.5)],
        },
    ),
    "condition": (
        ConditionSpec((ONE,)),
        {
            "body": [ConditionSpec((ConditionSpec((ONE,), op="add", at="out"),))],
            "op": [ConditionSpec((ONE,), op=op) for op in ("add", "scale")],
            "at": [ConditionSpec((ONE,), at=at) for at in ("out", "stream", "norm", "q", "v")],
            "source": [ConditionSpec((ONE,), source="ema")],
            "segment": [ConditionSpec((ONE,), source="segment", segment=5)],
            "hidden": [ConditionSpec((ONE,), hidden=6, at="q", groups=2)],
            "groups": [ConditionSpec((ONE,), groups=n) for n in (1, 2)],
            "rank": [ConditionSpec((ONE,), op="lora", rank=2)],
        },
    ),
    "latent": (
        LATENT,
        {
            "body": [replace(LATENT, body=(ONE, ONE)), replace(LATENT, body=(OTHER, ONE))],
            "encoder": [replace(LATENT, encoder=(SEES_ALL, SEES_ALL))],
            "n_bits": [replace(LATENT, n_bits=3)],
            "free_bits": [replace(LATENT, free_bits=x) for x in (0.0, 0.125)],
            "inject": [
                replace(LATENT, inject=inject, rank=2 if "lora" in inject else None)
                for inject in (("add",), ("kv",), ("kv", "film"), ("lora", "film"))
            ],
            "rank": [replace(LATENT, rank=5)],
            "form": [replace(LATENT, n_bits=5, form="table")],
            "seed": [replace(LATENT, seed=2)],
            "query": [replace(LATENT, query="learned")],
            "film_at": [replace(LATENT, film_at=at) for at in ("norm", "q", "v")],
            "lora_at": [replace(LATENT, lora_at="q", film_at="norm")],
        },
    ),
}
WITHOUT = {  # layers that are written as a ModelSpec writes them
    "a stage of EvoForge has weights of its own": SharedSpec(0),
    "Zamba's block beside the line is Zamba's alone": AsideSpec(ONE.mixer, n_heads=2, hidden=8),
    "a stack repeats one layer; a loop of several with more than a number is none": replace(
        LOOP, body=(ONE, OTHER)
    ),
    "a stack repeats one layer, at a lower rate too": DownsampleSpec((ONE, OTHER), 2),
    "a condition is shared globally, by channels or by heads": ConditionSpec((ONE,), groups=4),
    "the stream is scaled where norms come after": replace(ONE, stream_scale=1.5),
    "an encoder is made of plain layers of attention": replace(
        LATENT, encoder=(ConditionSpec((SEES_ALL,)),)
    ),
    "routed layers have one budget": DepthRoutedSpec((DepthRoutedSpec((ONE,)), ONE)),
}


def printed(spec):
    pipeline = to_pipeline(spec)
    assert pipeline.spec == spec
    text = pipeline.to_yaml()
    assert Pipeline.from_data(yaml.safe_load(text)).spec.digest == spec.digest
    return text


def test_every_field_of_every_layer_is_asked():
    assert {kind: set(fields) for kind, (_, fields) in SAID.items()} == {
        kind: set(field_types(family))
        for kind, family in LayerSpec.registry.items()
        if kind not in ("shared", "aside")
    }


CASES = [
    pytest.param(layer, id=f"{kind}.{name}-{i}")
    for kind, (base, fields) in SAID.items()
    for name, layers in {"": [base], **fields}.items()
    for i, layer in enumerate(layers)
]


@pytest.mark.parametrize("layer", CASES)
def test_a_field_has_a_word(layer):
    own = {ONE, OTHER} <= {*getattr(layer, "body", ())}  # a stack repeats one layer
    for blocks in ((layer,), (OTHER, layer, OTHER), (ONE, layer, ONE)):
        assert ("custom" in printed(ModelSpec(16, blocks, Tokens(9)))) == own, blocks


@pytest.mark.parametrize("reason", WITHOUT)
def test_what_has_no_word_is_written_in_full(reason):
    assert "custom" in printed(ModelSpec(16, (ONE, WITHOUT[reason]), Tokens(9)))


def test_one_stack_says_as_much_as_it_can():
    """Layers around a loop, a lower rate, a router or a latent are of its stack."""
    wholes = [
        (ONE, LoopSpec((ONE, ONE), 2), ONE),
        (ONE, DownsampleSpec((ONE, DownsampleSpec((ONE,), 2), ONE), 2), ONE),
        (ONE, DepthRoutedSpec((ONE,)), DepthRoutedSpec((ONE,))),
        (ONE, DepthRoutedSpec((ONE, ONE))),
        (ONE, LoopSpec((DepthRoutedSpec((ConditionSpec((ONE,)),)),), 2), ONE)[1:2],
        presets.free_transformer(presets.llama(16, 4, 2, 1, 24, 9)).blocks,
    ]
    texts = [printed(ModelSpec(16, blocks, Tokens(9))) for blocks in wholes]
    assert not any("pipeline" in text for text in texts), texts
    text = texts[-1]
    assert "{where: proj_kv, op: add}" in text
    assert "query: learned" in text


def test_keys_and_streams_of_other_stages():
    far = replace(ONE, mixer=replace(ONE.mixer, kv_from=1))
    beside = replace(ONE, mixer=replace(ONE.mixer, memory_from=0))
    text = printed(ModelSpec(16, (OTHER, ONE, far, far, beside), Tokens(9)))
    assert "custom" not in text
    assert text.count("kv_from: [layers_1]") == 1
    assert text.count("mem_from: [layers_0]") == 1


MLA = MLASpec(2, 6, 4, qk_rope_head_dim=4, v_head_dim=8)
IN_WORDS = [
    MLA,
    replace(MLA, kv_quant="int8", scale=0.5, rope_theta=500.0),
    replace(MLA, position="none"),
    replace(MLA, n_latents=2),
    replace(MLA, every=3),
    replace(MLA, every=2, fade=0.75, rope_scaling=RopeScaling("linear", 2.0)),
]


@pytest.mark.parametrize("mixer", IN_WORDS)
def test_latent_attention_is_a_latent_cache(mixer):
    text = printed(ModelSpec(16, (BlockSpec(mixer, SwiGLUSpec(hidden=32)),) * 2, Tokens(9)))
    assert "cache: latent" in text
    assert "mla" not in text


@pytest.mark.parametrize("fields", [{"norm_eps": 1e-5}, {"q_lora_rank": 4}, {"v_head_dim": 6}])
def test_latent_attention_that_no_word_reaches_is_written_in_full(fields):
    assert "kind: mla" in printed(ModelSpec(16, (BlockSpec(replace(MLA, **fields)),), Tokens(9)))


def test_mixers_side_by_side_may_know_other_positions():
    near = AttentionSpec(n_heads=2, position="alibi", window=8)
    mixer = ParallelSpec((AttentionSpec(n_heads=2, rope_dims=4), near))
    text = printed(ModelSpec(16, (BlockSpec(mixer),), Tokens(9)))
    assert "pos: alibi" in text
    assert "kind: par" in text
    coded = AttentionSpec(n_heads=2, kv_quant="nf4", kv_group=8)
    assert "group: 8" in printed(ModelSpec(16, (BlockSpec(coded),), Tokens(9)))
