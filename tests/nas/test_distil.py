"""Search on a trained model: replaced mixers, the choice among them, the hybrid."""

import itertools
import json
import random
from typing import Any

import pytest
import torch

from kizzasi.cli import main
from kizzasi.errors import SpecError, StudyError
from kizzasi.models import BlockSpec, MixerSpec, build_model, load, presets
from kizzasi.models.mixers import AttentionSpec, GLASpec, Mamba2Spec, ShortConvSpec
from kizzasi.nas.distil import (
    OWN,
    Distilled,
    Front,
    Local,
    Option,
    Yardstick,
    assemble,
    choose,
    ready_made,
    transfer,
    try_mixers,
    windows,
)
from kizzasi.nas.distil.passes import advance, embedded, logits, replaced
from kizzasi.train import Recipe, Training, load_corpus

TEXT = b"the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 120
NAMES = ["window-8", "gla", "mamba2", "short-conv-3", "nf4"]
HOW = Local(steps=8, batch_size=4, lr=3e-3)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text"
    path.write_bytes(TEXT)
    return load_corpus(path)


@pytest.fixture(scope="module")
def teacher(task):
    spec = presets.llama(32, 3, n_heads=4, n_kv_heads=2, hidden=48, vocab_size=256)
    spec = spec.replace(logit_scale=0.5, logit_cap=30.0)
    model = build_model(spec, seed=0)
    recipe = Recipe(40 * 8 * 32, seq_len=32, batch_size=8, lr=1e-2)
    assert Training(model, task, recipe).run(recipe.horizon) is None
    return model.eval()


@pytest.fixture(scope="module")
def candidates(teacher):
    own = teacher.spec.blocks[0].mixer
    return {"same": own, **ready_made(NAMES, own, 32)}


@pytest.fixture(scope="module")
def data(task):
    return windows(task, "train", 32, 32, 0).inputs, windows(task, "valid", 2, 96, 0)


@pytest.fixture(scope="module")
def trials(teacher, candidates, data, tmp_path_factory):
    return tried(teacher, candidates, data, tmp_path_factory.mktemp("run"))


def tried(model, mixers, data, folder, **more):
    return try_mixers(model, mixers, data[0], data[1], folder, **{"how": HOW, **more})


def mixer_of(model, i) -> Any:
    return model.get_submodule(f"blocks.{i}.mixer")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_that_of_trying_all(seed):
    rng = random.Random(seed)
    layers = [
        [
            Option(str(j), rng.randrange(12), rng.randrange(64) / 64)
            for j in range(rng.randint(1, 4))
        ]
        for _ in range(rng.randint(1, 5))
    ]
    every = [
        (sum(o.state_bytes for o in plan), sum(o.damage for o in plan))
        for plan in itertools.product(*layers)
    ]
    for budget in range(min(size for size, _ in every), 60, 3):
        plan = choose(layers, budget)
        taken = [layer[int(name)] for layer, name in zip(layers, plan.names, strict=True)]
        assert plan.damage == min(harm for size, harm in every if size <= budget)
        assert plan.damage == sum(o.damage for o in taken)
        assert plan.state_bytes == sum(o.state_bytes for o in taken) <= budget
    front = Front(layers)
    best = {p for p in every if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in every)}
    assert best == set(zip(front.state_bytes.tolist(), front.damage.tolist(), strict=True))


def test_a_budget_below_the_smallest_plan_says_how_large_that_is():
    with pytest.raises(SpecError, match="the smallest plan needs 1,007"):
        choose([[Option("a", 1000, 0.5)], [Option("b", 7, 0.1), Option("c", 9, 0.0)]], 1006)


def test_a_model_run_layer_by_layer_says_the_same(teacher, data):
    inputs = data[1].inputs
    stream = embedded(teacher, inputs)
    with torch.no_grad():
        for i, block in enumerate(teacher.blocks):
            torch.testing.assert_close(logits(teacher, stream, i), teacher(inputs).logits)
            read, made, stream = advance(block, stream)
            torch.testing.assert_close(block.mixer(read).y, made)


def test_a_mixer_like_the_layers_own_does_no_damage(trials):
    own = [trial for trial in trials.trials if trial.name == "same"]
    assert [(t.taken, t.error, t.kl, t.nats) for t in own] == [(1, 0, 0, trials.nats)] * 3


def test_training_in_place_helps_and_smaller_states_do_harm(trials):
    for trial in trials.trials:
        assert trial.error <= trial.before
        assert trial.kl >= 0
        if trial.name in ("gla", "mamba2", "short-conv-3"):
            assert trial.error < trial.before < 1.3
            assert trial.kl > 1e-6
        if trial.name == "nf4":
            assert trial.error > 0
            assert trial.kl < 1e-2


