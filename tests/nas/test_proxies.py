"""Zero-cost proxies: each against its definition, computed another way; and manners of them all."""

import copy
import math

import numpy as np
import pytest
import torch
from conformance.cases import CHANNELS, MIXERS, model_spec, tokens
from torch import nn
from torch.nn import functional as F

from kizzasi.errors import ShapeError
from kizzasi.models import BlockSpec, ModelOutput, ModelSpec, Signal, Tokens, build_model
from kizzasi.models.channels import MLPSpec, MoESpec
from kizzasi.models.channels.moe_routers import ExpertChoice, Hash, NoisyTopK, TopK
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.models.norm import Norm
from kizzasi.nas.evaluators import zero_cost as proxies
from kizzasi.nas.evaluators.zero_cost.parts import connections, row_losses, subject
from kizzasi.train.task import IGNORE

STEP = 1e-5  # of central differences in float64
BLOCK = BlockSpec(AttentionSpec(n_heads=1), MLPSpec(hidden=3))
MATRICES = {
    "stem.embedding.weight": "stem",
    "stem.lm_head.weight": "stem",
    **{f"blocks.0.mixer.{name}_proj.weight": "mixer" for name in "qkvo"},
    **{f"blocks.0.channel.{name}_proj.weight": "channel" for name in ("up", "down")},
}


def first_of_each_kind() -> list[str]:
    firsts = {name.split("-")[0]: name for name in reversed([*MIXERS, *CHANNELS])}
    return sorted(firsts.values())


def small_model(seed: int = 3, vocab_size: int = 5, **changes):
    spec = ModelSpec(4, (BLOCK,), Tokens(vocab_size)).replace(**changes)
    return build_model(spec, seed=seed, dtype=torch.float64)


