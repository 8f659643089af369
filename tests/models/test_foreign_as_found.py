"""Checkpoints as people have them: without a head, with every key written out, under a wrapper."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from kizzasi.errors import CheckpointError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load, presets
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.checkpoints import save
from kizzasi.models.mixers import AttentionSpec, Mamba3Spec, MambaSpec

transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
TIED = {"tie_word_embeddings": True}
PEERS = {
    "llama": SIZES | HEADS | TIED,
    "qwen3": SIZES | HEADS | TIED | {"head_dim": 8},
    "mamba": SIZES,
    "mamba2": SIZES | TIED | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
IDS = torch.arange(18).view(2, 9) * 5 % 60
WRAPPERS = ("_orig_mod.", "module.", "_forward_module.", "module._orig_mod.")


def peer(name, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(PEERS[name] | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def difference(folder, original):
    with torch.no_grad():
        return (load(folder)(IDS).logits - original(IDS).logits).abs().max()


@pytest.mark.parametrize("name", PEERS)
def test_a_tied_model_saved_without_its_head(tmp_path, name):
    original = peer(name)
    original.base_model.save_pretrained(tmp_path)
    assert difference(tmp_path, original) <= 1e-5


def test_a_head_of_its_own_is_missed(tmp_path):
    peer("llama", tie_word_embeddings=False).base_model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight$"):
        load(tmp_path)


@pytest.mark.parametrize("name", PEERS)
def test_a_config_with_every_key(tmp_path, name):
    original = peer(name)
    original.save_pretrained(tmp_path)
    original.config.to_json_file(tmp_path / "config.json", use_diff=False)
    assert difference(tmp_path, original) <= 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["is_encoder_decoder"] is False
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    with pytest.raises(CheckpointError, match="is_encoder_decoder: True is unknown here"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_wrappers_prefix(tmp_path, prefix, file):
    original = peer("mamba")
    original.config.save_pretrained(tmp_path)
    tensors = {prefix + name: t.clone() for name, t in original.state_dict().items()}
    write = torch.save if file.endswith("bin") else save_file
    write(tensors, tmp_path / file)
    assert difference(tmp_path, original) <= 1e-5
    tensors["backbone.norm_f.weight"] = tensors.pop(prefix + "backbone.norm_f.weight")
    write(tensors, tmp_path / file)
    with pytest.raises(CheckpointError, match="does not fit its config"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_a_wrappers_prefix_in_other_files(tmp_path, prefix):
    model = build_model(presets.rwkv7(32, 2, 17, 8))
    save(model, tmp_path, "rwkv_pth")
    tensors = torch.load(tmp_path / "model.pth")
    torch.save({prefix + name: t for name, t in tensors.items()}, tmp_path / "wrapped.pth")
    assert torch.equal(load(tmp_path / "wrapped.pth")(IDS % 17).logits, model(IDS % 17).logits)
    block = BlockSpec(MambaSpec(d_state=4))
    model = build_model(ModelSpec(16, (block,) * 2, Tokens(60)))
    model.save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    names = {name: name.replace("blocks.0.", "blocks.0._orig_mod.") for name in load_file(path)}
    save_file({prefix + names[n]: t for n, t in load_file(path).items()}, path)
    assert torch.equal(load(tmp_path / "ours")(IDS).logits, model(IDS).logits)
    both = load_file(path) | {prefix + "blocks.0.mixer.D": torch.zeros(32)}
    save_file(both, path)
    with pytest.raises(CheckpointError, match="two tensors have one name"):
        load(tmp_path / "ours")


@pytest.mark.parametrize("a_activation", ["heavy_tail", "softplus"])
def test_mamba3_of_state_spaces(tmp_path, a_activation):
    mixer = Mamba3Spec(d_state=16, head_dim=8, n_groups=2, a_activation=a_activation)
    attention = AttentionSpec(4, 4, head_dim=8, position="none", qkv_bias=True, out_bias=True)
    blocks = [BlockSpec(part, SwiGLUSpec(128)) for part in (mixer, attention, mixer)]
    model = build_model(ModelSpec(32, tuple(blocks), Tokens(64), tie_head=True)).eval()
    save(model, tmp_path, "state_spaces")
    stored = torch.load(tmp_path / "pytorch_model.bin")
    parts = {n.removeprefix("backbone.layers.0.mixer.") for n in stored if ".0.mixer." in n}
    wanted = "in_proj.weight out_proj.weight B_norm.weight C_norm.weight B_bias C_bias D dt_bias"
    assert parts == set(wanted.split())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["ssm_cfg"]["layer"] == "Mamba3"
    again = load(tmp_path)
    assert again.spec == model.spec
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    for change, message in (({"is_mimo": True}, "is_mimo"), ({"is_outproj_norm": True}, "is_outp")):
        edited = config | {"ssm_cfg": config["ssm_cfg"] | change}
        (tmp_path / "config.json").write_text(json.dumps(edited))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    del config["ssm_cfg"]["a_activation"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).spec.blocks[0].mixer.a_activation == "heavy_tail"


def test_pipes_and_devices_are_no_files(tmp_path):
    """They have no end, or wait for ever."""
    model = build_model(ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Tokens(60)))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(tmp_path)
    weights.unlink()
    index = {"weight_map": dict.fromkeys(model.state_dict(), "shard")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for place in ("/dev/zero", "/proc/self/mem", tmp_path):
        (tmp_path / "shard").unlink(missing_ok=True)
        (tmp_path / "shard").symlink_to(place)
        with pytest.raises(CheckpointError, match=r"not a regular file|damaged"):
            load(tmp_path)
    for name in ("../shard", "/dev/zero", "a/../shard", "..", "a\x00b", ""):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(model.state_dict(), name)})
        )
        with pytest.raises(CheckpointError, match=r"plain name|cannot read it"):
            load(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        load(tmp_path)


def test_links_to_a_cache_are_followed(tmp_path):
    """As downloads keep them: names that point to blobs elsewhere."""
    model = build_model(ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Tokens(60))).eval()
    model.save_pretrained(tmp_path / "blobs", max_shard_size="5KB")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert torch.equal(load(tmp_path / "snapshot")(IDS).logits, model(IDS).logits)
    load(tmp_path / "snapshot").save_pretrained(tmp_path / "snapshot", overwrite=True)
    assert len(list((tmp_path / "blobs").iterdir())) > 3
    assert not (tmp_path / "snapshot" / "model.safetensors").is_symlink()


def test_a_file_that_changes_while_it_is_read(tmp_path):
    from kizzasi.models.checkpoints.storage.files import open_file

    save_file({"a": torch.zeros(1000)}, tmp_path / "a")
    stored = open_file(tmp_path / "a")
    save_file({"a": torch.ones(1000)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        stored["a"].read()
