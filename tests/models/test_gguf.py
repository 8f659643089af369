"""GGUF: numbers equal the package gguf's, models equal transformers', and no file does harm."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

gguf = pytest.importorskip("gguf", reason="the oracle is the package gguf")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

from kizzasi.cli import main  # noqa: E402
from kizzasi.cli.generate import Text  # noqa: E402
from kizzasi.errors import CheckpointError, DataError  # noqa: E402
from kizzasi.models import load  # noqa: E402
from kizzasi.models.checkpoints import spec_of  # noqa: E402
from kizzasi.models.checkpoints.gguf.blocks import TYPES, dequantize  # noqa: E402
from kizzasi.models.checkpoints.gguf.container import open_gguf  # noqa: E402
from kizzasi.models.checkpoints.quantized import LevelTensor, QuantizedHead, QuantizedLinear  # noqa: E402
from kizzasi.models.checkpoints.tokenizers import ByteTokenizer, load_tokenizer  # noqa: E402

QUANTIZED = {code: kind for code, kind in TYPES.items() if kind.unpack is not None}
Kind = gguf.GGMLQuantizationType
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 288,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def tiny(family="Llama", **changes):
    """A random model of transformers."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def theirs_to_gguf(name):
    flat = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, leaf = name.rsplit(".", 1)
    if stem in flat:
        return f"{flat[stem]}.{leaf}"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{LAYER[part]}.{leaf}"


