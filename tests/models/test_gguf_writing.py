"""GGUF written by us: the package gguf reads the same, and so do we, and llama.cpp's names."""

import json

import numpy as np
import pytest
import torch
from test_companions import tokenizer
from test_foreign_mamba import make_peer
from test_gguf import SIZES, WORDS

gguf = pytest.importorskip("gguf", reason="the oracle is the package gguf")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

from kizzasi.cli import main  # noqa: E402
from kizzasi.errors import CheckpointError, DataError  # noqa: E402
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load, presets  # noqa: E402
from kizzasi.models.channels import RWKVChannelSpec, SwiGLUSpec  # noqa: E402
from kizzasi.models.checkpoints import companions_of, save, spec_of  # noqa: E402
from kizzasi.models.checkpoints.tokenizers import load_tokenizer  # noqa: E402
from kizzasi.models.mixers import AttentionSpec, RWKV6Spec, RWKV7Spec  # noqa: E402

LLAMA = ModelSpec(32, (BlockSpec(AttentionSpec(4), SwiGLUSpec(24)),) * 2, Tokens(300))
RWKV6 = presets.rwkv7(32, 3, 40, 8).replace(
    blocks=(BlockSpec(RWKV6Spec(head_dim=8), RWKVChannelSpec(64, 6), norm="layer"),) * 3
)
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
HEADS = {key: value for key, value in SIZES.items() if key != "pad_token_id"} | {"vocab_size": 300}
STATES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
PEERS = {
    "llama": HEADS | {"attention_bias": True, "tie_word_embeddings": True},
    "qwen2": HEADS,
    "qwen3": HEADS,
    "mamba": STATES,
    "mamba2": STATES | {"num_heads": 8, "head_dim": 8, "n_groups": 2},
}


def random(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=[*PEERS, "rwkv7"])
def source(request, tmp_path_factory):
    """A folder, with a tokenizer unless its ids are bytes."""
    name, folder = request.param, tmp_path_factory.mktemp("gguf") / "source"
    if name == "rwkv7":
        save(random(build_model(presets.rwkv7(32, 2, 256, 8), seed=1)), folder)
    else:
        make_peer(name, PEERS[name] | IDS, folder)
        tokenizer().save_pretrained(folder)
    return name, folder


