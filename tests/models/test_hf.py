"""Folders of ours in transformers: AutoClasses, generate with a cache, Trainer."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the house is transformers'")
pytest.importorskip("accelerate", reason="Trainer needs it")

import kizzasi.hf  # noqa: E402
from kizzasi.errors import CheckpointError  # noqa: E402
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model, load  # noqa: E402
from kizzasi.models.channels import MoESpec, SwiGLUSpec  # noqa: E402
from kizzasi.models.checkpoints.native import save  # noqa: E402
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RWKV7Spec  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
MIXERS = {
    "attention": AttentionSpec(2),
    "mamba": MambaSpec(d_state=4),
    "rwkv7": RWKV7Spec(head_dim=8),
}


def folder_of(tmp_path, mixer, **changes):
    spec = ModelSpec(16, (BlockSpec(mixer, SwiGLUSpec(24)),) * 2, Tokens(20))
    model = build_model(spec.replace(**changes), seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    generation = {"eos_token_id": 19, "pad_token_id": 0, "config": {"max_new_tokens": 9}}
    save(model, tmp_path / "model", entries={"generation": generation})
    return tmp_path / "model", model.eval()


@pytest.fixture(autouse=True)
def registered():
    kizzasi.hf.register()
    kizzasi.hf.register()


@pytest.mark.parametrize("name", MIXERS)
def test_generate_carries_the_state(tmp_path, name, monkeypatch):
    folder, ours = folder_of(tmp_path, MIXERS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is kizzasi.hf.KizzasiForCausalLM
    assert model.config.vocab_size == 20
    assert model.generation_config.eos_token_id == 19
    lengths, forward = [], model.model.forward

    def watched(ids, *args, **options):
        lengths.append(ids.shape[1])
        return forward(ids, *args, **options)

    monkeypatch.setattr(model.model, "forward", watched)
    prompt = torch.tensor([[5, 6, 7, 8]])
    out = model.generate(prompt, do_sample=False, eos_token_id=None)
    assert lengths == [4] + [1] * 8
    assert out.tolist() == ours.generate(prompt, 9, temperature=0).tolist()
    slow = model.generate(prompt, do_sample=False, eos_token_id=None, use_cache=False)
    assert slow.tolist() == out.tolist()
    beams = model.generate(prompt, do_sample=False, eos_token_id=None, num_beams=3)
    again = model.generate(prompt, do_sample=False, eos_token_id=None, num_beams=3, use_cache=False)
    assert beams.tolist() == again.tolist()


@pytest.mark.parametrize("name", MIXERS)
def test_padded_rows_generate_as_alone(tmp_path, name):
    folder, _ = folder_of(tmp_path, MIXERS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    options = {"do_sample": False, "eos_token_id": None}
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    both = model.generate(
        torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]]), attention_mask=mask, **options
    )
    assert both[0, 2:].tolist() == model.generate(torch.tensor([[7, 8]]), **options)[0].tolist()
    alone = model.generate(torch.tensor([[5, 6, 7, 8]]), **options)
    assert both[1].tolist() == alone[0].tolist()


def test_loss_is_ours(tmp_path):
    channel = MoESpec(4, 2, hidden=8)
    folder, ours = folder_of(
        tmp_path, AttentionSpec(2), blocks=(BlockSpec(AttentionSpec(2), channel),)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12).view(2, 6)
    labels = ids.clone()
    labels[0, 3:] = -100
    padded = torch.ones_like(ids)
    padded[0, 4:] = 0
    out = model(ids, attention_mask=padded, labels=labels, logits_to_keep=2)
    wanted = ours(ids)
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    plain = torch.nn.functional.cross_entropy(wanted.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.loss, plain + sum(wanted.aux.values()))
    torch.testing.assert_close(out.logits, wanted.logits[:, -2:])


def test_trainer_trains_saves_and_goes_on(tmp_path):
    folder, _ = folder_of(tmp_path, MambaSpec(d_state=4))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": [i % 5 + 1] * 8, "labels": [i % 5 + 1] * 8} for i in range(64)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=15,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    before = float(model(torch.tensor([[3] * 8]), labels=torch.tensor([[3] * 8])).loss)
    trainer.train()
    after = float(model(torch.tensor([[3] * 8]), labels=torch.tensor([[3] * 8])).loss)
    assert after < 0.5 * before
    saved = load(tmp_path / "run" / "checkpoint-30")
    for (name, a), b in zip(saved.named_parameters(), model.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-15"))
    torch.testing.assert_close(
        dict(trainer.model.model.named_parameters()), dict(saved.named_parameters())
    )


def test_what_it_saves_is_ours(tmp_path):
    folder, ours = folder_of(tmp_path, AttentionSpec(2))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float64")
    assert model.dtype == torch.float64
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model_type"] == "kizzasi"
    assert config["generation"]["eos_token_id"] == 19
    assert config["generation"]["config"] == {"max_new_tokens": 9}
    again = load(tmp_path / "again", dtype=torch.float32)
    assert again.spec.digest == ours.spec.digest
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again(ids).logits, ours(ids).logits)
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    assert fresh.model.spec == ours.spec
    assert fresh.model.stem.embedding.weight.std() > 0


def test_models_that_are_no_language_models(tmp_path):
    spec = ModelSpec(16, (BlockSpec(AttentionSpec(2)),), Signal(1, 1))
    for odd, message in (
        (spec, "signal; a causal language model"),
        (
            spec.replace(stem=Tokens(9), blocks=(BlockSpec(AttentionSpec(2, causal=False)),)),
            "not causal",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            kizzasi.hf.KizzasiForCausalLM(kizzasi.hf.KizzasiConfig(odd.to_dict()))
