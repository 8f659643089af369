"""Tools for models with mixtures: telemetry, revival, expert layouts, upcycling."""

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from tolerance import assert_close
from torch.utils.checkpoint import checkpoint

from kizzasi.errors import CheckpointError, DataError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.moe_routers import Sinkhorn, TopK
from kizzasi.models.mixer import ChannelSpec, LayerContext
from kizzasi.models.mixers import AttentionSpec
from kizzasi.models.moe import (
    convert_experts,
    revive_dead_experts,
    upcycle,
    watch_routing,
)

SWIGLU, MLP = ChannelSpec.registry["swiglu"], ChannelSpec.registry["mlp"]


def model(channel, n_layers=2, **options):
    block = BlockSpec(mixer=AttentionSpec(n_heads=2), channel=channel)
    return build_model(ModelSpec(16, (block,) * n_layers, Tokens(13)), **options)


IDS = torch.arange(24).view(2, 12) % 13


def test_watch_counts_each_token_once():
    moe = model(MoESpec(n_experts=4))
    layer = moe.blocks[0].channel
    with watch_routing(moe) as usage:
        moe(IDS)
        x = torch.randn(1, 6, 16, requires_grad=True)
        checkpoint(lambda v: layer(v).y, x, use_reentrant=False).sum().backward()
    moe(IDS)
    names = ["blocks.0.channel", "blocks.1.channel"]
    assert list(usage.layers()) == names
    assert [int(usage[name].counts.sum()) for name in names] == [2 * 30, 2 * 24]
    assert all(name in usage.table() for name in names)
    with pytest.raises(DataError, match="no mixture of experts"), watch_routing(model(MLP())):
        pass


def test_telemetry_of_a_collapsed_and_a_balanced_router():
    moe = MoESpec(n_experts=4, top_k=1, normalize="all", capacity_factor=1.0).build(LayerContext(4))
    moe.reset_parameters(1)
    with torch.no_grad():
        moe.gate.weight.copy_(50 * torch.eye(4))
    x = torch.eye(4).repeat(2, 1)[None]
    for inputs, effective, violation, dead, drop in (
        (x, 4, 0, 0, 0),
        (x[:, :1].expand(1, 8, 4), 1, 3, 0.75, 0.75),
    ):
        with watch_routing(moe) as usage:
            moe(inputs)
        one = usage[""]
        assert math.isclose(one.effective_experts, effective, rel_tol=1e-9)
        assert math.isclose(one.entropy, math.log(effective), abs_tol=1e-9)
        assert (one.max_violation, one.dead_fraction, one.drop_rate) == (violation, dead, drop)
        assert math.isclose(one.logit_norm, 25, rel_tol=1e-6)


def test_usage_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    moe = model(MoESpec(n_experts=4))
    with watch_routing(moe) as usage:
        moe(IDS)
    usage.plot(tmp_path / "usage.png")
    assert (tmp_path / "usage.png").stat().st_size > 1000


def test_revival_shares_the_work_of_the_busiest():
    moe = model(MoESpec(n_experts=4, top_k=1, normalize="all"), n_layers=1).eval()
    layer = moe.blocks[0].channel
    with torch.no_grad():
        layer.gate.weight.mul_(0.1)
        layer.gate.weight[3] -= 100 * layer.gate.weight[:3].sum(0)
        layer.gate.weight[2] = layer.gate.weight[3]
    with watch_routing(moe) as before:
        moe(IDS)
    dead = (before["blocks.0.channel"].counts == 0).nonzero()[:, 0].tolist()
    assert dead
    assert revive_dead_experts(moe, before, noise=0.01) == {"blocks.0.channel": dead}
    busiest = int(before["blocks.0.channel"].counts.argmax())
    for a, b in zip(layer.experts.tensors(dead[0]), layer.experts.tensors(busiest), strict=True):
        assert 0 < (a - b).norm() / b.norm() < 0.05


def test_revival_keeps_to_experts_of_one_form():
    kinds = (SWIGLU(hidden=8), MLP(), SWIGLU(hidden=8), SWIGLU(hidden=12))
    moe = model(MoESpec(n_experts=4, top_k=1, normalize="all", experts=kinds), n_layers=1).eval()
    layer, before = moe.blocks[0].channel, copy.deepcopy(moe.state_dict())
    with watch_routing(moe) as usage:
        pass
    usage.sums["blocks.0.channel"].counts += torch.tensor([5, 9, 0, 0])
    assert revive_dead_experts(moe, usage, noise=0.01) == {"blocks.0.channel": [2]}
    for name, tensor in moe.state_dict().items():
        assert torch.equal(tensor, before[name]) == (
            ".experts.2." not in name and "gate.w" not in name
        )
    a, b = layer.experts[2].up_proj.weight, layer.experts[0].up_proj.weight
    assert 0 < (a - b).norm() / b.norm() < 0.05


