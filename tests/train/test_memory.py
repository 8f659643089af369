"""What a training is said to hold at least is no more than what it holds."""

import pytest
import torch

from kizzasi.cli import main
from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, presets
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.layers import DownsampleSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.train import memory
from kizzasi.train.bytes import load_corpus
from kizzasi.train.distributed import Ranks
from kizzasi.train.memory import require_memory, training_bytes
from kizzasi.train.recipe import Recipe
from kizzasi.train.trainer import Training

HEADS = BlockSpec(AttentionSpec(n_heads=2), SwiGLUSpec())
SPECS = {
    "attention": ModelSpec(16, (HEADS,) * 3, Tokens(256)),
    "mamba": ModelSpec(16, (BlockSpec(MambaSpec()),) * 3, Tokens(256)),
    "downsampled": ModelSpec(16, (HEADS, DownsampleSpec((HEADS,), 4)), Tokens(256)),
    "rwkv": presets.at_size("rwkv", 20_000, vocab_size=256),
}


@pytest.fixture
def task(tmp_path):
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 200)
    return load_corpus(tmp_path / "text")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", SPECS)
def test_a_training_holds_no_less_than_it_is_said_to(task, name, optimizer):
    from kizzasi.models import build_model

    recipe = Recipe(64, seq_len=32, batch_size=4, accumulate=2, optimizer=optimizer)
    model = build_model(SPECS[name])
    training = Training(model, task, recipe)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch = next(task.batches("train", 0, 0, training.shape))
        part = type(batch)(*(whole[:2] for whole in batch))
        task.loss(model(part.inputs), part)
    training.run(128)
    states = [v for state in training.optimizer.state.values() for v in state.values()]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [v for v in states if isinstance(v, torch.Tensor) and v.ndim]
    held = sum(t.numel() * t.element_size() for t in tensors)
    fixed, batch_bytes = training_bytes(SPECS[name], recipe)
    assert 0.7 * held < fixed <= held
    assert 0 < batch_bytes <= sum(kept.values())
    if optimizer == "adamw":
        assert fixed == held


def test_what_plainly_does_not_fit_is_refused_with_its_numbers(monkeypatch):
    spec = SPECS["attention"]
    recipe = Recipe(64, seq_len=128, batch_size=64, precision="fp32")
    need = sum(training_bytes(spec, recipe))
    assert need == 16 * spec.cost(1).params + 4 * 128 * 64 * (16 * 3 + 256)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need)
    require_memory(spec, recipe)
    with pytest.raises(SpecError, match=r"64 windows of 128; the limit allows .* batch_size"):
        require_memory(spec, recipe, limit=need - 1)
    with pytest.raises(SpecError, match=r"for weights, gradients and adamw.*smaller model"):
        require_memory(spec, recipe, limit=1000)


def test_processes_share_a_batch_and_the_memory_of_their_machine(monkeypatch):
    spec, recipe = SPECS["attention"], Recipe(64, seq_len=128, batch_size=64, precision="fp32")
    fixed, batch = training_bytes(spec, recipe)
    assert training_bytes(spec, recipe, Ranks(0, 4)) == (fixed, batch // 4)
    assert training_bytes(spec, recipe, Ranks(0, 4, "fsdp")) == (fixed // 4, batch // 4)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * fixed + batch - 1)
    require_memory(spec, recipe, ranks=Ranks(0, 4, "ddp", 2))
    require_memory(spec, recipe, ranks=Ranks(0, 4, "fsdp", 4))
    with pytest.raises(SpecError, match=r"cpu has free"):
        require_memory(spec, recipe, ranks=Ranks(0, 4, "ddp", 4))


def test_programs_refuse_before_the_first_step_and_leave_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    SPECS["attention"].to_file("spec.yaml")
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 200)
    monkeypatch.setattr(Training, "run", pytest.fail)
    many = ["--seq-len", "128", "--batch-size", "1000000000"]
    long = ["--rungs", str(2**40), "--tokens", str(2**40)]
    for verb in (
        ["train", "spec.yaml"],
        ["search", "--workers", "1", *long],
        ["search", "--workers", "2", "--threads", "1", *long],
        ["sweep", "spec.yaml"],
        ["evolve", "spec.yaml"],
    ):
        assert main([*verb, "--data", "text", "--out", "a/b", *many]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cpu has free" in line
        assert "lower batch_size or seq_len" in line
    for short in ([], ["--rungs", str(2**40)], ["--dry-run"]):
        assert main(["search", "--data", "text", "--out", "a/b", *many, *short]) == 2
        assert "a step of 1,000,000,000 windows of 128 takes" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