def write(path, model, kind=Kind.F32, extra=(), metadata=(), pre="smollm"):
    """The model as llama.cpp's converter writes it; matrices of the given type."""
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(SIZES["head_dim"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(64)
    writer.add_rope_freq_base(1e4)
    byte_tokens = [chr(c) for c in byte_alphabet()]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    merges = ["t h", "th e", "Ġ the"]
    tokens = ["<|end|>", *byte_tokens, *(m.replace(" ", "") for m in merges)]
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    for name, value in metadata:
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    tied = config.tie_word_embeddings
    tensors = {
        n: t for n, t in model.state_dict().items() if not (tied and n.startswith("lm_head"))
    }
    for name, tensor in tensors.items():
        values = tensor.numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        if arch == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            shape = values.shape
            values = values.reshape(heads[name.split(".")[-2][0]], 2, -1, *shape[1:])
            values = values.swapaxes(1, 2).reshape(shape)
        if values.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(theirs_to_gguf(name), values)
        else:
            packed = gguf.quantize(values, kind)
            writer.add_tensor(theirs_to_gguf(name), packed, raw_dtype=kind)
    for name, values in extra:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_alphabet():
    """GPT-2's printable stand-ins of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return plain + [256 + i for i in range(256 - len(plain))]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny(), Kind.Q4_1)


@pytest.mark.parametrize("code", QUANTIZED)
def test_any_bytes_dequantize_like_the_package(code):
    kind, raw = QUANTIZED[code], np.random.default_rng(code)
    raw = raw.integers(0, 256, (96, kind.layout.itemsize), dtype=np.uint8)
    assert (kind.values, kind.layout.itemsize) == gguf.GGML_QUANT_SIZES[code]
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw, Kind(code)).ravel()
    np.testing.assert_array_equal(dequantize(kind, raw.reshape(-1)), wanted)


def test_every_type_that_the_package_reads_is_read():
    """But for Q8_1 and Q8_K, which no file has, and integers, which are no weights."""
    readable = {kind.value for kind in gguf.quants._type_traits}
    assert readable <= QUANTIZED.keys() | {Kind.F32, Kind.F16, Kind.BF16}
    assert len(QUANTIZED) == 23


def test_float64(tmp_path):
    values = np.random.default_rng(0).normal(size=(7,))
    given = dequantize(TYPES[Kind.F64.value], values.view(np.uint8))
    np.testing.assert_array_equal(given, values.astype(np.float32))


@pytest.mark.parametrize("kind", ["Q5_K", "IQ4_NL", "IQ3_S", "IQ2_XXS", "IQ1_S", "MXFP4"])
def test_types_with_groups_of_32_stay_small_in_quantized_layers(kind):
    """The kernel's weights are the file's, but for the rounding of scales."""
    block, chance = TYPES[Kind[kind].value], np.random.default_rng(5)
    raw = chance.integers(0, 256, (48 * 512 // block.values, block.layout.itemsize), np.uint8)
    blocks = raw.view(block.layout).reshape(-1)
    for name in ("d", "d_min"):
        if name in blocks.dtype.names:
            blocks[name] = chance.normal(size=len(blocks)).astype(np.float16)
    if kind == "MXFP4":
        blocks["e"] = 120 + blocks["e"] % 10
    found = block.unpack(blocks)
    parts = (None if p is None else torch.tensor(p).view(48, -1, p.shape[-1]) for p in found)
    full = torch.from_numpy(dequantize(block, raw.reshape(-1))).view(48, 512)
    x = torch.randn(3, 512).bfloat16().float()
    wanted = F.linear(x, full)
    off = (QuantizedLinear(LevelTensor(*parts))(x) - wanted).norm(dim=1)
    assert (off < 2**-6 * full.norm(dim=1).max() * x.norm(dim=1)).all()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_tensors_dequantize_like_the_package(name):
    values = np.random.default_rng(1).normal(size=(48, 96)).astype(np.float32)
    packed = gguf.quantize(values, Kind[name])
    ours = dequantize(TYPES[Kind[name].value], packed.reshape(-1).view(np.uint8))
    np.testing.assert_array_equal(ours, gguf.dequantize(packed, Kind[name]).ravel())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_logits_equal_the_original(tmp_path, family, tied):
    original = tiny(family, tie_word_embeddings=tied)
    model = load(write(tmp_path / "model.gguf", original))
    assert model.spec.tie_head == tied
    ids = torch.arange(20).view(2, 10) * 13 % 288
    with torch.no_grad():
        assert_close(model(ids).logits, original(ids).logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_smaller_types(tmp_path, kind):
    original = tiny()
    path = write(tmp_path / "model.gguf", original, Kind[kind])
    stored = {"F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}[kind]
    assert load(path).stem.embedding.weight.dtype == stored
    weight = load(path, dtype=torch.float32).blocks[1].mixer.q_proj.weight
    wanted = original.model.layers[1].self_attn.q_proj.weight
    assert 0 < (weight - wanted).abs().max() < 1e-3


def test_divided_frequencies_are_llama3s(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    original = tiny(rope_parameters=scaling, max_position_embeddings=256)
    plain = 1e4 ** (-np.arange(0, 16, 2) / 16)
    stretched = original.model.rotary_emb.inv_freq.numpy()
    divisors = (plain / stretched).astype(np.float32)
    assert divisors.max() > 7
    path = write(tmp_path / "model.gguf", original, extra=[("rope_freqs.weight", divisors)])
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert_close(load(path)(ids).logits, original(ids).logits)


def levels(kind, n=48, k=96):
    values = np.random.default_rng(2).normal(size=(n, k)).astype(np.float32)
    block = TYPES[kind.value]
    data = gguf.quantize(values, kind).reshape(-1).view(np.uint8)
    found = block.unpack(data.view(block.layout))
    parts = (None if p is None else torch.tensor(p).view(n, -1, p.shape[-1]) for p in found)
    return LevelTensor(*parts), torch.from_numpy(dequantize(block, data)).view(n, k)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_quantized_layer_is_the_dequantized_one_but_for_rounding(kind):
    weight, full = levels(kind)
    layer = QuantizedLinear(weight, torch.ones(48))
    x = torch.randn(2, 3, 96).bfloat16().float()
    wanted = F.linear(x, full, torch.ones(48))
    scale = full.norm(dim=1) * x.norm(dim=-1, keepdim=True)
    assert ((layer(x) - wanted).abs() < 2**-8 * scale).all()
    # With scales that bfloat16 holds, the weights are exact and only the output is rounded.
    level, scale, minimum = weight
    scale = scale.bfloat16().float()
    minimum = None if minimum is None else -8 * scale
    exact = level * scale if minimum is None else level * scale + minimum
    y = QuantizedLinear(LevelTensor(level, scale, minimum))(x)
    wanted = F.linear(x, exact.flatten(1))
    assert ((y - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()


def test_quantized_model(file, tmp_path):
    full, small = load(file), load(file, quantized=True)
    parts = {type(m) for m in small.modules()}
    assert parts >= {QuantizedLinear, QuantizedHead}
    assert not any(isinstance(m, torch.nn.Linear) for m in small.modules())
    assert not any(p.requires_grad for p in small.parameters())
    assert "bits=4" in repr(small)
    ids = torch.arange(40).view(2, 20) * 7 % 288
    with torch.inference_mode():
        wanted, given = full(ids).logits, small(ids).logits
        assert (wanted - given).norm() < 0.02 * wanted.norm()
        state = small(ids[:, :-1]).state
        step = small.step(ids[:, -1], state).logits
        assert (wanted[:, -1] - step).norm() < 0.02 * wanted[:, -1].norm()
        low = small.to(torch.bfloat16)(ids).logits.float()
        assert (wanted - low).norm() < 0.05 * wanted.norm()
    with pytest.raises(CheckpointError, match="quantized weights are not saved"):
        small.save_pretrained(tmp_path)


def test_head_is_exact_where_it_counts():
    weight, full = levels(Kind.Q8_0, n=288)
    head = QuantizedHead(torch.nn.Parameter(full), weight)
    x = torch.randn(3, 96)
    wanted = F.linear(x, full)
    best = wanted.topk(32).indices
    assert_close(head(x).gather(1, best), wanted.gather(1, best))
    assert not torch.equal(head(x), wanted)
    many = torch.randn(9, 96)
    assert_close(head(many), F.linear(many, full))


def test_quantized_is_refused_where_it_cannot_be(file, tmp_path):
    load(file).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="only GGUF files"):
        load(tmp_path, quantized=True)


def edited(file, tmp_path, at, replacement):
    data = bytearray(file.read_bytes())
    at = data.index(at) + len(at) if isinstance(at, bytes) else at
    data[at : at + len(replacement)] = replacement
    (tmp_path / "bad.gguf").write_bytes(data)
    return tmp_path / "bad.gguf"


@pytest.mark.parametrize(
    ("at", "replacement", "message"),
    [
        (4, struct.pack("<I", 1), "of version 1; only"),
        (4, struct.pack(">I", 3), "big-endian; only"),
        (8, struct.pack("<Q", 2**60), "tensors: 1152921504606846976 of at least 24 bytes"),
        (16, struct.pack("<Q", 2**63), "keys: .* truncated or damaged"),
        (24, struct.pack("<Q", 2**64 - 1), "the name of a key: 18446744073709551615"),
        (b"general.architecture", struct.pack("<I", 77), "general.architecture: unknown type 77"),
        (b"general.architecture", struct.pack("<IQ", 8, 2**40), "general.architecture: 10995116"),
        (b"tokenizer.ggml.tokens", struct.pack("<II", 9, 9), "an array of type 9; only numbers"),
        (b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 2**50), "tokens: 1125899906842624 of"),
        (b"tokenizer.ggml.token_type", struct.pack("<IIQ", 9, 5, 2**61), "of at least 4 bytes"),
        (b"llama.attention.head_count", struct.pack("<II", 4, 0), "n_heads"),
        (b"llama.attention.head_count", struct.pack("<II", 4, 2**32 - 1), "n_heads|not"),
        (b"llama.block_count", struct.pack("<II", 4, 2**31), "num_hidden_layers"),
        (b"llama.embedding_length", struct.pack("<II", 4, 2**31), "does not fit|need|not"),
        (b"blk.0.attn_q.weight", struct.pack("<I", 5), "5 dimensions; 1 to 4 are possible"),
        (b"blk.0.attn_q.weight", struct.pack("<IQ", 2, 33), "does not make blocks of 32 values"),
        (b"blk.0.attn_q.weight", struct.pack("<IQQ", 2, 2**62, 2**62), "truncated or damaged"),
        (b"blk.0.attn_q.weight", struct.pack("<IQQI", 2, 64, 64, 99), "type 99 is not supported"),
        (b"blk.0.attn_q.weight", struct.pack("<IQQIQ", 2, 64, 64, 3, 8), "misaligned or overlaps"),
        (b"blk.0.attn_q.weight", struct.pack("<IQQIQ", 2, 64, 64, 3, 0), "misaligned or overlaps"),
        (b"blk.0.attn_q.weight", struct.pack("<IQQIQ", 2, 64, 64, 3, 2**40), "truncated"),
    ],
)
def test_hostile_files_are_named(file, tmp_path, at, replacement, message):
    with pytest.raises(CheckpointError, match=message):
        load(edited(file, tmp_path, at, replacement))


def test_a_spec_is_told_of_a_file_alone_that_has_its_tensors(file, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        spec_of(tmp_path / "cut.gguf")
    extra = write(tmp_path / "c.gguf", tiny(), extra=[("odd.weight", np.ones(3, np.float32))])
    with pytest.raises(CheckpointError, match=r"unexpected odd\.weight"):
        spec_of(extra)


def test_other_architectures_and_keys_are_refused(file, tmp_path):
    other = edited(file, tmp_path, b"general.architecture", struct.pack("<IQ5s", 8, 5, b"gemma"))
    with pytest.raises(CheckpointError, match="architecture 'gemma' is not supported; only llama"):
        load(other)
    model = tiny()
    unknown = write(tmp_path / "a.gguf", model, metadata=[("llama.attention.sink", 3)])
    with pytest.raises(CheckpointError, match=r"llama\.attention\.sink: 3 is unknown here"):
        load(unknown)
    stretched = write(tmp_path / "b.gguf", model, metadata=[("llama.rope.scaling.type", "yarn")])
    with pytest.raises(CheckpointError, match="'yarn' is not supported; only none and linear"):
        load(stretched)
    extra = write(tmp_path / "c.gguf", model, extra=[("blk.0.odd.weight", np.ones(3, np.float32))])
    with pytest.raises(CheckpointError, match=r"unexpected blk\.0\.odd\.weight"):
        load(extra)


def test_damage_is_a_checkpoint_error_and_costs_little(file, tmp_path):
    whole, rng = file.read_bytes(), np.random.default_rng(3)
    header = whole.index(b"output_norm.weight") + 40
    path, refused = tmp_path / "damaged.gguf", 0
    tracemalloc.start()
    for trial in range(30):
        data = bytearray(whole)
        if trial % 5 == 0:
            del data[int(rng.integers(len(data))) :]
        else:
            at, size = int(rng.integers(header)), int(rng.choice([1, 1, 2, 4, 8]))
            odd = rng.integers(0, 256, size) if trial % 2 else rng.choice([0, 255], size)
            data[at : at + size] = odd.astype(np.uint8).tobytes()
        path.write_bytes(data)
        try:
            load(path, quantized=trial % 3 == 0)
            load_tokenizer(path, 288)
        except CheckpointError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 5 < refused < 30
    assert peak < 20 * len(whole)


def test_tokenizer_of_the_file(file):
    tokenizer = load_tokenizer(file, 288)
    for text in ("the cat in the hat", "12  + 34\n", "naïve 漢字"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    the = tokenizer.encode(" the")
    assert len(the) == 1
    assert tokenizer.encode("<|end|>") == [tokenizer.eos] == [0]
    assert tokenizer.decode([0, *the]) == " the"
    assert len(tokenizer.encode("12")) == 2


WORDS = ("I'VE 12345 cats,\r\n  and  naïve 漢字!", "don't (stop) a\u0301 42", "\t x  \n\n y  ")


def test_qwens_tokenizer_is_that_of_transformers(tmp_path):
    model = tiny("Qwen2")
    path = write(tmp_path / "a.gguf", model, metadata=[], pre="qwen2")
    ours = load_tokenizer(path, 288)
    metadata = open_gguf(path).metadata
    tokens, merges = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    theirs = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        unk_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
    )
    for text in WORDS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_llama3s_tokenizer_takes_three_digits_at_once_and_keeps_whole_words(tmp_path):
    path = write(tmp_path / "a.gguf", tiny(), pre="llama-bpe")
    ours = load_tokenizer(path, 288)
    pieces = ours.inner.pre_tokenizer.pre_tokenize_str("I'VE 12345 cats,\r\n  and")
    words = [piece.replace("Ġ", " ").replace("č", "\r").replace("Ċ", "\n") for piece, _ in pieces]
    assert words == ["I", "'VE", " ", "123", "45", " cats", ",\r\n", " ", " and"]
    for text in WORDS:
        assert ours.decode(ours.encode(text)) == text
    inner = ours.inner.model
    assert inner.ignore_merges


def test_tokenizer_refusals(file, tmp_path):
    with pytest.raises(CheckpointError, match="that splits text like 'smolxx' is not supported"):
        load_tokenizer(edited(file, tmp_path, b"smol", b"xx"), 288)
    numbers = struct.pack("<IIQ", 9, 0, 37)  # the bytes that the three texts took
    with pytest.raises(CheckpointError, match="merges: expected texts"):
        load_tokenizer(edited(file, tmp_path, b"tokenizer.ggml.merges", numbers), 288)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json there"):
        load_tokenizer(tmp_path, 49152)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path, 49152)
    with pytest.raises(DataError, match="beyond the vocabulary of 100"):
        ByteTokenizer(100).encode("naïve")


def test_text_grows_by_whole_characters_and_ends_before_a_stop():
    text = Text(ByteTokenizer(256).decode, b"So ", ["END", "\n\n"])
    pieces = [text.add(byte) for byte in "naïve E.N\nfin\n\nmore".encode()]
    assert pieces[2:4] == ["", "ï"]
    assert pieces[6] == " "
    assert pieces[7:9] == ["", "E."]
    assert "".join(pieces) + text.finish() == "naïve E.N\nfin"


def test_the_program_speaks_the_files_language(file, capsys):
    options = ["--prompt", "the", "--tokens", "5", "--temperature", "0"]
    assert main(["generate", str(file), *options]) == 0
    streamed = capsys.readouterr().out
    assert main(["generate", str(file), *options, "--beams", "1", "--json"]) == 0
    assert f'"text": "{streamed[:3]}' in capsys.readouterr().out
    assert main(["generate", str(file), *options, "--beams", "2", "--quantized"]) == 0
    assert capsys.readouterr().out.startswith("the")
