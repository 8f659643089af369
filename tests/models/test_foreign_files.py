"""Files of foreign checkpoints: every layout read, every damaged or hostile one refused by name."""

import contextlib
import json
import pickle
import random
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from kizzasi.cli import main
from kizzasi.errors import CheckpointError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.checkpoints import save
from kizzasi.models.mixers import AttentionSpec

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK = BlockSpec(AttentionSpec(4, 2, head_dim=4), SwiGLUSpec(24))


@pytest.fixture
def folder(tmp_path):
    save(build_model(ModelSpec(16, (BLOCK,) * 2, Tokens(11)), seed=1), tmp_path / "in", "llama")
    return tmp_path / "in"


@pytest.fixture
def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def expected(folder):
    return load(folder).state_dict()


def tie(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def shard(folder, tensors, name, write):
    """Two shards and their index, in place of the single file."""
    (folder / "model.safetensors").unlink()
    stem, _, suffix = name.partition(".")
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    parts = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for file, part in zip(files, parts, strict=True):
        write(part, folder / file)
    places = {key: file for file, part in zip(files, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return places, folder / f"{name}.index.json"


def assert_same(folder, expected):
    actual = load(folder).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "write"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)]
)
def test_shards(folder, tensors, expected, name, write):
    places, index = shard(folder, tensors, name, write)
    assert_same(folder, expected)
    for change, message in (
        ({EMBEDDING: "../in/x.bin"}, "not the plain name of a file"),
        ({EMBEDDING: "/etc/passwd"}, "not the plain name of a file"),
        ({EMBEDDING: "..\\x.bin"}, "not the plain name of a file"),
        ({EMBEDDING: ".."}, "cannot read it|not the plain name"),
        ({EMBEDDING: "none.bin"}, r"none\.bin: .*cannot read it|not both"),
        ({EMBEDDING: 3}, "3: .*cannot read it"),
        ({"ghost": places[EMBEDDING]}, "ghost is listed or stored in .* but not both"),
    ):
        index.write_text(json.dumps({"weight_map": {**places, **change}}))
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    for text in ("[]", "{", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            load(folder)


def test_a_whole_torch_file_with_shared_and_transposed_tensors(folder, tensors, expected):
    (folder / "model.safetensors").unlink()
    views = {name: t.mT.contiguous().mT if t.ndim == 2 else t for name, t in tensors.items()}
    torch.save(views, folder / "pytorch_model.bin")
    assert_same(folder, expected)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors, pytorch_model\.bin"):
        load(folder)


def test_tied_heads_may_be_absent_or_equal(folder, tensors):
    tie(folder)
    with pytest.raises(CheckpointError, match=r"lm_head.* differs .* set tie_word_embeddings"):
        load(folder)
    del tensors[HEAD]
    save_file(tensors, folder / "model.safetensors")
    absent = load(folder)
    assert absent.stem.lm_head is None
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, HEAD: tensors[EMBEDDING]}, folder / "pytorch_model.bin")
    assert_same(folder, absent.state_dict())
    torch.save({**tensors, HEAD: tensors[EMBEDDING][1:]}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="lm_head"):
        load(folder)


