"""Features, embeddings given, heads as data, and a loss that never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models import (
    BlockSpec,
    ModelSpec,
    Signal,
    Tokens,
    build_model,
    load,
    parameter_roles,
)
from kizzasi.models.channels import MoESpec
from kizzasi.models.heads import Classes, Own, Regression
from kizzasi.models.loss import mean_loss, mean_loss_in_chunks
from kizzasi.models.mixers import AttentionSpec, MambaSpec

BLOCKS = (BlockSpec(MambaSpec(d_state=4)), BlockSpec(AttentionSpec(2), MoESpec(n_experts=2)))
V, D = 29, 16


def spec(*heads, **changes) -> ModelSpec:
    return ModelSpec(D, BLOCKS, Tokens(V), heads=heads).replace(**changes)


def model_of(*heads, **changes):
    return build_model(spec(*heads, **changes), seed=1, dtype=torch.float64)


def tokens(batch, length, seed=0):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_hidden_is_what_the_head_and_every_block_see():
    model, x = model_of(), tokens(2, 7)
    seen = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out.y}))
    assert_close(model.stem.head(model.hidden(x)), model(x).logits)
    assert_close(model.hidden(x, layer=0), model.stem.embedding(x))
    for layer in (1, 2):
        features = model.hidden(x, layer=layer)
        assert_close(features, seen[layer - 1])
    assert_close(model.norm(model.hidden(x, layer=2)), model.hidden(x))
    state = model(x[:, :3]).state
    assert_close(model.hidden(x[:, 3:], state), model.hidden(x)[:, 3:])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]).bool()
    assert_close(model.hidden(x, mask=mask)[0, 2:], model.hidden(x[:1, 2:])[0])
    for wrong in (-1, 3):
        with pytest.raises(ShapeError, match=r"is outside 0 \(embeddings\) to 2 \(all blocks\)"):
            model.hidden(x, layer=wrong)


@pytest.mark.parametrize("positions", [None, 9])
def test_embeddings_may_be_given(positions):
    model = model_of(stem=Tokens(V, max_positions=positions), embed_norm=True)
    x = tokens(2, 7)
    embeds = model.stem.embedding(x).detach().requires_grad_()
    out = model(inputs_embeds=embeds)
    assert_close(out.logits, model(x).logits)
    out.loss(x).backward()
    assert embeds.grad is not None
    step = model(inputs_embeds=embeds[:, 0], state=model.init_state(2), step=True)
    assert_close(step.logits, out.logits[:, 0])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]).bool()
    dirty = torch.where(mask[..., None], embeds, torch.nan)
    assert_close(
        model(inputs_embeds=dirty, mask=mask).logits[mask], model(x, mask=mask).logits[mask]
    )
    for call, message in (
        (lambda: model(), "give either inputs or inputs_embeds"),
        (lambda: model(x, inputs_embeds=embeds), "give either inputs or inputs_embeds"),
        (lambda: model(inputs_embeds=embeds[..., :3]), r"expected \(b, t, 16\)"),
        (lambda: model(inputs_embeds=embeds[0]), r"expected \(b, t, 16\)"),
        (lambda: model(inputs_embeds=torch.ones(1, 2, D).long()), "floating"),
    ):
        with pytest.raises(ShapeError, match=message):
            call()


SEVERAL = (
    Own(),
    Classes(5),
    Classes(3, "mean", name="mood"),
    Classes(4, None, name="tags"),
    Regression(2, "last", name="age"),
    Regression(1, name="curve"),
)
SHAPES = {
    "own": (2, 7, V),
    "classes": (2, 5),
    "mood": (2, 3),
    "tags": (2, 7, 4),
    "age": (2, 2),
    "curve": (2, 7, 1),
}


def test_several_heads_at_once():
    model, x = model_of(*SEVERAL), tokens(2, 7)
    out = model(x)
    assert {name: tuple(y.shape) for name, y in out.heads.items()} == SHAPES
    assert torch.equal(out.logits, out.heads["own"])
    features = model.hidden(x)
    for name, pool in (("classes", "last"), ("mood", "mean"), ("tags", None), ("age", "last")):
        read = {"last": features[:, -1], "mean": features.mean(1), None: features}[pool]
        assert_close(out.heads[name], model.heads[name].proj(read))
    targets = {
        "own": x,
        "classes": torch.tensor([4, -100]),
        "tags": x % 4,
        "age": torch.randn(2, 2, dtype=torch.float64),
    }
    want = sum(mean_loss(out.heads[name], y) for name, y in targets.items()) + sum(out.aux.values())
    loss = out.loss(targets)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert model.heads["classes"].proj.weight.grad.abs().sum() > 0
    assert model.heads["mood"].proj.weight.grad is None
    for wrong, message in (
        ({"clases": x}, "did you mean classes"),
        ({}, "empty"),
        ({"own": x[:, :2]}, "expected ids"),
    ):
        with pytest.raises(ShapeError, match=message):
            out.loss(wrong)


def test_pools_see_tokens_alone_and_states_carry_the_last():
    heads = (Classes(5), Classes(3, "mean", name="mood"))
    model, x = model_of(*heads), tokens(3, 7)
    mask = torch.arange(7) >= torch.tensor([[0], [3], [6]])
    out = model(x, mask=mask)
    for i, n in enumerate((0, 3, 6)):
        for name in ("classes", "mood"):
            assert_close(out.heads[name][i], model(x[i : i + 1, n:]).heads[name][0])
    last = model_of(Classes(5))
    state = last(x[:, :4]).state
    assert_close(last(x[:, 4:], state).logits, last(x).logits)
    for t in range(4, 7):
        step = last.step(x[:, t], state)
        state = step.state
    assert_close(step.logits, last(x).logits)
    for refused, message in (
        (lambda: model.step(x[:, 0], model.init_state(3)), r"heads\[1\].*mean of a whole sequence"),
        (lambda: model(x, model.init_state(3)), "mean of a whole sequence"),
        (lambda: last(x, segment_ids=torch.ones_like(x)), "one answer a row"),
        (lambda: last.generate(x, 2), "own"),
    ):
        with pytest.raises(SpecError, match=message):
            refused()


def test_generation_reads_the_own_head_among_others():
    model, plain, x = model_of(Own(), Classes(5)), model_of(), tokens(2, 4)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "heads" not in k})
    assert torch.equal(model.generate(x, 3, temperature=0), plain.generate(x, 3, temperature=0))


@pytest.mark.parametrize("heads", [SEVERAL, SEVERAL[1:], (Classes(2),), (Regression(3),)])
@pytest.mark.parametrize("stem", [Tokens(V), Tokens(V, 20), Signal(3, 2)])
def test_heads_cost_what_they_measure_and_go_through_files(heads, stem, tmp_path):
    model = build_model(spec(*heads, stem=stem))
    x = tokens(2, 7) if isinstance(stem, Tokens) else torch.randn(2, 7, 3)
    cost = model.spec.cost(7, 2)
    assert cost.params == model.n_params
    bare = model.spec.replace(heads=())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        build_model(bare)(x)
    assert cost.flops - bare.cost(7, 2).flops == counter.get_total_flops() - plain.get_total_flops()
    model.save_pretrained(tmp_path / "model")
    again, out = load(tmp_path / "model"), model(x)
    assert again.spec == model.spec
    assert all(torch.equal(again(x).heads[name], y) for name, y in out.heads.items())
    roles = parameter_roles(model)
    assert all(roles[f"heads.{n}.proj.weight"] == "head" for n in model.heads)


def test_heads_are_data_and_leave_old_digests_alone():
    data = spec(*SEVERAL).to_dict()
    assert ModelSpec.from_dict(data) == spec(*SEVERAL)
    assert spec().digest == ModelSpec(D, BLOCKS, Tokens(V)).digest != spec(Own()).digest
    for heads, changes, message in (
        ((Classes(1),), {}, r"heads\[0\].n_classes: 1 is below 2"),
        ((Regression(0),), {}, r"heads\[0\].n_out: 0 is not positive"),
        ((Classes(2), Classes(3)), {}, r"heads\[1\].name: 'classes' must be a word, and name one"),
        ((Classes(2, name="a.b"),), {}, r"heads\[0\].name"),
        ((Classes(2),), {"tie_head": True}, "tie_head: no head is the stem's own"),
    ):
        with pytest.raises(SpecError, match=message):
            build_model(spec(*heads, **changes))
    data["heads"][1]["n_clases"] = 3
    with pytest.raises(SpecError, match=r"heads\[1\].n_clases: unknown; did you mean n_classes"):
        ModelSpec.from_dict(data)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("kind", ["all", "mask", "weights", "frames"])
def test_chunks_give_the_same_loss_and_gradients(chunk, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    head = torch.nn.Linear(4, 11, dtype=torch.float64)
    y = torch.randint(11, (2, 5), generator=generator)
    y[0, :2] = -100
    if kind == "frames":
        y = torch.randn(2, 5, 11, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, 5, generator=generator)
    mask = {"all": None, "mask": mask > 0.5, "weights": mask, "frames": mask > 0.3}[kind]
    results = []
    for chunked in (False, True):
        leaf = x.clone().requires_grad_()
        if chunked:
            loss = mean_loss_in_chunks(head, 11, leaf, y, mask, chunk=chunk)
        else:
            loss = mean_loss(head(leaf), y, mask)
        results.append((loss, *torch.autograd.grad(loss, [leaf, *head.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("tied", [False, True])
def test_model_loss_equals_the_loss_of_its_output(tied, monkeypatch):
    monkeypatch.setattr("kizzasi.models.loss.CHUNK_ELEMENTS", 2 * V)
    model, x, y = model_of(tie_head=tied), tokens(2, 7), tokens(2, 7, 1)
    y[1, 3] = -100
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]).bool()
    ids = torch.tensor([[3] * 4 + [5] * 3] * 2)
    state = model(x[:, :2]).state.detach()
    for call in ({}, {"mask": mask}, {"segment_ids": ids}, {"state": state}):
        want = model(x, **call).loss(y, call.get("mask"))
        loss = model.loss(x, y, **call)
        torch.testing.assert_close(loss, want)
        names, parameters = zip(*model.named_parameters(), strict=True)
        got, expected = (torch.autograd.grad(v, parameters) for v in (loss, want))
        for name, a, b in zip(names, got, expected, strict=True):
            torch.testing.assert_close(a, b, msg=name)
    with pytest.raises(ShapeError, match="expected ids"):
        model.loss(x, y[:, 1:])
    with pytest.raises(SpecError, match="not the stem's own"):
        model_of(Classes(2)).loss(x, y)
    signal = build_model(spec(stem=Signal(3, 2)), dtype=torch.float64)
    f, t = (torch.randn(2, 5, n, dtype=torch.float64) for n in (3, 2))
    torch.testing.assert_close(signal.loss(f, t), signal(f).loss(t))
    hidden = torch.where(mask[..., None], model.stem.embedding(x), torch.nan)
    dirty = model.loss(None, y, mask=mask, inputs_embeds=hidden)
    torch.testing.assert_close(dirty, model.loss(x, y, mask=mask))


def test_a_large_vocabulary_is_never_held_whole(monkeypatch):
    """The largest tensor that autograd keeps, or any op makes, is one chunk's."""
    monkeypatch.setattr("kizzasi.models.loss.CHUNK_ELEMENTS", 4 * 5000)
    model = build_model(ModelSpec(8, BLOCKS[:1], Tokens(5000)))
    x = torch.randint(5000, (2, 64))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # pyright: ignore[reportAttributeAccessIssue]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(t.numel() for t in made if isinstance(t, torch.Tensor))
            return out

    with Watch():
        model.loss(x, x).backward()
    assert max(sizes) <= 8 * 5000 < x.numel() * 5000 / 10  # the head's own gradient
    assert F.cross_entropy(model(x).logits.flatten(0, 1), x.flatten()) > 0