def test_what_is_assembled_says_what_was_measured(teacher, trials, data):
    """One mixer: the damage of its trial. Several: the logits of the teacher with all exchanged."""
    yard = Yardstick(teacher, data[1])
    for trial in trials.trials:
        names = [trial.name if i == trial.layer else OWN for i in range(3)]
        found = yard.of(assemble(teacher, trials, names))
        assert found.kl == pytest.approx(trial.kl, rel=1e-3, abs=1e-7)
        assert found.nats == pytest.approx(trial.nats, rel=1e-5)
    hybrid = assemble(teacher, trials, ["gla", OWN, "window-8"])
    assert [b.mixer.kind for b in hybrid.spec.plain_blocks] == ["gla", "attention", "attention"]
    inputs = data[1].inputs
    one, other = (replaced(teacher, i, mixer_of(hybrid, i)) for i in (0, 2))
    with torch.no_grad(), one, other:
        wanted = logits(teacher, embedded(teacher, inputs), 0)
    torch.testing.assert_close(hybrid(inputs).logits, wanted)
    shared = {p.data_ptr() for p in teacher.parameters()}
    assert not shared & {p.data_ptr() for p in hybrid.parameters()}


def test_state_bytes_of_a_plan_are_those_of_its_model(teacher, trials):
    front = trials.front(teacher, 4096)
    assert front[-1].damage == 0
    for i in range(0, len(front), 3):
        hybrid = assemble(teacher, trials, front[i].names)
        assert hybrid.spec.cost(4096).state_bytes == front[i].state_bytes


def test_a_hybrid_is_saved_loaded_and_continued(teacher, trials, tmp_path, data):
    hybrid = assemble(teacher, trials, ["short-conv-3", "mamba2", "window-8"])
    hybrid.save_pretrained(tmp_path / "hybrid")
    again = load(tmp_path / "hybrid")
    inputs = data[1].inputs[:1, :20]
    assert torch.equal(again(inputs).logits, hybrid(inputs).logits)
    one, other = (m.generate(inputs, 12, temperature=0) for m in (again, hybrid))
    assert torch.equal(one, other)