def small_batch(rows: int = 3, length: int = 4):
    x = torch.randint(5, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    targets = x[:, 1:].clone()
    targets[0, 0] = IGNORE
    return x[:, :-1], targets


def losses_by_hand(model, inputs, targets) -> list[float]:
    logits, rows = model(inputs).logits, []
    for n in range(len(inputs)):
        scored = [s for s in range(inputs.shape[1]) if targets[n, s] != IGNORE]
        nats = [-logits[n, s].log_softmax(-1)[targets[n, s]].item() for s in scored]
        rows.append(sum(nats) / len(scored))
    return rows


@torch.no_grad()
def differences(measure, tensor):
    """d measure() / d each entry, by central differences: (entries, outputs)."""
    flat, rows = tensor.view(-1), []
    for i in range(len(flat)):
        value = flat[i].item()
        flat[i] = value + STEP
        above = np.array(measure())
        flat[i] = value - STEP
        rows.append((above - np.array(measure())) / (2 * STEP))
        flat[i] = value
    return np.array(rows)


@pytest.fixture(scope="module")
def case():
    """A tiny model, its batch, and the gradient of every row's loss by differences."""
    model, batch = small_model(), small_batch()
    measure = lambda: losses_by_hand(model, *batch)  # noqa: E731
    grads = {name: differences(measure, p.data) for name, p in model.named_parameters()}
    return model, batch, grads


def test_size(case):
    model, (inputs, targets), _ = case
    assert proxies.params(model, (inputs, targets)) == sum(p.numel() for p in model.parameters())
    assert proxies.flops(model, (inputs, targets)) == model.spec.cost(4, batch=3).flops


def test_grad_norm_by_differences(case):
    model, batch, grads = case
    total = sum((g.mean(1) ** 2).sum() for g in grads.values())
    assert proxies.grad_norm(model, batch) == pytest.approx(math.sqrt(total), rel=1e-6)


def test_snip_by_differences(case):
    model, batch, grads = case
    weights = dict(model.named_parameters())
    total = sum(
        np.abs(weights[name].detach().view(-1).numpy() * grads[name].mean(1)).sum()
        for name in MATRICES
    )
    assert proxies.snip(model, batch) == pytest.approx(total, rel=1e-6)


def test_zico_by_differences(case):
    model, batch, grads = case
    ratio = dict.fromkeys(MATRICES.values(), 0.0)
    for name, layer in MATRICES.items():
        for g in np.abs(grads[name]):
            if g.max() > 1e-8:  # an embedding that no row uses has no gradient, here only rounding
                ratio[layer] += g.mean() / g.std()
    assert proxies.zico(model, batch) == pytest.approx(sum(map(math.log, ratio.values())), rel=1e-4)


def test_fisher_cuts_channels(case):
    """A channel's term is the squared change of a row's loss when the channel is scaled."""
    model, batch, _ = case
    total = 0.0
    for part in (model.blocks[0].mixer, model.blocks[0].channel):
        scale = torch.ones(4, dtype=torch.float64)
        handle = part.register_forward_hook(
            lambda _m, _a, out, scale=scale: out._replace(y=out.y * scale)
        )
        total += (differences(lambda: losses_by_hand(model, *batch), scale) ** 2).sum()
        handle.remove()
    assert proxies.fisher(model, batch) == pytest.approx(total / (2 * 3), rel=1e-6)


def branch_outputs_by_hand(model, inputs):
    x, added = model.stem.embedding(inputs), []
    for block in model.blocks:
        for norm, part in ((block.mixer_norm, block.mixer), (block.channel_norm, block.channel)):
            added.append(part(norm(x)).y)
            x = x + added[-1]
    return added, model.norm(x)


@torch.no_grad()
def test_naswot_counts_equal_codes(case):
    model, batch, _ = case
    added, _ = branch_outputs_by_hand(model, batch[0])
    same = [
        [sum(int(((y[n] > 0) == (y[m] > 0)).sum()) for y in added) for m in range(3)]
        for n in range(3)
    ]
    assert same[0][0] == 2 * 4 * 4
    assert proxies.naswot(model, batch) == pytest.approx(math.log(abs(np.linalg.det(same))))


@torch.no_grad()
def test_logdet_from_singular_values(case):
    model, batch, _ = case
    hidden = branch_outputs_by_hand(model, batch[0])[1].flatten(0, 1).numpy()
    directions = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    sizes = np.linalg.svd(directions, compute_uv=False) ** 2
    expected = 0.5 * np.log(1 + 4 / (12 * 0.5) * sizes).sum()
    assert proxies.logdet(model, batch) == pytest.approx(expected, rel=1e-9)
    assert 0 < expected < 4 / 2 * math.log(1 + 1 / 0.5)


def test_jacob_cov_by_differences():
    """Every token has an embedding of its own, so the table's derivative is the inputs'."""
    model = small_model(vocab_size=9)
    inputs = torch.arange(9).view(3, 3)
    table = model.stem.embedding.weight.data
    jacobian = differences(lambda: [model(inputs).logits.sum().item()], table).reshape(3, -1)
    v = np.linalg.eigvalsh(np.corrcoef(jacobian)) + 1e-5
    score = proxies.jacob_cov(model, (inputs, inputs))
    assert score == pytest.approx(-(np.log(v) + 1 / v).sum(), rel=1e-5)
    assert score <= -3


class PositivePath(nn.Module):
    """Embedding, a matrix, a norm, the head; with an A_log that synflow must not touch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 6)])
        self.embedding, self.norm = nn.Embedding(5, 3), Norm(kind, 6)
        self.head = nn.Linear(6, 5, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
        nn.init.zeros_(self.blocks[0].bias)

    def forward(self, inputs):
        return ModelOutput(self.head(self.norm(self.blocks[0](self.embedding(inputs)))), (), {})


@pytest.mark.parametrize("kind", ["rms", "rms_plus_one", "layer"])
def test_synflow_conserves_the_flow_in_every_layer(kind):
    model, (inputs, targets) = PositivePath(kind).double(), small_batch()
    hidden = model.embedding.weight.abs()[inputs] @ model.blocks[0].weight.abs().T
    gain = (model.norm.weight + (kind == "rms_plus_one")).abs()
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    flow = (normed @ model.head.weight.abs().T).sum(-1).mean().item()
    assert proxies.synflow(model, (inputs, targets)) == pytest.approx(3 * flow, rel=1e-12)


def test_synflow_sees_queries_and_keys():
    """A changed key matrix changes the flow: positions differ, so softmax has a choice."""
    model, batch = small_model(), small_batch()
    before = proxies.synflow(model, batch)
    with torch.no_grad():
        model.blocks[0].mixer.k_proj.weight[0] *= 3
    assert abs(proxies.synflow(model, batch) / before - 1) > 1e-6


def test_synflow_stays_finite_in_depth():
    deep = BlockSpec(MambaSpec(d_state=4))
    model = build_model(ModelSpec(16, (deep,) * 24, Tokens(5)), seed=0)
    assert math.isfinite(proxies.synflow(model, small_batch()))


def test_connections_are_matrices_and_filters():
    model = build_model(ModelSpec(8, (BlockSpec(MambaSpec(d_state=2)),), Tokens(5), tie_head=True))
    names = ("in_proj", "conv1d", "x_proj", "out_proj")
    expected = {"stem.embedding.weight", *(f"blocks.0.mixer.{name}.weight" for name in names)}
    step_sizes = {"blocks.0.mixer.dt_proj.weight"}
    assert set(connections(model)) - step_sizes == expected
    decaying = BlockSpec(MIXERS["rwkv7-two-heads"], CHANNELS["moe-top2"])
    rwkv = connections(build_model(ModelSpec(16, (decaying,), Tokens(5))))
    assert {"blocks.0.mixer.w1", "blocks.0.channel.experts.down_proj"} <= set(rwkv)
    assert not {"blocks.0.mixer.w0", "blocks.0.mixer.r_k", "blocks.0.channel.gate.weight"} & set(
        rwkv
    )


def test_only_what_sleeps_is_woken():
    batch = small_batch()
    model = small_model()
    own = subject(model, batch).model
    assert all(map(torch.equal, own.parameters(), model.parameters()))
    rwkv = build_model(model_spec("rwkv7-two-heads"), dtype=torch.float64)
    assert not rwkv.blocks[1].mixer.output.weight.any()
    woken = dict(subject(rwkv, batch).model.named_parameters())
    for name, parameter in rwkv.named_parameters():
        assert torch.equal(woken[name], parameter) == (parameter.ndim < 2 or bool(parameter.any()))
    assert proxies.fisher(rwkv, batch) > 0


def test_row_losses_skip_what_is_not_scored():
    logits, (_, targets) = torch.randn(3, 4, 5, dtype=torch.float64), small_batch()
    rows = row_losses(logits, targets)
    assert rows[0].item() == pytest.approx(F.cross_entropy(logits[0, 1:], targets[0, 1:]).item())
    assert rows[2].item() == pytest.approx(F.cross_entropy(logits[2], targets[2]).item())


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [(m.training, len(m._forward_hooks), sorted(vars(m))) for m in model.modules()],
        torch.get_rng_state(),
    )


def assert_well_behaved(model, batch):
    """Every proxy is finite and reproducible, and leaves no trace."""
    before = snapshot(model)
    for name, proxy in proxies.PROXIES.items():
        score = proxy(model, batch)
        assert isinstance(score, float), name
        assert math.isfinite(score), name
        assert proxy(copy.deepcopy(model), batch) == score, name
    after = snapshot(model)
    assert before[2] == after[2]
    torch.testing.assert_close(before[::3], after[::3], rtol=0, atol=0)
    for old, new in zip(before[1], after[1], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


@pytest.mark.parametrize("name", first_of_each_kind())
def test_every_mixer_and_channel(name):
    spec = model_spec(name)
    model = build_model(spec.replace(blocks=spec.blocks[:1]), seed=1)
    x = tokens(3, 6)
    assert_well_behaved(model, (x[:, :-1], x[:, 1:]))


ROUTERS = {
    "expert_choice": {"router": ExpertChoice(), "normalize": "all"},
    "hash": {"router": Hash(n_bits=4)},
    "noisy": {"router": NoisyTopK()},
    "bias": {"router": TopK(bias_rate=0.1), "jitter": 0.1, "capacity_factor": 1.0},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_mixtures_in_training_with_tied_head_and_dropout(name):
    moe = MoESpec(n_experts=4, top_k=2, hidden=8, **ROUTERS[name])
    block = BlockSpec(AttentionSpec(n_heads=2), moe)
    spec = ModelSpec(8, (block,), Tokens(5), tie_head=True, embed_norm=True, dropout=0.3)
    model, (inputs, targets) = build_model(spec, seed=1).train(), small_batch()
    model(inputs).loss(targets.clamp(min=0)).backward()
    assert_well_behaved(model, (inputs, targets))


def test_signals():
    model = build_model(ModelSpec(8, (BLOCK,), Signal(2, 3)), seed=1)
    frames = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    assert_well_behaved(model, (frames, frames.new_ones(3, 4, 3)))


@pytest.mark.parametrize("name", ["zico", "naswot", "jacob_cov"])
def test_rows_are_needed(name):
    with pytest.raises(ShapeError, match="at least 2"):
        proxies.PROXIES[name](small_model(), small_batch(rows=1))


def test_equal_rows_are_worst():
    inputs, targets = small_batch()
    batch = inputs[:1].expand(2, -1), targets[:1].expand(2, -1)
    assert proxies.naswot(small_model(), batch) == -math.inf
    assert proxies.jacob_cov(small_model(), batch) < -9e4
