"""Tokenizer, special ids, longest document and generation settings go along, both ways."""

import json
import shutil

import numpy as np
import pytest
import torch

from kizzasi.cli import main
from kizzasi.errors import CheckpointError
from kizzasi.models import build_model, load, presets
from kizzasi.models.checkpoints import companions_of, save, spec_of
from kizzasi.models.checkpoints.tokenizers import load_tokenizer

transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
tokenizers = pytest.importorskip("tokenizers", reason="the tokenizer is of this package")

TEXT = ["the cat sat on the mat", "a dog and a cat", "where is the hat? on the mat!"] * 8
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LENGTH = {"max_position_embeddings": 8192}
PEERS = {
    "llama": SIZES | HEADS | LENGTH,
    "qwen3": SIZES | HEADS | LENGTH | {"head_dim": 8},
    "mamba2": SIZES | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8},
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def tokenizer():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=CHAT, model_max_length=512, **names
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, sizes in PEERS.items():
        torch.manual_seed(1)
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        config = transformers.AutoConfig.for_model(name, **sizes, **ids)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3 if p.ndim > 1 else 1)  # so that greedy text is not all one token
        model.generation_config = transformers.GenerationConfig(
            **{**ids, "eos_token_id": [1, 7]}, max_new_tokens=12, repetition_penalty=1.3
        )
        found[name] = tmp_path_factory.mktemp("companions") / name
        model.save_pretrained(found[name])
        tokenizer().save_pretrained(found[name])
    return found


def written_by(folder):
    """The text that transformers makes of a folder, and of its chat."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    out = model.generate(**words("the cat", return_tensors="pt"), do_sample=False)
    chat = words.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    return words.decode(out[0]), chat, model.generation_config.to_dict(), words.special_tokens_map


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", PEERS)
def test_the_folder_that_comes_back_writes_the_same_text(tmp_path, folders, name, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(folders[name]), str(ours), "--json"]) == 0
    assert "tokenizer.json" in json.loads(capsys.readouterr().out)["tokenizer"]
    assert main(["convert", str(ours), str(back), "--format", name]) == 0
    assert written_by(back) == written_by(folders[name])
    given, came = (json.loads((f / "config.json").read_text()) for f in (folders[name], back))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert came.get(key) in (given.get(key), [1, 7])
    assert load_tokenizer(ours, 300).eos == load_tokenizer(folders[name], 300).eos == [1, 7]
    assert spec_of(ours).digest == spec_of(back).digest == spec_of(folders[name]).digest


def test_our_own_program_is_prompted_in_the_models_words(tmp_path, folders, capsys):
    ours = str(tmp_path / "ours")
    options = ["--prompt", "the cat", "--tokens", "6", "--temperature", "0"]
    texts = []
    assert main(["convert", str(folders["llama"]), ours]) == 0
    for folder in (folders["llama"], ours):
        capsys.readouterr()
        assert main(["generate", str(folder), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("the cat")


def test_like_carries_them_past_a_training(tmp_path, folders):
    model = load(folders["llama"])
    save(model, tmp_path / "without")
    save(model, tmp_path / "with", like=folders["llama"])
    assert sorted(p.name for p in (tmp_path / "without").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert companions_of(tmp_path / "without") == ({}, {})
    along = companions_of(tmp_path / "with")
    assert along.generation["eos_token_id"] == [1, 7]
    assert along.generation["max_position_embeddings"] == 8192
    assert along.generation["config"]["repetition_penalty"] == 1.3
    assert along.files == companions_of(folders["llama"]).files


def test_formats_without_a_place_for_ids_get_the_files(tmp_path, folders):
    model = build_model(presets.rwkv7(32, 2, 300, 8))
    save(model, tmp_path / "a", "rwkv_pth", like=folders["llama"])
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"model.pth", "tokenizer.json", "generation_config.json"} <= names
    assert "config.json" not in names
    model = load(folders["mamba2"])
    save(model, tmp_path / "b", "mamba2", like=folders["llama"])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["eos_token_id"] == [1, 7]
    assert "max_position_embeddings" not in config


def test_convert_never_replaces_a_model_unasked(tmp_path, folders, capsys):
    out = str(tmp_path / "out")
    assert main(["convert", str(folders["llama"]), out, "--max-shard-size", "20KB"]) == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert main(["convert", str(folders["gpt2"]), out]) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert main(["convert", str(folders["gpt2"]), out, "--overwrite"]) == 0
    assert spec_of(tmp_path / "out") == spec_of(folders["gpt2"])
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_odd_companions_are_refused(tmp_path, folders):
    folder = shutil.copytree(folders["llama"], tmp_path / "odd")
    (folder / "vocab.txt").mkdir()
    with pytest.raises(CheckpointError, match=r"vocab\.txt: not a regular file"):
        companions_of(folder)
    save(load(folders["llama"]), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"generation": [1]}))
    with pytest.raises(CheckpointError, match=r"generation: .* is no object"):
        companions_of(tmp_path / "ours")


def test_training_further_takes_ids_of_the_tokenizer_and_refuses_bytes(folders, tmp_path, capsys):
    """Bytes as ids of a tokenizer would ruin the model without a word."""
    folder = next(iter(folders.values()))
    text = tmp_path / "text.txt"
    text.write_text("words and words, " * 200)
    out = tmp_path / "out"
    command = ["train", str(folder), "--steps", "1", "--seq-len", "8", "--batch-size", "1"]
    assert main([*command, "--data", str(text), "--out", str(out)]) == 2
    assert "ids of its tokenizer" in capsys.readouterr().err
    assert not out.exists()
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(4000, dtype=np.uint16) % 64)
    assert main([*command, "--data", str(ids), "--out", str(out)]) == 0
    assert "tokenizer.json" in companions_of(out).files
