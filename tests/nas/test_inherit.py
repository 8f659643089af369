"""Weight inheritance: what matches is taken, what does not is fresh, and nobody can mistake it."""

import pytest
import torch

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import MLPSpec, SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec, S4DSpec
from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.evaluators.inherit import inherit, train_child
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.train.bytes import load_corpus
from kizzasi.train.recipe import Recipe

ATTENTION = BlockSpec(AttentionSpec(n_heads=2), MLPSpec(hidden=24))
MAMBA = BlockSpec(MambaSpec(d_state=4), MLPSpec(hidden=24))
PARENT = ModelSpec(16, (ATTENTION, MAMBA), Tokens(256))


def inherited_names(child_spec, *, parent_spec=PARENT, **settings):
    """Names of parameters that changed to the parent's values, and the record."""
    parent, child = build_model(parent_spec, seed=1), build_model(child_spec, seed=2)
    with torch.no_grad():
        for p in parent.parameters():
            p.add_(1.0)
    before = {name: p.clone() for name, p in child.named_parameters()}
    record = inherit(child, parent, **settings)
    named = dict(parent.named_parameters())
    changed = {n: p for n, p in child.named_parameters() if not torch.equal(p, before[n])}
    exact = {n for n, p in changed.items() if torch.equal(p, named[n])}
    return exact, set(changed) - exact, record, child, parent


def test_an_equal_child_is_its_parent():
    exact, partly, record, child, parent = inherited_names(PARENT, parent_tokens=7)
    assert not partly
    assert len(exact) == len(list(child.parameters()))
    assert (record.share, record.parent, record.parent_tokens) == (1.0, PARENT.digest, 7)
    x = torch.arange(8)[None]
    assert torch.equal(child(x).logits, parent(x).logits)
    assert child.stem.embedding.weight.data_ptr() != parent.stem.embedding.weight.data_ptr()


def test_another_mixer_starts_afresh():
    """Attention and MLA-like kinds share names and shapes (o_proj, out_proj); roles differ."""
    s4d = BlockSpec(S4DSpec(d_state=4), MLPSpec(hidden=24))
    exact, partly, record, child, _ = inherited_names(PARENT.replace(blocks=(s4d, MAMBA)))
    assert not partly
    fresh = {n for n, _ in child.named_parameters()} - exact
    assert fresh == {n for n, _ in child.named_parameters() if n.startswith("blocks.0.mixer.")}
    n_fresh = sum(p.numel() for n, p in child.named_parameters() if n in fresh)
    total = sum(p.numel() for p in child.parameters())
    assert record.share == pytest.approx(1 - n_fresh / total)


def test_names_shared_by_other_kinds_do_not_match():
    """An MLP and a SwiGLU both have up_proj and down_proj of one shape."""
    swiglu = BlockSpec(AttentionSpec(n_heads=2), SwiGLUSpec(hidden=24))
    exact, _, _, _, _ = inherited_names(PARENT.replace(blocks=(swiglu, MAMBA)))
    assert "blocks.0.channel.up_proj.weight" not in exact
    assert "blocks.0.mixer.o_proj.weight" in exact


def test_gains_of_another_norm_do_not_match():
    exact, _, _, _, _ = inherited_names(PARENT.replace(norm="rms_plus_one"))
    assert "norm.weight" not in exact


def test_other_shapes_only_overlap_when_asked():
    wide = BlockSpec(AttentionSpec(n_heads=2), MLPSpec(hidden=32))
    spec = PARENT.replace(blocks=(wide, MAMBA))
    name = "blocks.0.channel.up_proj.weight"
    exact, partly, record, _, _ = inherited_names(spec)
    assert not partly
    assert name not in exact
    _, partly, more, child, parent = inherited_names(spec, overlap=True)
    assert partly == {name, "blocks.0.channel.down_proj.weight"}
    ours, theirs = (m.blocks[0].channel.up_proj.weight for m in (child, parent))
    assert torch.equal(ours[:24], theirs)
    assert torch.equal(ours[24:], build_model(spec, seed=2).blocks[0].channel.up_proj.weight[24:])
    total = sum(p.numel() for p in child.parameters())
    assert more.share - record.share == pytest.approx(2 * 24 * 16 / total)
    assert more.overlap


def test_a_deeper_and_a_shallower_child():
    exact, _, record, child, _ = inherited_names(PARENT.replace(blocks=(ATTENTION, MAMBA, MAMBA)))
    assert {n for n, _ in child.named_parameters()} - exact == {
        n for n, _ in child.named_parameters() if n.startswith("blocks.2.")
    }
    assert record.share < 1
    assert inherited_names(PARENT.replace(blocks=(ATTENTION,)))[2].share == 1.0


@pytest.fixture(scope="module")
def evaluator():
    recipe = Recipe(horizon=2048, seq_len=32, batch_size=8, score_windows=16)
    return MicroTrain(load_corpus(max_bytes=40_000), recipe)


def test_a_child_starts_where_its_parent_stopped(evaluator):
    training = evaluator.training(Job(PARENT, 2048, 0))
    training.run(2048)
    child = train_child(evaluator, PARENT, training.model, 256, 5, parent_tokens=2048)
    scratch = evaluator(Job(PARENT, 256, 5), lambda n: None)
    assert child.measurement.failure is None
    assert child.measurement.score < scratch.score - 0.1
    event = child.to_dict()
    assert set(event) == {*scratch.to_dict(), "inherited"}
    assert event["inherited"]["parent_tokens"] == 2048
    assert event["tokens"] == 256


def test_a_leaking_child_is_refused(evaluator):
    seeing = PARENT.replace(blocks=(BlockSpec(AttentionSpec(n_heads=2, causal=False)), MAMBA))
    parent = build_model(PARENT)
    result = train_child(evaluator, seeing, parent, 256, 0, parent_tokens=0)
    assert result.measurement.score is None
    assert "later inputs" in (result.measurement.failure or "")
