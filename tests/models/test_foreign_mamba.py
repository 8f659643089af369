"""Mamba checkpoints of transformers and of state-spaces: equal logits both ways, equal bytes."""

import json
from dataclasses import replace

import pytest
import torch

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
    config = transformers.AutoConfig.for_model(kind, **sizes)
    peer = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=dtype
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            usual = 1.0 if p.ndim == 1 and "A_log" not in name else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + usual)
    peer.save_pretrained(folder)
    return peer.eval()


def decode(peer, ids, prefix):
    """The peer's logits: a prompt at once, then token by token from its cache."""
    out = peer(ids[:, :prefix], use_cache=True)
    name = "cache_params" if "cache_params" in out else "past_key_values"
    logits = [out.logits]
    for t in range(prefix, ids.shape[1]):
        place = {} if name == "cache_params" else {"position_ids": torch.tensor([[t]])}
        out = peer(ids[:, t : t + 1], use_cache=True, **{name: out[name]}, **place)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


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
    with torch.no_grad():
        assert torch.equal(reread(ids).logits, peer(ids).logits)


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
