"""Our own checkpoints: round trips, and every damaged or hostile file refused by name."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from kizzasi.errors import CheckpointError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load, load_state
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.mixers.attention import AttentionSpec


@pytest.fixture
def folder(tmp_path):
    block = BlockSpec(AttentionSpec(n_heads=2), MLPSpec())
    spec = ModelSpec(16, (block, block), Tokens(11), tie_head=True)
    build_model(spec, seed=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_keeps_bits_and_dtype(tmp_path, folder, dtype):
    model = load(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    first = (tmp_path / "again" / "model.safetensors").read_bytes()
    again.save_pretrained(tmp_path / "again", overwrite=True)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first


def test_saving_over_an_old_checkpoint_leaves_no_partial_files(folder):
    load(folder).save_pretrained(folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_missing_places(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"nowhere: no config\.json there"):
        load(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing or damaged"):
        load(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(folder)


def test_a_pickle_in_disguise_is_refused_and_never_run(tmp_path, folder):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)
    torch.save({"a": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)
    assert not (tmp_path / "boom").exists()


def test_a_header_that_asks_for_the_moon_allocates_nothing(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


def test_tensors_that_do_not_fit_are_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "blocks.0.mixer.q_proj.weight"
    for change, message in (
        ({name: None}, f"missing {name}"),
        ({"extra": torch.zeros(1)}, "unexpected extra"),
        ({name: torch.zeros(2, 3)}, rf"{name} is \(2, 3\), not \(16, 16\)"),
    ):
        edited = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(edited, path)
        with pytest.raises(CheckpointError, match=message):
            load(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("format"), "not a kizzasi checkpoint"),
        (lambda c: c.update(format="kizzasi/99"), "not a kizzasi checkpoint"),
        (lambda c: c["spec"].update(d_modle=1), "d_modle: unknown"),
        (lambda c: c["spec"].update(d_model=10**6), r"model\.safetensors: does not fit"),
        (lambda c: c["spec"].update(d_model=10**10), r"cannot fit its config: .* GiB"),
        (lambda c: c["spec"].update(d_model=15), r"blocks\[0\]"),
        (lambda c: c.pop("spec"), "d_model: missing"),
    ],
)
def test_configs_that_lie(folder, edit, message):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 10**6, "9" * 10**4])
def test_configs_that_are_not_json(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_unwritable_folder(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        load(folder).save_pretrained(tmp_path / "file" / "model")


def test_states_of_other_models_are_refused(tmp_path, folder):
    model = load(folder)
    state = model(torch.tensor([[1, 2]])).state
    state.save(tmp_path / "state.safetensors")
    shallow = build_model(model.spec.replace(blocks=model.spec.blocks[:1]))
    with pytest.raises(CheckpointError, match="a state of another model"):
        load_state(tmp_path / "state.safetensors", shallow.init_state(1))
    with pytest.raises(CheckpointError, match="cannot read the state"):
        load_state(tmp_path / "none", shallow.init_state(1))