def test_distillation_brings_a_hybrid_back(teacher, trials, task, data, tmp_path):
    yard = Yardstick(teacher, data[1])
    recipe = Recipe(16 * 4 * 32, seq_len=32, batch_size=4, lr=3e-3, weight_decay=0.0)

    def run(*budgets):
        hybrid = assemble(teacher, trials, ["gla", "short-conv-3", "gla"])
        before = yard.of(hybrid)
        for i, budget in enumerate(budgets):
            training = Training(hybrid, Distilled(task, teacher), recipe)
            if i:
                training.restore(tmp_path / "state")
            assert training.run(budget) is None
            training.save(tmp_path / "state")
        return before, yard.of(hybrid.eval()), hybrid

    whole = recipe.horizon
    before, after, hybrid = run(whole)
    assert after.kl < 0.8 * before.kl
    assert same(run(whole // 2, whole)[2].state_dict(), hybrid.state_dict())


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(
    teacher, candidates, data, trials, tmp_path
):
    class Stop(Exception):
        pass

    told = []

    def tell(text):
        told.append(text)
        if text == "layer 1 of 3: mamba2":
            raise Stop

    with pytest.raises(Stop):
        tried(teacher, candidates, data, tmp_path, tell=tell)
    done = [text for text in told if text.endswith((": gla", ": mamba2"))]
    told.clear()
    again = tried(teacher, candidates, data, tmp_path, tell=told.append)
    assert len(done) > 1
    assert not set(done[:-1]) & set(told)
    for one, other in zip(again.trials, trials.trials, strict=True):
        assert {**one.to_dict(), "seconds": 0} == {**other.to_dict(), "seconds": 0}
        assert same(again.weights(one), trials.weights(other))
    told.clear()
    assert tried(teacher, candidates, data, tmp_path, tell=told.append) == again
    assert told == ["reading the held-out text"]
    with pytest.raises(StudyError, match="of other local; give the same again"):
        tried(teacher, candidates, data, tmp_path, how=Local(9))
    other = build_model(teacher.spec, seed=5)
    with pytest.raises(StudyError, match="of other weights"):
        tried(other, candidates, data, tmp_path)


def test_a_candidate_whose_spec_changed_is_tried_anew(teacher, data, tmp_path):
    for taps in (2, 3, 3):
        told = []
        mixers = {"conv": ShortConvSpec(d_conv=taps)}
        found = tried(teacher, mixers, data, tmp_path, layers=[1], tell=told.append)
        assert [t.spec for t in found.trials] == [mixers["conv"]]
        assert found.weights(found.trials[0])["conv.weight"].shape[-1] == taps
    assert told == ["reading the held-out text"]


def test_heads_of_a_mixer_go_where_they_fit():
    old_spec = AttentionSpec(n_heads=4, n_kv_heads=2)
    old = old_spec.layer(32, seed=0).mixer
    k, v = (p.weight.unflatten(0, (2, 8)) for p in (old.k_proj, old.v_proj))

    def new(spec):
        mixer = spec.layer(32, seed=1).mixer
        return mixer, transfer(mixer, spec, old, old_spec)

    one, taken = new(AttentionSpec(n_heads=4, n_kv_heads=1))
    assert torch.equal(one.k_proj.weight, k.mean(0))
    assert taken == sum(p.numel() for p in one.parameters())
    gla, taken = new(GLASpec(n_heads=4, expand_k=1.0))
    assert torch.equal(gla.q_proj.weight, old.q_proj.weight)
    assert torch.equal(gla.v_proj.weight, v.repeat_interleave(2, 0).flatten(0, 1))
    assert torch.equal(gla.o_proj.weight, old.o_proj.weight)
    assert taken == 4 * 32 * 32
    spec = Mamba2Spec(expand=1.0, head_dim=8, d_state=8, n_groups=4)
    mamba, taken = new(spec)
    z, x, B, C, dt = mamba.in_proj.weight.split([32, 32, 32, 32, 4])
    assert torch.equal(B, k.repeat_interleave(2, 0).flatten(0, 1))
    assert torch.equal(C, old.q_proj.weight)
    assert torch.equal(x, gla.v_proj.weight)
    assert torch.equal(mamba.out_proj.weight, old.o_proj.weight)
    fresh = spec.layer(32, seed=1).mixer.in_proj.weight.split([32, 32, 32, 32, 4])
    assert torch.equal(z, fresh[0])
    assert torch.equal(dt, fresh[4])
    conv, _ = new(ShortConvSpec())
    assert torch.equal(conv.in_proj.weight[64:], gla.v_proj.weight)
    _, taken = new(AttentionSpec(n_heads=4, n_kv_heads=2, gate=True))
    assert taken == 32 * 32 + 2 * 16 * 32  # all but q_proj, whose rows are others


def test_what_cannot_be_replaced_alone_is_refused(teacher, trials, data, tmp_path):
    def refused(model, mixers, message, **more):
        with pytest.raises(SpecError, match=message):
            tried(model, mixers, data, tmp_path, **more)

    conv = {"conv": ShortConvSpec()}
    refused(teacher, {}, "candidates: none")
    refused(teacher, {"own": ShortConvSpec()}, "'own' is no name")
    refused(teacher, {"../x": ShortConvSpec()}, "is no name")
    refused(teacher, conv, "3 is outside the 3 layers", layers=[3])
    refused(teacher, {"gla": GLASpec(n_heads=5)}, "candidates.gla.expand_k: .*5 heads")
    refused(teacher, {"a": AttentionSpec(n_heads=4, causal=False)}, "cannot stand by itself")
    reader = AttentionSpec(n_heads=4, kv_from=0)
    blocks = (BlockSpec(AttentionSpec(n_heads=4)), BlockSpec(reader))
    refused(build_model(teacher.spec.replace(blocks=blocks)), conv, r"blocks\[1\].mixer: .*shares")
    rwkv = build_model(presets.rwkv7(64, 1, vocab_size=256))
    refused(rwkv, conv, r"blocks\[0\].mixer: 'rwkv7' here shares")
    with pytest.raises(SpecError, match="did you mean window-N"):
        ready_made(["windw-8"], teacher.spec.blocks[0].mixer, 32)
    with pytest.raises(SpecError, match="made for attention"):
        ready_made(["gla"], MixerSpec.from_dict({"kind": "mamba"}), 32)
    with pytest.raises(SpecError, match="2 for 3 layers"):
        assemble(teacher, trials, [OWN, OWN])


def test_the_program_shows_a_curve_then_makes_a_hybrid(teacher, tmp_path, capsys):
    (tmp_path / "text").write_bytes(TEXT)
    teacher.save_pretrained(tmp_path / "teacher")
    out = tmp_path / "out"
    command = ["distil", tmp_path / "teacher", "--data", tmp_path / "text", "--out", out, "--json"]
    command += ["--candidates", "window-8,short-conv-3", "--local-steps", 4, "--steps", 12]
    command += ["--lr", 3e-3]
    command += ["--seq-len", 32, "--score-len", 64, "--score-windows", 2, "--context", 512]
    command = [str(word) for word in command]

    def output(*more):
        assert main([*command, *more]) == 0
        return json.loads(capsys.readouterr().out)

    curve = output()["front"]
    assert curve[-1]["state_bytes"] == teacher.spec.cost(512).state_bytes
    assert curve[-1]["damage"] == 0 < curve[0]["damage"]
    budget = str(curve[0]["state_bytes"])
    found = output("--resume", "--budget", budget)
    first, assembled, distilled = found["rows"]
    assert [first["model"], first["kl"]] == ["teacher", 0]
    assert assembled["state_bytes"] == distilled["state_bytes"] <= int(budget)
    assert distilled["kl"] < assembled["kl"]
    hybrid = load(out)
    assert hybrid.spec.cost(512).state_bytes == distilled["state_bytes"]
    assert len(found["layers"]) == 3
    for more, message in (
        ([], "holds trials; use --resume"),
        (["--resume", "--budget", budget], "holds a model; use --overwrite"),
        (["--resume", "--budget", "3MX"], "give bytes"),
        (["--resume", "--overwrite", "--budget", "10"], "the smallest plan needs"),
        (["--resume", "--local-steps", "5"], "of other data, local"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