def test_tensors_that_do_not_fit_are_named(folder, tensors):
    name = "model.layers.1.self_attn.q_proj.weight"
    for change, message in (
        ({name: None}, f"missing {name}"),
        ({"extra": torch.zeros(1)}, "unexpected extra"),
        ({name: torch.zeros(2, 3)}, rf"{name} is \(2, 3\), not \(16, 16\)"),
        ({name: torch.zeros(16, 16, dtype=torch.int8)}, f"{name} is not of float64"),
        ({name: torch.zeros(16, 16, dtype=torch.float8_e4m3fn)}, f"{name} is not of float64"),
    ):
        edited = {k: t for k, t in {**tensors, **change}.items() if t is not None}
        save_file(edited, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load(folder)


def test_rotary_buffers_of_old_files_are_no_weights(folder, tensors, expected):
    buffer = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    save_file(tensors | buffer, folder / "model.safetensors")
    assert_same(folder, expected)


def test_the_widest_of_several_dtypes_is_kept(folder, tensors):
    mixed = {name: t.bfloat16() for name, t in tensors.items()}
    norms = {name: t for name, t in tensors.items() if t.ndim == 1}
    save_file(mixed | norms, folder / "model.safetensors")
    assert load(folder).stem.embedding.weight.dtype == torch.bfloat16
    save_file(mixed | {HEAD: tensors[HEAD]}, folder / "model.safetensors")
    assert load(folder).stem.embedding.weight.dtype == torch.float32
    assert load(folder, dtype=torch.float64).stem.embedding.weight.dtype == torch.float64


def repack(path, edit=lambda data: data, compression=zipfile.ZIP_STORED):
    """Rewrite a file of torch.save with another pickle."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, edit(data) if name.endswith("data.pkl") else data)


class Bomb:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place), "w"))


def nested(around):
    """A pickle with a tuple of two equal tuples of two equal tuples ...: 2^40 parts to hash."""
    text = b"K\x01\x85q\x00"
    for i in range(40):
        text += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
    return b"\x80\x02" + around % text


def test_hostile_torch_files_are_refused_and_nothing_is_run(tmp_path, folder):
    (folder / "model.safetensors").unlink()
    path, huge = folder / "pytorch_model.bin", b"J" + struct.pack("<i", 10**9)

    def refused(message, data=None, edit=None, **options):
        if data is not None:
            torch.save(data, path, **options)
        if edit is not None:
            repack(path, edit)
        with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*{message}"):
            load(folder)

    four = {"a": torch.zeros(4)}
    refused("asks for .*open", {"a": Bomb(tmp_path / "boom")})
    refused("asks for .*Linear", torch.nn.Linear(2, 2))
    refused("asks for .*bytearray", {"a": bytearray(9)})
    refused("asks for", {"a": torch.eye(2).to_sparse()})
    refused("asks for", {"a": torch.zeros(2, device="meta")})
    refused("expected a dict of tensors, got list", [torch.zeros(2)])
    refused("'b' does not name a tensor", {"b": 3})
    refused("before 1.6", four, _use_new_zipfile_serialization=False)
    size = b"K\x04\x85"
    refused("more values than the file stores", four, lambda d: d.replace(size, huge + b"\x85"))
    stride = b"K\x01\x85"
    expand = [(size, huge + b"\x85"), (stride, b"K\x00\x85")]
    for old, new in expand:
        torch.save(four, path) if old == size else None
        repack(path, lambda data, old=old, new=new: data.replace(old, new))
    refused("more values than the file stores")
    torch.save(four, path)
    repack(path, compression=zipfile.ZIP_DEFLATED)
    refused("compressed")
    for name, at in (("name of a tensor", b"}%sK\x01s."), ("name of a tensor", b"}(%sK\x01u.")):
        torch.save(four, path)
        repack(path, lambda data, at=at: nested(at))
        refused(name)
    torch.save(four, path)
    repack(path, lambda data: data.replace(b"X\x01\x00\x00\x000", nested(b"%s")[2:]))
    refused("a storage called")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    refused("not one of torch.save")
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    refused("damaged")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files_are_refused_or_read(folder, tensors, name):
    """Cut and altered at random: never another error than CheckpointError."""
    path, chance = folder / name, random.Random(0)
    if name.endswith("bin"):
        (folder / "model.safetensors").unlink()
        torch.save(tensors, path)
    whole = path.read_bytes()
    for size in (0, 3, 10, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load(folder)
    for _ in range(60):
        altered = bytearray(whole)
        for _ in range(3):
            altered[chance.choice([-1, 1]) * chance.randrange(3000)] = chance.randrange(256)
        path.write_bytes(altered)
        with contextlib.suppress(CheckpointError):
            load(folder)


def test_single_files_without_a_config_are_told_by_their_names(folder):
    with pytest.raises(CheckpointError, match=r"unknown format: .* 21 tensors \(lm_head\.weight"):
        load(folder / "model.safetensors")


def test_convert(capsys, tmp_path, folder, expected):
    assert main(["convert", str(folder), str(tmp_path / "ours"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "kizzasi"
    assert result["params"] == load(folder).n_params
    assert_same(tmp_path / "ours", expected)
    back = ["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--format", "llama"]
    assert main(back) == 0
    assert "llama, 2 layers" in capsys.readouterr().out
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    for arguments, message in (
        ([folder, tmp_path / "x", "--format", "lama"], "did you mean llama"),
        ([folder, folder], "would replace the input"),
        ([folder, tmp_path / "x", "--format", "gpt2"], "cannot write it as gpt2"),
        ([tmp_path / "none", tmp_path / "x"], "no config.json"),
    ):
        assert main(["convert", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_unwritable_folder(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save(load(folder), tmp_path / "file" / "model", "llama")
