"""Mamba checkpoints of transformers and of state-spaces: equal logits both ways, equal bytes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peers import decode

from kizzasi.errors import CheckpointError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.checkpoints import save
from kizzasi.models.mixers import AttentionSpec, Mamba2Spec, MambaSpec

transformers = pytest.importorskip("transformers", reason="parity needs transformers")

SMALL = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEADS = {"num_heads": 4, "head_dim": 8, "chunk_size": 4}
CASES = {
    "mamba": {},
    "mamba biased, untied": {
        "use_bias": True,
        "use_conv_bias": False,
        "tie_word_embeddings": False,
        "time_step_rank": 3,
        "conv_kernel": 3,
        "layer_norm_epsilon": 1e-3,
        "expand": 3,
    },
    "falcon_mamba": {"mixer_rms_eps": 1e-3, "tie_word_embeddings": False},
    "mamba2": {"n_groups": 1, **HEADS},
    "mamba2 tied, grouped": {
        "n_groups": 2,
        "use_bias": True,
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-3,
        **HEADS,
    },
}


def make_peer(kind, sizes, folder, dtype=torch.float32):
    """Save a random model of transformers, with weights large enough to tell mistakes."""
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **sizes),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in peer.parameters():
            noise = torch.randn(p.shape, generator=generator) * 0.3
            p.copy_(p + noise if p.ndim == 1 else noise)
    peer.save_pretrained(folder)
    return peer.eval()


@torch.no_grad()
def difference(peer, model):
    """Largest difference of logits, in one call and in cached decoding."""
    ids = torch.randint(19, (2, 14), generator=torch.Generator().manual_seed(1))
    whole = model(ids).logits
    assert whole.std() > 0.1
    out = model(ids[:, :6])
    steps = [out.logits]
    for t in range(6, ids.shape[1]):
        out = model.step(ids[:, t], out.state)
        steps.append(out.logits[:, None])
    once = (whole - peer(ids).logits).abs().max()
    return max(once, (torch.cat(steps, dim=1) - decode(peer, ids, 6)).abs().max()).item()


def assert_round_trip(peer, folder, tmp_path, kind):
    """Equal bytes after read and write, and the peer reads ours."""
    model = load(folder)
    model.save_pretrained(tmp_path / "ours")
    save(load(tmp_path / "ours"), tmp_path / "again", kind)
    theirs, again = (path / "model.safetensors" for path in (folder, tmp_path / "again"))
    assert again.read_bytes() == theirs.read_bytes()
    assert load(tmp_path / "again").spec == model.spec
    reread, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    ids = torch.arange(12)[None]
    with torch.no_grad():  # not equal: chunk sizes are not kept
        assert (reread(ids).logits - peer(ids).logits).abs().max() <= 1e-5


def hold_to_float64(monkeypatch):
    """transformers rounds to float32 here and there, whatever the model's dtype."""

    def wide(dtype):
        return torch.float64 if dtype is torch.float32 else dtype

    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def patched_to(x, *args, **kwargs):
        return to(x, *map(wide, args), **{k: wide(v) for k, v in kwargs.items()})

    def patched_softmax(x, *args, dtype=None, **kwargs):
        return softmax(x, *args, dtype=wide(dtype), **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", patched_to)
    monkeypatch.setattr(torch.nn.functional, "softmax", patched_softmax)


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    folder, kind = tmp_path_factory.mktemp("mamba") / "theirs", request.param.split()[0]
    return make_peer(kind, SMALL | CASES[request.param], folder), folder, kind


def test_logits_of_prefill_and_of_cached_decoding(made):
    peer, folder, _ = made
    assert difference(peer, load(folder)) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_logits_in_float64(case, tmp_path, monkeypatch):
    hold_to_float64(monkeypatch)
    peer = make_peer(case.split()[0], SMALL | CASES[case], tmp_path, torch.float64)
    model = load(tmp_path)
    assert next(model.parameters()).dtype == torch.float64
    assert difference(peer, model) <= 1e-9


def test_read_and_write_gives_the_same_file_and_the_same_logits(made, tmp_path):
    peer, folder, kind = made
    assert_round_trip(peer, folder, tmp_path, kind)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder per model_type, made once."""
    root = tmp_path_factory.mktemp("stored")
    make_peer("mamba", SMALL, root / "mamba")
    make_peer("mamba2", SMALL | HEADS | {"n_groups": 1}, root / "mamba2")
    save(
        model_of(AttentionSpec(2, position="none"), MambaSpec()), root / "original", "state_spaces"
    )
    return root


def edit(folder, **changes):
    """Change keys of a config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_keys_of_published_files(stored, tmp_path):
    """mamba-130m-hf repeats the original's keys; FalconMamba-7B has an expand that means nothing;
    Mamba-2 says infinity in two ways."""
    for kind in ("mamba", "mamba2"):
        shutil.copytree(stored / kind, tmp_path / kind)
    spec = load(tmp_path / "mamba").spec
    published = {"d_inner": 32, "d_model": 16, "n_layer": 2, "ssm_cfg": {}, "rms_norm": True}
    published |= {"fused_add_norm": True, "pad_vocab_size_multiple": 8, "time_step_rank": "auto"}
    assert load(edit(tmp_path / "mamba", **published)).spec == spec
    assert load(edit(tmp_path / "mamba", expand=16, intermediate_size=32)).spec == spec
    for high in (float("inf"), {"__float__": "Infinity"}):
        spec = load(edit(tmp_path / "mamba2", time_step_limit=[0.5, high])).spec
        assert spec.blocks[0].mixer.dt_limit == (0.5, None)
    for limit in ([0.0, 0.25], (0, 0.25)):
        spec = load(edit(tmp_path / "mamba2", time_step_limit=limit)).spec
        assert spec.blocks[0].mixer.dt_limit == (0.0, 0.25)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ("mamba", {"rms_norm": False}, "rms_norm: False"),
        ("mamba", {"ssm_cfg": {"d_state": 8}}, "ssm_cfg: {'d_state': 8}"),
        ("mamba", {"intermediate_size": 48}, "does not fit its config"),
        ("mamba", {"d_inner": 48}, "d_inner: 48 is not supported; only 32"),
        ("mamba", {"hidden_size": 0}, "hidden_size: 0 cannot be"),
        ("mamba", {"time_step_rank": "much"}, "time_step_rank: expected int, got 'much'"),
        ("mamba", {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 cannot be"),
        ("mamba", {"mixer_rms_eps": 1e-6}, "mixer_rms_eps: 1e-06 is unknown here"),
        ("mamba2", {"expand": 3}, "expand: 3 is not supported: times hidden_size 16 it is not"),
        ("mamba2", {"rms_norm": False}, "rms_norm: False"),
        ("mamba2", {"time_step_limit": [0.1]}, r"time_step_limit: \[0.1\] is not a lower and"),
        ("mamba2", {"time_step_limit": ["a", 1]}, r"time_step_limit\[0\]: expected float"),
        ("mamba2", {"time_step_limit": [0.3, 0.2]}, r"dt_limit: \[0.3, 0.2\] is not"),
        ("mamba2", {"n_groups": 3}, "n_groups: 3 does not divide"),
    ],
)
def test_refused_configs(kind, changes, message, stored, tmp_path):
    folder = shutil.copytree(stored / kind, tmp_path / kind)
    with pytest.raises(CheckpointError, match=message):
        load(edit(folder, **changes))


def model_of(*mixers, channel=None, **fields):
    return build_model(
        ModelSpec(16, tuple(BlockSpec(m, channel) for m in mixers), Tokens(19), **fields), seed=3
    )


@pytest.mark.parametrize(
    ("kind", "mixer", "channel", "message"),
    [
        ("mamba", MambaSpec(inner_norm="rms"), None, r"inner_norm is 'rms', and .* only say None"),
        ("mamba", Mamba2Spec(head_dim=8), None, "no block has the mixer 'mamba'"),
        ("mamba", MambaSpec(), SwiGLUSpec(8), "the format has no name for blocks.0.channel"),
        ("falcon_mamba", MambaSpec(), None, "inner_norm is None"),
        ("mamba2", Mamba2Spec(head_dim=8, norm_before_gate=True), None, "norm_before_gate is True"),
        ("mamba2", Mamba2Spec(head_dim=8, rms_norm=False), None, "rms_norm is False"),
        ("mamba2", Mamba2Spec(head_dim=8, norm_eps=0.1), None, "norm_eps is 0.1"),
        ("mamba2", Mamba2Spec(head_dim=8, expand=1.5), None, "expand: 1 is not supported"),
        ("state_spaces", MambaSpec(inner_norm="rms"), None, "inner_norm is 'rms'"),
        ("state_spaces", MambaSpec(), SwiGLUSpec(8), "hidden is 8, and .* only say 128"),
        ("state_spaces", Mamba2Spec(head_dim=8, expand=1.5), None, "expand: expected int"),
        ("state_spaces", AttentionSpec(2, window=4), None, "window is 4"),
        ("state_spaces", AttentionSpec(2, causal=False), None, "causal: false"),
    ],
)
def test_what_a_format_cannot_say_is_refused(kind, mixer, channel, message, tmp_path):
    with pytest.raises(CheckpointError, match=f"cannot write it as {kind}: .*{message}"):
        save(model_of(mixer, channel=channel), tmp_path, kind)


@pytest.mark.parametrize(
    "mixer", [MambaSpec(expand=1.5, dt_min=1e-2), Mamba2Spec(head_dim=8, dt_limit=(0.1, 0.2))]
)
def test_ours_are_read_by_transformers(mixer, tmp_path):
    model = model_of(mixer, mixer).eval()
    save(model, tmp_path, mixer.kind)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (peer(ids).logits - model(ids).logits).abs().max() <= 1e-4
    blocks = load(tmp_path).spec.blocks
    assert blocks[0].mixer.expand == mixer.expand
    assert blocks[0].mixer.dt_min == mixer.dt_min


ORIGINAL = {
    "d_model": 16,
    "n_layer": 2,
    "vocab_size": 17,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("twice", [False, True])
def test_originals_of_state_spaces(kind, twice, tmp_path):
    """The tensors of transformers' model under the original's names; a tied head may be there."""
    sizes = SMALL | {"vocab_size": 24, "tie_word_embeddings": True}
    if kind == "mamba2":
        sizes |= HEADS | {"n_groups": 1}
    peer = make_peer(kind, sizes, tmp_path / "theirs")
    tensors = {n.replace("embeddings", "embedding"): t for n, t in peer.state_dict().items()}
    if not twice:
        del tensors["lm_head.weight"]
    layer = {"layer": "Mamba2", "headdim": 8, "chunk_size": 64} if kind == "mamba2" else {}
    folder, config = tmp_path / "original", ORIGINAL | {"ssm_cfg": {"d_state": 4, **layer}}
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    assert model.spec.stem.vocab_size == 24  # 17, padded
    assert difference(peer, model) <= 1e-4
    save(model, tmp_path / "again", "state_spaces")
    again = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert again.keys() == tensors.keys() | {"lm_head.weight"}
    assert all(torch.equal(again[name], t) for name, t in tensors.items())
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert ORIGINAL.keys() <= written.keys()
    assert "model_type" not in written
    assert load(tmp_path / "again").spec == model.spec


def test_originals_with_attention_and_channels(tmp_path):
    """A layer of MHA and GatedMLP, computed here from the stored tensors as they do."""
    attention = AttentionSpec(4, 2, head_dim=6, position="none", qkv_bias=True)
    model = model_of(attention, MambaSpec(), channel=SwiGLUSpec(128), tie_head=True).eval()
    save(model, tmp_path, "state_spaces")
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    layer = {n.removeprefix("backbone.layers.0."): t for n, t in stored.items()}
    block, x = model.blocks[0], torch.randn(2, 5, 16)
    functional = torch.nn.functional
    normed = functional.rms_norm(x, (16,), layer["norm.weight"], 1e-5)
    qkv = functional.linear(normed, layer["mixer.in_proj.weight"], layer["mixer.in_proj.bias"])
    q, k, v = (part.unflatten(-1, (-1, 6)).mT.mT for part in qkv.split([24, 12, 12], -1))
    q, k, v = q.transpose(1, 2), *(p.transpose(1, 2).repeat_interleave(2, 1) for p in (k, v))
    heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = x + functional.linear(heads.transpose(1, 2).flatten(-2), layer["mixer.out_proj.weight"])
    normed = functional.rms_norm(y, (16,), layer["norm2.weight"], 1e-5)
    up, gate = functional.linear(normed, layer["mlp.fc1.weight"]).chunk(2, -1)
    y = y + functional.linear(up * functional.silu(gate), layer["mlp.fc2.weight"])
    assert torch.allclose(block(x).y, y, atol=1e-5)
    again = load(tmp_path)
    assert again.spec == model.spec.replace(blocks=again.spec.blocks)
    assert [b.mixer.kind for b in again.spec.blocks] == ["attention", "mamba"]
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("mixer", [AttentionSpec(2, rope_dims=4), Mamba2Spec(head_dim=8)])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_what_was_written_as_an_original_is_read(mixer, norm, tmp_path):
    spec = model_of(mixer).spec
    spec = spec.replace(norm=norm, blocks=tuple(replace(b, norm=norm) for b in spec.blocks))
    save(build_model(spec), tmp_path / "a", "state_spaces")
    save(load(tmp_path / "a"), tmp_path / "b", "state_spaces")
    configs = [(tmp_path / name / "config.json").read_text() for name in "ab"]
    assert configs[0] == configs[1]


ATTENDING = {"causal": True, "num_heads": 2, "qkv_proj_bias": False, "out_proj_bias": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba4"}}, r"ssm_cfg\.layer: 'Mamba4' is not supported; only"),
        ({"ssm_cfg": {"d_ssm": 8, "layer": "Mamba2"}}, r"ssm_cfg\.d_ssm: 8 is not supported"),
        ({"ssm_cfg": {"d_stat": 8}}, r"ssm_cfg\.d_stat: 8 is unknown here"),
        ({"attn_layer_idx": [0, 5]}, r"attn_layer_idx: \[0, 5\] for 2 layers"),
        ({"attn_cfg": ATTENDING | {"d_conv": 4}}, r"attn_cfg\.d_conv: a convolution over"),
        ({"attn_cfg": ATTENDING | {"mlp_dim": 4}}, r"attn_cfg\.mlp_dim: 4 is not supported"),
        ({"attn_cfg": ATTENDING | {"causal": False}}, r"attn_cfg\.causal: false"),
        ({"attn_cfg": ATTENDING | {"rotary_emb_interleaved": True}}, "interleaved: True"),
        ({"attn_cfg": None}, r"attn_cfg\.causal: false"),
        ({"d_model": None}, "d_model: missing"),
        ({"d_intermediate": 64}, r"missing .*mlp\.fc1"),
        ({"tie_embeddings": True}, "lm_head.weight is stored and differs"),
    ],
)
def test_refused_originals(changes, message, stored, tmp_path):
    folder = shutil.copytree(stored / "original", tmp_path / "original")
    with pytest.raises(CheckpointError, match=message):
        load(edit(folder, **changes))