def test_layouts_round_trip_and_are_strict():
    moe = MoESpec(n_experts=3, hidden=5).build(LayerContext(4))
    moe.reset_parameters(1)
    state = moe.state_dict()
    for layout in ("list", "mixtral", "packed"):
        there = convert_experts(state, 3, layout)
        assert "gate.weight" in there
        back = convert_experts(there, 3, "packed")
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
    each, mixtral = convert_experts(state, 3, "list"), convert_experts(state, 3, "mixtral")
    assert state["experts.gate_up_proj"].shape == (3, 10, 4)
    assert torch.equal(mixtral["experts.1.w3.weight"], each["experts.1.up_proj.weight"])
    assert torch.equal(each["experts.1.up_proj.weight"], state["experts.gate_up_proj"][1, 5:])
    cases = [
        (each, 4, r"missing \[\('down_proj', 3\)"),
        (each, 2, r"unexpected \[\('down_proj', 2\)"),
        (state, 4, r"experts.gate_up_proj: expected \(4, 2h, d\), got \(3, 10, 4\)"),
        ({**each, "experts.0.bias": each["gate.weight"]}, 3, "not a name of any known"),
        ({**each, "experts.0.w1.weight": each["gate.weight"]}, 3, "two layouts at once"),
        ({**each, "experts.0.up_proj.weight": torch.ones(4, 4)}, 3, r"experts.0: gate, up and"),
    ]
    for bad, n, message in cases:
        with pytest.raises(CheckpointError, match=message):
            convert_experts(bad, n, "list")


def test_state_dicts_and_checkpoints_of_version_0_1_are_read(tmp_path):
    moe = model(MoESpec(n_experts=4, shared_hidden=8), n_layers=2)
    old = {}
    for name, tensor in moe.state_dict().items():
        layer, _, part = name.partition(".experts.")
        if not part:
            old[name] = tensor
        for i in range(4 if part else 0):
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            for one, values in zip(names, tensor[i].chunk(len(names)), strict=True):
                old[f"{layer}.experts.{i}.{one}.weight"] = values.clone()
    fresh = model(moe.spec.blocks[0].channel, n_layers=2, seed=5)
    fresh.load_state_dict(old)
    moe.save_pretrained(tmp_path)
    save_file(old, tmp_path / "model.safetensors")
    for again in (fresh, load(tmp_path)):
        assert all(map(torch.equal, again.state_dict().values(), moe.state_dict().values()))
    del old["blocks.1.channel.experts.2.up_proj.weight"]
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"channel\.experts"):
        load(tmp_path)


@pytest.mark.parametrize("router", [TopK(bias_rate=0.1), Sinkhorn()], ids=str)
def test_loaded_models_go_on_balancing(router, tmp_path):
    moe = model(MoESpec(n_experts=4, router=router), n_layers=1)
    moe(IDS)
    moe.after_step()
    moe.save_pretrained(tmp_path)
    again = load(tmp_path).train()
    again.after_step()  # before any forward: nothing was counted
    for one in (moe, again):
        assert one.blocks[0].channel.gate.bias.any()
        one(IDS)
        one.after_step()
    assert all(map(torch.equal, again.state_dict().values(), moe.state_dict().values()))


def test_weights_start_as_those_of_single_swiglus():
    """Seeds mean what they meant when every expert was a module of its own."""
    generator = torch.Generator().manual_seed(3)
    moe = MoESpec(n_experts=3, hidden=5).build(LayerContext(4))
    moe.reset_parameters(2, torch.Generator().manual_seed(3))
    moe.gate.reset_parameters(generator)
    for i in range(3):
        one = SWIGLU(hidden=5).build(LayerContext(4))
        one.reset_parameters(2, generator)
        assert all(map(torch.equal, moe.experts.tensors(i), one.parameters()))


@pytest.mark.parametrize("channel", [SWIGLU(hidden=20), MLP()])
def test_upcycled_model_equals_the_dense_one(channel):
    dense = model(channel, dtype=torch.float64)
    sparse = upcycle(dense, 4, top_k=2, layers=[1])
    assert sparse.spec.blocks[0].channel == channel
    assert len(sparse.blocks[1].channel.experts) == 4
    assert_close(sparse(IDS).logits, dense(IDS).logits)
    for options in ({"noise": 0.1}, {"reinit": 0.5}):
        other = upcycle(dense, 4, **options)
        gap = (other(IDS).logits - dense(IDS).logits).abs().max()
        assert gap > 1e-4
    pairs = zip(
        other.blocks[0].channel.experts.tensors(2),
        dense.blocks[0].channel.parameters(),
        strict=True,
    )
    share = [(kept == was).double().mean() for kept, was in pairs]
    assert all(0.3 < s < 0.7 for s in share if s not in (0, 1))
    with pytest.raises(SpecError, match=r"blocks\[1\].channel: .* cannot be copied"):
        upcycle(sparse, 2, layers=[1])