def read(path):
    """Metadata and tensors, by the package."""
    reader = gguf.GGUFReader(path)
    metadata = {field.name: field.contents() for field in reader.fields.values()}
    tensors = {
        t.name: (t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    return metadata, tensors


def test_the_package_and_we_read_what_was_written(source, tmp_path, capsys):
    name, folder = source
    path = tmp_path / "model.gguf"
    assert main(["convert", str(folder), str(path), "--to", "gguf"]) == 0
    capsys.readouterr()
    model, again, ids = load(folder), load(path), torch.arange(18).view(2, 9) * 7 % 256
    assert (model(ids).logits - again(ids).logits).abs().max() <= 2e-6
    assert spec_of(path) == again.spec
    metadata, tensors = read(path)
    assert metadata["general.architecture"] == name
    assert metadata[f"{name}.block_count"] == 2
    assert {kind for kind, _ in tensors.values()} == {"F32"}
    known = gguf.constants.MODEL_TENSORS[gguf.MODEL_ARCH[name.upper()]]
    templates = {gguf.constants.TENSOR_NAMES[t] for t in known}
    named = {template.format(bid=i) for template in templates for i in range(2)}
    assert {n.removesuffix(".weight").removesuffix(".bias") for n in tensors} <= named
    wanted = model.stem.embedding.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["token_embd.weight"][1].reshape(wanted.shape), wanted)
    # And back once more: the same file.
    save(again, tmp_path / "again.gguf", "gguf", like=path)
    if name != "rwkv7":
        first, second = (load_tokenizer(p, 300) for p in (folder, tmp_path / "again.gguf"))
        assert [second.encode(text) for text in WORDS] == [first.encode(text) for text in WORDS]
    assert load_tokenizer(path, 256).decode([65] if name == "rwkv7" else []) in ("A", "")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_smaller_types(source, tmp_path, kind):
    name, folder = source
    model, path = load(folder), tmp_path / "model.gguf"
    save(model, path, "gguf", gguf_type=kind)
    metadata, tensors = read(path)
    assert metadata["general.file_type"] == {"F16": 1, "Q8_0": 7}[kind]
    kinds = {n: k for n, (k, _) in tensors.items()}
    assert kinds["token_embd.weight"] == kind
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    inner = {"mamba": "ssm_in", "mamba2": "ssm_in", "rwkv7": "time_mix_key"}.get(name, "attn_v")
    assert kinds[f"blk.1.{inner}.weight"] == kind
    embedding = model.stem.embedding.weight.detach().numpy()
    packed = gguf.quantize(embedding, gguf.GGMLQuantizationType[kind])
    wanted = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(tensors["token_embd.weight"][1].reshape(wanted.shape), wanted)
    ids = torch.arange(9)[None]
    off = load(path, dtype=torch.float32)(ids).logits - model(ids).logits
    assert 0 < off.abs().max() < 0.3 * model(ids).logits.std()


def test_q8_0_is_the_packages_bit_for_bit(tmp_path):
    from kizzasi.models.checkpoints.gguf.writer import encode

    values = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    values[3] = 0
    values[5, :32] = np.arange(32) * 0.5  # halves
    wanted = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(encode(torch.from_numpy(values), "Q8_0"), wanted.reshape(-1))


def test_what_goes_along(tmp_path):
    """Tokenizer, ids, template, longest document: to GGUF and back to transformers."""
    make_peer("llama", PEERS["llama"] | IDS | {"max_position_embeddings": 4096}, tmp_path / "a")
    tokenizer().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    for source, to in (("a", "b.gguf"), ("b.gguf", "c")):
        command = ["convert", str(tmp_path / source), str(tmp_path / to)]
        assert main([*command, "--to", "gguf" if to.endswith("gguf") else "llama"]) == 0
    metadata, _ = read(tmp_path / "b.gguf")
    assert metadata["tokenizer.ggml.eos_token_id"] == 1
    assert metadata["tokenizer.ggml.eot_token_id"] == 7
    assert metadata["llama.context_length"] == 4096
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    along = [companions_of(tmp_path / name) for name in ("a", "c")]
    assert along[0].generation == along[1].generation
    words = [transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("a", "c")]
    for text in ("the cat sat on 42 mats", "</s> naïve"):
        assert words[0].encode(text) == words[1].encode(text)
    chat = [{"role": "user", "content": "hi"}]
    texts = {w.apply_chat_template(chat, tokenize=False) for w in words}
    assert len(texts) == 1
    assert words[0].special_tokens_map == words[1].special_tokens_map


def test_llama3s_positions_become_divisors(tmp_path):
    scaling = {
        **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    }
    make_peer("llama", PEERS["llama"] | {"rope_parameters": scaling}, tmp_path / "a")
    model = load(tmp_path / "a")
    save(model, tmp_path / "a.gguf", "gguf")
    _, tensors = read(tmp_path / "a.gguf")
    assert tensors["rope_freqs.weight"][1].max() > 7
    ids = torch.arange(40)[None]
    assert (load(tmp_path / "a.gguf")(ids).logits - model(ids).logits).abs().max() <= 1e-4


def test_refusals(tmp_path):
    model = build_model(LLAMA)
    save(model, tmp_path / "a.gguf", "gguf")
    with pytest.raises(CheckpointError, match=r"is there already; .*overwrite=True"):
        save(model, tmp_path / "a.gguf", "gguf")
    save(model, tmp_path / "a.gguf", "gguf", overwrite=True)
    with pytest.raises(CheckpointError, match="one file; give a name that ends in"):
        save(model, tmp_path / "a", "gguf")
    with pytest.raises(CheckpointError, match=r"rwkv6, and the format knows attention, rwkv7"):
        save(build_model(RWKV6), tmp_path / "b.gguf", "gguf")
    block = model.spec.blocks[0]
    for change, message in (({"window": 3}, r"mixer\.window is 3"), ({"softcap": 2.0}, "softcap")):
        mixer = AttentionSpec(4, **change)
        odd = model.spec.replace(blocks=(type(block)(mixer, block.channel),))
        with pytest.raises(CheckpointError, match=message):
            save(build_model(odd), tmp_path / "c.gguf", "gguf")
    folder = tmp_path / "words"
    model.save_pretrained(folder)
    data = json.loads(tokenizer()._tokenizer.to_str())
    data["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"pre_tokenizer or normalizer is not .*without"):
        save(model, tmp_path / "d.gguf", "gguf", like=folder)
    assert not {"b.gguf", "c.gguf", "d.gguf"} & {path.name for path in tmp_path.iterdir()}


def written(path, name, tensors, **numbers):
    writer = gguf.GGUFWriter(path, name)
    for key, value in numbers.items():
        getattr(writer, f"add_{key}")(value)
    for key, values in tensors.items():
        writer.add_tensor(key, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


RWKV = {
    "emb": "token_embd",
    "head": "output",
    "ln_out": "output_norm",
    "blocks.0.ln0": "token_embd_norm",
}
PARTS = {
    **{"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln"},
    **{f"att.{x}": f"time_mix_{x}" for x in ("receptance", "key", "value", "gate", "output")},
    **{f"ffn.{x}": f"channel_mix_{x}" for x in ("receptance", "key", "value")},
    **{"att.time_maa_x": "time_mix_lerp_x", "att.time_decay": "time_mix_decay"},
    **{"att.time_faaaa": "time_mix_first", "ffn.x_k": "channel_mix_lerp_k"},
    **{f"ffn.time_maa_{x}": f"channel_mix_lerp_{x}" for x in "kr"},
    **{f"att.time_maa_w{i}": f"time_mix_w{i}" for i in (1, 2)},
    **{f"att.time_decay_w{i}": f"time_mix_decay_w{i}" for i in (1, 2)},
    **{f"att.{x}{i}": f"time_mix_{x}{i}" for x in "wavg" for i in range(3)},
    **{f"att.{x}": f"time_mix_{x}" for x in ("k_k", "k_a", "r_k")},
}


def as_llama_cpp(tensors, n_layers, shares, rescale=0):
    """RWKV-LM's tensors as llama.cpp's converter puts them."""
    found = {}
    for i in range(n_layers):
        fused = [tensors[f"blocks.{i}.att.{x}"].reshape(1, 1, -1) for x in shares]
        found[f"blk.{i}.time_mix_lerp_fused.weight"] = np.stack(fused)
    for name, values in tensors.items():
        stem, leaf = name.rsplit(".", 1)
        if stem in RWKV:
            found[f"{RWKV[stem]}.{leaf}"] = values
            continue
        _, index, part = name.split(".", 2)
        if part.removeprefix("att.") in shares:
            continue
        stem = part.removesuffix(f".{leaf}") if part.endswith((".weight", ".bias")) else part
        leaf = leaf if stem != part else "weight"
        low_rank = stem[-1] in "12" and stem not in ("ln1", "ln2")
        values = values.swapaxes(-1, -2) if low_rank else values.squeeze()
        values = values.reshape(-1) if stem == "att.r_k" else values
        if rescale and stem in ("att.output", "ffn.value"):
            values = values / 2 ** (int(index) // rescale)
        found[f"blk.{index}.{PARTS[stem]}.{leaf}"] = values
    return found


@pytest.mark.parametrize("version", [6, 7])
def test_rwkv_as_llama_cpp_writes_it(tmp_path, version):
    spec = RWKV6 if version == 6 else presets.rwkv7(32, 3, 40, 8)
    model = random(build_model(spec, seed=2))
    save(model, tmp_path, "rwkv_pth")
    stored = torch.load(tmp_path / "model.pth")
    tensors = {name: t.float().numpy() for name, t in stored.items()}
    shares = [f"time_maa_{x}" for x in "wkvrg"] if version == 6 else [f"x_{x}" for x in "rwkvag"]
    found = as_llama_cpp(tensors, 3, shares, rescale=2 if version == 6 else 0)
    numbers = {
        **{"context_length": 2**20, "embedding_length": 32, "block_count": 3, "head_count": 0},
        **{"layer_norm_eps": 1e-5, "wkv_head_size": 8},
        "feed_forward_length": found["blk.0.channel_mix_key.weight"].shape[0],
    }
    if version == 6:
        numbers |= {"rescale_every_n_layers": 2, "time_mix_extra_dim": 32}
        numbers["time_decay_extra_dim"] = 64
    else:
        names = ("decay_lora_rank", "iclr_lora_rank", "value_residual_mix_lora_rank")
        ranks = model.spec.blocks[1].mixer.ranks(32)
        numbers |= dict(zip((*names, "gate_lora_rank"), (ranks[x] for x in "wavg"), strict=True))
        twins = {f"blk.0.time_mix_v{i}.weight": f"blk.0.time_mix_a{i}.weight" for i in range(3)}
        found |= {name: found[twin] for name, twin in twins.items()}
    again = load(written(tmp_path / "a.gguf", f"rwkv{version}", found, **numbers))
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(again(ids).logits, model(ids).logits)
    if version == 7:  # and ours is the same
        save(model, tmp_path / "b.gguf", "gguf")
        ours = read(tmp_path / "b.gguf")[1]
        assert ours.keys() == found.keys()
        for name, (_, values) in ours.items():
            np.testing.assert_array_equal(values.reshape(found[name].shape), found[name])


def test_jamba_as_llama_cpp_writes_it(tmp_path):
    sizes = {
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_state": 4},
        **{"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "num_experts": 3, "mamba_dt_rank": 3},
    }
    peer = make_peer("jamba", sizes, tmp_path / "theirs")
    flat = {"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm"}
    flat["lm_head"] = "output"
    parts = {
        **{"input_layernorm": "attn_norm", "pre_ff_layernorm": "ffn_norm"},
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        **{"self_attn.o_proj": "attn_output", "feed_forward.router": "ffn_gate_inp"},
        **{f"mamba.{x}_proj": f"ssm_{x}" for x in ("in", "x", "dt", "out")},
        **{f"mamba.{x}_layernorm": f"ssm_{x}_norm" for x in ("dt", "b", "c")},
        **{f"feed_forward.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
        **{"mamba.conv1d": "ssm_conv1d"},
    }
    found = {}
    for name, tensor in peer.state_dict().items():
        values, (stem, leaf) = tensor.numpy(), name.rsplit(".", 1)
        if stem in flat:
            found[f"{flat[stem]}.{leaf}"] = values
            continue
        _, _, i, part = name.split(".", 3)
        if part in ("mamba.A_log", "mamba.D"):
            found[f"blk.{i}.ssm_{part[6].lower()}"] = -np.exp(values) if "A" in part else values
        elif part == "feed_forward.experts.gate_up_proj":
            gates, ups = np.split(values, 2, axis=1)
            found |= {f"blk.{i}.ffn_gate_exps.weight": gates, f"blk.{i}.ffn_up_exps.weight": ups}
        elif part == "feed_forward.experts.down_proj":
            found[f"blk.{i}.ffn_down_exps.weight"] = values
        else:
            values = values.squeeze() if "conv1d" in part else values
            found[f"blk.{i}.{parts[part.rsplit('.', 1)[0]]}.{leaf}"] = values
    numbers = {
        **{"context_length": 64, "embedding_length": 16, "block_count": 4, "head_count": 4},
        **{"feed_forward_length": 24, "head_count_kv": [0, 2, 0, 0], "ssm_conv_kernel": 4},
        **{"ssm_inner_size": 32, "ssm_state_size": 4, "ssm_time_step_rank": 3},
        **{"layer_norm_rms_eps": 1e-6, "expert_count": 3, "expert_used_count": 2},
    }
    model = load(written(tmp_path / "a.gguf", "jamba", found, **numbers))
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert (model(ids).logits - peer(ids).logits).abs().max() <= 1e-4
    numbers["head_count_kv"] = [0, 2]
    with pytest.raises(CheckpointError, match=r"head_count_kv: 2 numbers, not one for each"):
        load(written(tmp_path / "b.gguf", "jamba", found, **numbers))


def test_ranks_that_lie_are_refused(tmp_path):
    model = build_model(presets.rwkv7(32, 2, 40, 8))
    save(model, tmp_path / "a.gguf", "gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    key = b"rwkv7.attention.gate_lora_rank"
    at = data.index(key) + len(key) + 4
    (tmp_path / "b.gguf").write_bytes(data[:at] + b"\x21" + data[at + 1 :])
    with pytest.raises(CheckpointError, match="gate_lora_rank: 33 is not supported; only 32"):
        load(tmp_path / "b.gguf")
    assert isinstance(load(tmp_path / "a.gguf").spec.blocks[0].mixer, RWKV7Spec)


WORLD = {1: b"\x00", 5: b"a", 6: b"the", 7: b" the", 8: "\u00ef".encode(), 9: b"'", 10: b"\n\n"}
WORLD |= {20 + i: bytes([i]) for i in range(32, 127) if i not in (39, 97)}


def world_folder(folder):
    lines = []
    for i, token in WORLD.items():
        text = repr(token.decode()) if token.isascii() else repr(token)
        lines.append(f"{i} {text} {len(token)}")
    build_model(presets.rwkv7(32, 2, 160, 8), seed=1).save_pretrained(folder)
    (folder / "rwkv_vocab_v20230424.txt").write_text("\n".join(lines))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "bos_token_id": 0}')
    config = json.loads((folder / "config.json").read_text())
    config["generation"] = {"eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_rwkvs_vocabulary_goes_along(tmp_path, capsys):
    """The longest token that fits is taken; GGUF holds literals without their quotes."""
    folder = world_folder(tmp_path / "a")
    ours = load_tokenizer(folder, 160)
    assert ours.encode("a the the'na\u00efve\n\n")[:5] == [5, 7, 7, 9, 130]
    assert ours.decode(ours.encode("a the\u00ef\n\n'")) == "a the\u00ef\n\n'"
    assert ours.eos == 0
    with pytest.raises(CheckpointError, match="has id 146, and the model 100"):
        load_tokenizer(folder, 100)
    with pytest.raises(DataError, match="no token for"):
        ours.encode("\u6f22")
    path = tmp_path / "a.gguf"
    assert main(["convert", str(folder), str(path), "--to", "gguf"]) == 0
    assert main(["convert", str(path), str(tmp_path / "b")]) == 0
    metadata, _ = read(path)
    assert metadata["tokenizer.ggml.model"] == "rwkv"
    assert metadata["tokenizer.ggml.tokens"][:11] == [
        *("<s>", "\\x00", "[PAD2]", "[PAD3]", "[PAD4]", "a", "the", " the"),
        *("\\xc3\\xaf", "'", "\\n\\n"),
    ]
    for again in (load_tokenizer(path, 160), load_tokenizer(tmp_path / "b", 160)):
        assert again.encode("the 'the\u00ef'") == ours.encode("the 'the\u00ef'")
        assert again.eos == 0
    assert main(["generate", str(path), "--prompt", "the", "--tokens", "3"]) == 0


LIES = ["5 'a' 1\n6 'a' 1", "5 '' 0", "5 'a' 2", "x 'a' 1", "5 open('x') 1", "5 'a'", "5 ((( 1"]


@pytest.mark.parametrize("line", LIES)
def test_vocabularies_that_lie_are_refused(tmp_path, line):
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text(line)
    with pytest.raises(CheckpointError, match=r"not a vocabulary|empty or there twice"):
        load_tokenizer(tmp_path, 160)
