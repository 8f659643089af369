"""RWKV checkpoints: RWKV-LM's .pth of versions 4, 5.2, 6 and 7, transformers' rwkv, fla's rwkv7."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import assert_close

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
from kizzasi.models.checkpoints import save, tuned_state
from kizzasi.models.mixers.rwkv4 import RWKV4Spec
from kizzasi.models.mixers.rwkv5 import RWKV5Spec
from kizzasi.models.mixers.rwkv6 import RWKV6Spec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec

D, N, H, R, LAYERS, VOCAB, HIDDEN = 32, 16, 2, 3, 3, 19, 48
LINEARS = {f"att.{name}.weight": (D, D) for name in ("receptance", "key", "value", "output")}
GATED = {"att.gate.weight": (D, D), "att.ln_x.weight": (D,), "att.ln_x.bias": (D,)}
FFN = {"ffn.key.weight": (HIDDEN, D), "ffn.value.weight": (D, HIDDEN)}
FLAT = (1, 1, D)


def flat(names, prefix="att."):
    return {prefix + name: FLAT for name in names.split()}


# What RWKV-LM stores of a layer, by version: names and shapes from its source.
DISK = {
    4: {
        **{"att.time_decay": (D,), "att.time_first": (D,)},
        **flat("time_mix_k time_mix_v time_mix_r"),
        **flat("time_mix_k time_mix_r", "ffn."),
        **{"ffn.receptance.weight": (D, D)},
    },
    5: {
        **{"att.time_decay": (H, N), "att.time_faaaa": (H, N)},
        **flat("time_mix_k time_mix_v time_mix_r time_mix_g"),
        **GATED,
        **flat("time_mix_k time_mix_r", "ffn."),
        **{"ffn.receptance.weight": (D, D)},
    },
    6: {
        **flat("time_maa_x time_maa_w time_maa_k time_maa_v time_maa_r time_maa_g time_decay"),
        **{"att.time_maa_w1": (D, 5 * R), "att.time_maa_w2": (5, R, D)},
        **{"att.time_decay_w1": (D, R), "att.time_decay_w2": (R, D), "att.time_faaaa": (H, N)},
        **GATED,
        **flat("time_maa_k time_maa_r", "ffn."),
        **{"ffn.receptance.weight": (D, D)},
    },
    7: {
        **flat("x_r x_w x_k x_v x_a x_g w0 a0 v0 k_k k_a"),
        **{f"att.{name}1": (D, R) for name in "wavg"},
        **{f"att.{name}2": (R, D) for name in "wavg"},
        **{"att.r_k": (H, N), "att.ln_x.weight": (D,), "att.ln_x.bias": (D,)},
        **flat("x_k", "ffn."),
    },
}
MIXERS = {
    4: RWKV4Spec(D),
    5: RWKV5Spec(N),
    6: RWKV6Spec(N, R, R),
    7: RWKV7Spec(N, R, R, v_rank=R, gate_rank=R),
}
CHANNELS = {4: 4, 5: 4, 6: 6, 7: 7}
versions = pytest.mark.parametrize("version", list(DISK))


def published(version, dtype=torch.float32, first_v=False):
    """Random weights under RWKV-LM's names; `first_v`: with the unused v0, v1, v2 of layer 0."""
    layer = {f"ln{i}.{part}": (D,) for i in (1, 2) for part in ("weight", "bias")}
    layer |= {**DISK[version], **LINEARS, **FFN}
    shapes = {"emb.weight": (VOCAB, D), "head.weight": (VOCAB, D)}
    shapes |= {
        f"{name}.{part}": (D,) for name in ("blocks.0.ln0", "ln_out") for part in ("weight", "bias")
    }
    shapes |= {f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    g = torch.Generator().manual_seed(version)
    weights = {}
    for name, shape in shapes.items():
        if name.startswith("blocks.0.att.v") and name[-1] in "012" and not first_v:
            continue
        mean = 1.0 if "ln" in name and name.endswith("weight") else 0.0
        weights[name] = (mean + 0.4 * torch.randn(shape, generator=g)).to(dtype)
    return weights


def spec(mixer, channel, **fields):
    block = BlockSpec(mixer, RWKVChannelSpec(HIDDEN, channel), norm="layer")
    fields = {"norm": "layer", "embed_norm": True, **fields}
    return ModelSpec(D, (block,) * LAYERS, Tokens(VOCAB), **fields)


def same_bytes(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def ids(batch, length, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pth_is_recognised_and_written_back_byte_for_byte(version, dtype, tmp_path):
    weights = published(version, dtype)
    torch.save(weights, tmp_path / "any-name.pth")
    model = load(tmp_path / "any-name.pth")
    assert model.spec == spec(MIXERS[version], CHANNELS[version])
    assert next(model.stem.parameters()).dtype is dtype
    save(model, tmp_path / "again", format="rwkv_pth")
    same_bytes(torch.load(tmp_path / "again/model.pth", weights_only=True), weights)


def test_the_unused_v_of_the_first_layer_is_left_out(tmp_path):
    torch.save(published(7, first_v=True), tmp_path / "full.pth")
    model = load(tmp_path / "full.pth")
    save(model, tmp_path / "again", format="rwkv_pth")
    again = torch.load(tmp_path / "again/model.pth", weights_only=True)
    weights = published(7, first_v=True)
    missing = {f"blocks.0.att.v{i}" for i in range(3)}
    assert weights.keys() - again.keys() == missing
    same_bytes(again, {name: t for name, t in weights.items() if name not in missing})


RUN_PACKAGE = """
import importlib, os, sys, warnings
warnings.simplefilter("ignore")
import torch
import rwkv.model
tokens = [int(t) for t in sys.argv[1].split(",")]
for path in sys.argv[2:]:
    os.environ["RWKV_V7_ON"] = "01"[path.endswith("7")]  # read while the module is imported
    model = importlib.reload(rwkv.model).RWKV(model=path, strategy="cpu fp32")
    at_once, state = model.forward(tokens[:-2], None, full_output=True)
    steps = []
    for token in tokens[-2:]:
        logits, state = model.forward([token], state)
        steps.append(logits)
    torch.save(torch.cat([at_once, torch.stack(steps)]), path + ".out")
"""


@pytest.mark.skipif(find_spec("rwkv") is None, reason="the package rwkv is not installed")
@torch.no_grad()
def test_parity_with_the_rwkv_package(tmp_path):
    """Prefill of 20 tokens, then two decoded ones, in every version."""
    tokens = ids(1, 22)
    for version in DISK:
        torch.save(published(version), tmp_path / f"v{version}.pth")
    text = ",".join(map(str, tokens[0].tolist()))
    command = [sys.executable, "-c", RUN_PACKAGE, text, *(str(tmp_path / f"v{v}") for v in DISK)]
    env = {**os.environ, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=120)
    for version in DISK:
        theirs = torch.load(tmp_path / f"v{version}.out", weights_only=True)
        model = load(tmp_path / f"v{version}.pth")
        assert_close(model(tokens).logits[0], theirs, msg=f"version {version}")
        out = model(tokens[:, :20])
        for t in (20, 21):
            out = model.step(tokens[:, t], out.state)
            assert_close(out.logits[0], theirs[t], msg=f"version {version}, step {t}")


def write_with_transformers(folder, d_inner):
    """A tiny RwkvForCausalLM of random weights, after it wrote a folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, attention_hidden_size=d_inner,
        intermediate_size=HIDDEN, context_length=64, rescale_every=2,
    )  # fmt: skip
    model = transformers.RwkvForCausalLM(config).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def transformers_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rwkv")
    return write_with_transformers(folder, D), folder


@torch.no_grad()
def test_parity_with_transformers_in_a_wider_memory(tmp_path):
    """Prefill only: with another attention_hidden_size, transformers cannot keep a state."""
    theirs = write_with_transformers(tmp_path, 40)
    ours = load(tmp_path)
    assert ours.spec == spec(RWKV4Spec(40), 4)
    assert_close(ours(ids(2, 30)).logits, theirs(ids(2, 30), use_cache=False).logits)


@torch.no_grad()
def test_parity_with_transformers(transformers_model):
    """Prefill and cached decoding of one row; transformers halves its weights every 2 layers."""
    theirs, folder = transformers_model
    ours, tokens = load(folder), ids(1, 30)
    assert_close(ours(tokens).logits, theirs(tokens).logits)
    their_state, our_state = (
        theirs(tokens[:, :20], use_cache=True).state,
        ours(tokens[:, :20]).state,
    )
    for t in range(20, 30):
        they = theirs(tokens[:, t : t + 1], state=their_state, use_cache=True)
        we = ours.step(tokens[:, t], our_state)
        their_state, our_state = they.state, we.state
        assert_close(we.logits, they.logits[:, 0])


@torch.no_grad()
def test_a_batch_with_padding_equals_transformers_row_by_row(transformers_model):
    """Three prompts of different length, padded on the left and decoded together: logits (3, vocab)
    per token, those that transformers gives to each bare row in one pass."""
    theirs, folder = transformers_model
    ours = load(folder)
    rows = [ids(1, n, seed=n) for n in (12, 7, 3)]
    more = ids(3, 4, seed=9)
    padded = torch.cat([torch.cat([torch.full((1, 12 - r.shape[1]), 5), r], 1) for r in rows])
    mask = torch.arange(12) >= torch.tensor([[0], [5], [9]])
    out = ours(padded, mask=mask)
    steps = [out.logits[:, -1]]
    for t in range(4):
        out = ours.step(more[:, t], out.state)
        steps.append(out.logits)
    for i, row in enumerate(rows):
        expected = theirs(torch.cat([row, more[i : i + 1]], 1)).logits[0, -5:]
        assert_close(torch.stack(steps, 1)[i], expected)


def test_transformers_folder_is_written_back_byte_for_byte_and_read_by_transformers(
    transformers_model, tmp_path
):
    theirs, folder = transformers_model
    save(load(folder), tmp_path, format="rwkv")
    same_bytes(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors"))
    again = type(theirs).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(again(ids(1, 9)).logits, theirs(ids(1, 9)).logits)


def fla_folder(folder, *, old=False, **changes):
    """fla's rwkv7 of the weights of `published(7)`: linear layers hold the low-rank maps."""
    names = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}
    parts = {
        "receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj",
        "ln_x": "g_norm",
    }  # fmt: skip
    places = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "ffn": "ffn", "att": "attn"}
    theirs = {}
    for name, t in published(7).items():
        if not name.startswith("blocks."):
            theirs[names.get(name, name.replace("ln_out", "model.norm"))] = t
            continue
        _, i, place, *rest = name.split(".")
        if place == "att" and rest[0] in [a + b for a in "wavg" for b in "012"]:
            kind, order = rest[0]
            rest = [f"{kind}_lora.lora", {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[order]]
            t = t.flatten() if order == "0" else t.T.contiguous()
        elif place == "att":
            rest[0] = parts.get(rest[0], rest[0])
        if rest[0] in ("k_k", "k_a") or (place == "ffn" and rest[0] == "x_k"):
            t = t.flatten()
        theirs[".".join(["model.layers", i, places[place], *rest])] = t
    for i in range(LAYERS if old else 0):
        rows = [theirs.pop(f"model.layers.{i}.attn.x_{name}") for name in "rwkvag"]
        theirs[f"model.layers.{i}.attn.x_x"] = torch.cat(rows).flatten(1)
    config = {
        "model_type": "rwkv7", "architectures": ["RWKV7"], "attn": None, "attn_mode": "chunk",
        "vocab_size": VOCAB, "hidden_size": D, "hidden_ratio": 4, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "head_dim": N, "num_heads": None, "decay_low_rank_dim": R,
        "a_low_rank_dim": R, "v_low_rank_dim": R, "gate_low_rank_dim": R, "hidden_act": "sqrelu",
        "norm_first": True, "norm_bias": True, "norm_eps": 4e-5, "value_dim": [D] * LAYERS,
        "fuse_norm": True, "tie_word_embeddings": False, "max_position_embeddings": 2048,
    }  # fmt: skip
    save_file(theirs, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return theirs


@pytest.mark.parametrize("old", [False, True])
@torch.no_grad()
def test_fla_s_rwkv7_is_the_published_model(old, tmp_path):
    fla_folder(tmp_path, old=old)
    model = load(tmp_path)
    assert model.spec == spec(MIXERS[7], 7, norm_eps=4e-5)
    torch.save(published(7), tmp_path / "v7.pth")
    same = build_model(model.spec)
    same.load_state_dict(load(tmp_path / "v7.pth").state_dict())
    assert torch.equal(model(ids(2, 9)).logits, same(ids(2, 9)).logits)


def test_fla_folder_is_written_back_byte_for_byte(tmp_path):
    theirs = fla_folder(tmp_path)
    save(load(tmp_path), tmp_path / "again", format="rwkv7")
    same_bytes(load_file(tmp_path / "again/model.safetensors"), theirs)
    assert load(tmp_path / "again").spec == load(tmp_path).spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-5}, "norm_eps: 1e-05 is not supported: times the 16 channels"),
        ({"decay_low_rank_dim": 8}, "decay_low_rank_dim: 8 is not supported; only 3 is"),
        ({"norm_bias": False}, "norm_bias: False is not supported"),
        ({"attn": {"layers": [1]}}, "attn: .* is not supported"),
        ({"value_dim": [64] * LAYERS}, "value_dim: .* is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 cannot be"),
        (
            {"num_hidden_layers": 4, "value_dim": None},
            r"layers.3.attn.w_lora.lora.0.weight is missing",
        ),
    ],
)
def test_configs_of_fla_that_ask_for_more_are_refused(changes, message, tmp_path):
    fla_folder(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_damaged_and_unknown_versions_are_named(tmp_path):
    path = tmp_path / "model.pth"

    def refused(weights, message):
        torch.save(weights, path)
        with pytest.raises(CheckpointError, match=message):
            load(path)

    refused({**published(7), "blocks.0.ffn.s0": torch.zeros(D)}, "unexpected blocks.0.ffn.s0")
    weights = published(4)
    del weights["blocks.1.att.key.weight"]
    refused(weights, "missing blocks.1.att.key.weight")
    refused({**published(6), "blocks.0.att.r_k": torch.zeros(H, N)}, "exactly one is expected, 2")
    weights = published(6)
    weights["blocks.0.att.time_faaaa"] = torch.zeros(D)
    refused(weights, r"time_faaaa is \(32,\); expected 2 dimensions")
    weights = published(5)
    del weights["blocks.0.att.time_mix_g"]
    refused(weights, "exactly one is expected, 0")


@pytest.mark.parametrize(
    ("given", "format", "message"),
    [
        (spec(RWKV4Spec(), 4, tie_head=True), "rwkv_pth", "head"),
        (spec(RWKV4Spec(), 4, norm_eps=1e-6), "rwkv_pth", "norm_eps is 1e-06"),
        (spec(RWKV4Spec(), 7), "rwkv_pth", r"blocks\[0\].channel.version is 7; give rwkv4 with"),
        (spec(RWKV7Spec(N), 7), "rwkv", r"blocks\[0\] is rwkv7 with rwkv_channel; give rwkv4"),
        (spec(RWKV6Spec(N), 6), "rwkv7", r"blocks\[0\] is rwkv6 with rwkv_channel; give rwkv7"),
        (spec(RWKV4Spec(), 4, embed_norm=False), "rwkv", "embed_norm is False"),
        (spec(RWKV7Spec(N), 7), "rwkv7", "norm_eps: 1e-05 is not supported"),
    ],
)
def test_models_that_a_format_cannot_express_are_refused(given, format, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        save(build_model(given), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


BIASED = ModelSpec(
    32,
    (BlockSpec(RWKV7Spec(head_dim=8, bias=True), RWKVChannelSpec(48), norm="layer"),) * 2,
    Tokens(11, head_bias=True),
    norm="layer",
)


def shaken(spec):
    """A model in which everything acts."""
    model, generator = build_model(spec, seed=1).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def test_numbered_files_with_biases(tmp_path):
    """Names as RWKV-LM's research files have them; what its switched-off branch holds is left."""
    model = shaken(BIASED)
    save(model, tmp_path, "rwkv_flat")
    stored = torch.load(tmp_path / "model.pth")
    assert {"e.weight", "o.bias", "rosa2.o.bias", "ln1a.weight", "rwkv2.v0"} <= stored.keys()
    assert stored["rwkv1.x_r"].shape == (1, 1, 32)
    stored |= {"rosa1.q.bias": torch.ones(32), "ln2c.weight": torch.ones(32)}
    torch.save(stored | {"rwkv1.v1": torch.ones(32, 4)}, tmp_path / "b.pth")
    ids = torch.arange(11)[None]
    for name in ("model.pth", "b.pth"):
        again = load(tmp_path / name)
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.spec.stem == BIASED.stem
    out = again(ids[:, :6])
    step = again.step(ids[:, 6], out.state)
    assert_close(step.logits, model(ids).logits[:, 6])
    assert sum(p.numel() for p in model.parameters()) == BIASED.cost(1).params
    torch.save(stored | {"rosa1.odd": torch.ones(3)}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"unexpected rosa1\.odd"):
        load(tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"mixer\.bias is True, and the format"):
        save(model, tmp_path / "d", "rwkv_pth")
    with pytest.raises(SpecError, match=r"stem\.head_bias: a tied head has no bias"):
        BIASED.replace(tie_head=True).check()


@pytest.mark.parametrize("kind", [RWKV5Spec, RWKV6Spec, RWKV7Spec])
def test_an_initial_memory_is_a_state(tmp_path, kind):
    version = {RWKV5Spec: 4, RWKV6Spec: 6, RWKV7Spec: 7}[kind]
    block = BlockSpec(kind(head_dim=8), RWKVChannelSpec(48, version), norm="layer")
    spec = ModelSpec(16, (block, block), Tokens(11), norm="layer", embed_norm=True)
    model, ids = shaken(spec), torch.arange(11)[None] % 7
    state = model(ids).state  # what some document left
    memory = {f"blocks.{i}.att.time_state": b.mixer.wkv[0] for i, b in enumerate(state.blocks)}
    if kind is not RWKV7Spec:  # stored as [value, key], kept as [key, value]
        memory = {name: m.mT.contiguous() for name, m in memory.items()}
    torch.save(memory, tmp_path / "state.pth")
    tuned = tuned_state(tmp_path / "state.pth", model, batch=2)
    for ours, theirs in zip(tuned.blocks, state.blocks, strict=True):
        assert torch.equal(ours.mixer.wkv[1], theirs.mixer.wkv[0])
        assert not ours.mixer.shift.any()
    with torch.no_grad():
        whole = model(ids.repeat(2, 1), tuned).logits
        assert (whole - model(ids).logits).abs().max() > 1e-4
        step = model.step(ids.repeat(2, 1)[:, 0], tuned)
        assert_close(step.logits, whole[:, 0])
    save(model, tmp_path, "rwkv_pth")
    torch.save(torch.load(tmp_path / "model.pth") | memory, tmp_path / "both.pth")
    with pytest.warns(UserWarning, match="initial memory .*tuned_state"):
        both = load(tmp_path / "both.pth")
    assert torch.equal(both(ids).logits, model(ids).logits)
    del memory["blocks.1.att.time_state"]
    torch.save(memory, tmp_path / "half.pth")
    with pytest.raises(
        CheckpointError, match=r"blocks\.1\.att\.time_state is missing; .*\(2, 8, 8\)"
    ):
        tuned_state(tmp_path / "half.pth", model)
    other = build_model(ModelSpec(16, (BlockSpec(RWKV4Spec()),), Tokens(7)))
    with pytest.raises(CheckpointError, match=r"blocks\[0\]: only RWKV-5, 6 and 7"):
        tuned_state(tmp_path / "half.pth", other)
