"""What every parameter is, and what follows: Muon's matrices, adapters' targets."""

import pytest
import torch
from cases import every_kind, every_part, make, model_spec, tokens
from torch import nn

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model, parameter_groups
from kizzasi.models.groups import lora_targets, parameter_roles
from kizzasi.models.mixers import MambaSpec
from kizzasi.train.muon import Muon

# All that has two dimensions and is neither a matrix, a filter nor a table.
DECAYS_AND_MIXES = {
    "A_log", "A_imag", "log_A_real", "B", "C", "P", "B_bias", "C_bias", "r_k", "time_decay",
    "time_faaaa", "chain", "R", "bias", "gate.weight", "mimo_x", "mimo_z", "mimo_o",
}  # fmt: skip


@every_part
def test_every_parameter_has_a_role(name):
    model = build_model(model_spec(name), device="meta")
    roles = parameter_roles(model)
    parameters = dict(model.named_parameters())
    assert roles.keys() == parameters.keys()
    assert roles["stem.embedding.weight"] == "embedding"
    assert roles["stem.lm_head.weight"] == "head"
    assert roles["norm.weight"] == "gain"
    for key, role in roles.items():
        if role == "vector" and parameters[key].ndim >= 2:
            known = key.rpartition(".")[2] in DECAYS_AND_MIXES
            assert known or key.endswith("gate.weight"), key
        if role == "matrix":
            assert parameters[key].ndim in (2, 3), key


@every_part
def test_muon_takes_every_matrix_in_its_parts(name):
    model = build_model(model_spec(name), device="meta")
    groups = parameter_groups(model, 1e-3, 0.1, optimizer="muon", matrix_lr=0.02)
    optimizer = Muon(groups)  # refuses rows that do not add up
    matrices = {id(p) for g in optimizer.param_groups if g["rows"] is not None for p in g["params"]}
    roles, parameters = parameter_roles(model), dict(model.named_parameters())
    assert matrices == {id(parameters[key]) for key in roles if roles[key] == "matrix"}
    assert sum(len(g["params"]) for g in groups) == len(parameters)
    plain = parameter_groups(model, 1e-3, 0.1)
    assert not any("rows" in group for group in plain)
    assert {id(p) for g in plain if g["weight_decay"] for p in g["params"]} == {
        id(p) for g in groups if g["weight_decay"] for p in g["params"]
    }


def test_fused_projections_are_split_where_the_mixer_splits_them():
    model = build_model(ModelSpec(8, (BlockSpec(MambaSpec(d_state=3)),), Tokens(5)), device="meta")
    mixer = model.blocks[0].mixer
    groups = parameter_groups(mixer, 1.0, optimizer="muon")
    rows = {id(p): g.get("rows") for g in groups for p in g["params"]}
    assert rows[id(mixer.in_proj.weight)] == (16, 16)
    assert rows[id(mixer.x_proj.weight)] == (1, 3, 3)
    assert rows[id(mixer.out_proj.weight)] == ()
    assert rows[id(mixer.A_log)] is None


def test_a_signal_models_two_ends_are_no_matrices():
    spec = ModelSpec(8, (BlockSpec(MambaSpec(d_state=3)),), Signal(2, 3))
    roles = parameter_roles(build_model(spec, device="meta"))
    assert roles["stem.in_proj.weight"] == "embedding"
    assert roles["stem.out_proj.weight"] == "head"


def test_a_users_own_layers_have_roles_too():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(4, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2))
    assert parameter_roles(net) == {
        "0.weight": "embedding",
        "1.weight": "conv",
        "1.bias": "vector",
        "2.weight": "gain",
        "2.bias": "vector",
        "3.weight": "matrix",
        "3.bias": "vector",
    }


def test_a_tied_table_is_an_embedding_and_counts_once():
    model = build_model(model_spec("attention-mha").replace(tie_head=True), device="meta")
    roles = parameter_roles(model)
    assert roles["stem.embedding.weight"] == "embedding"
    assert "head" not in roles.values()


@every_kind
def test_lora_targets_are_what_peft_wraps(name):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = make(name, dtype=torch.float32)
    names, share = lora_targets(model)
    assert 0 < share < 1
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    wrapped = [n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert sorted(wrapped) == sorted(names)


def learns(name, steps):
    """Losses of training on one repeating batch with Muon."""
    model, x = make(name, dtype=torch.float32), tokens(4, 33)
    groups = parameter_groups(model, 3e-3, 0.1, optimizer="muon", matrix_lr=1e-2)
    optimizer, losses = Muon(groups), []
    for _ in range(steps):
        loss = model(x[:, :-1]).loss(x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step()
        losses.append(loss.item())
    return losses


@every_kind
def test_every_kind_learns_under_muon(name):
    losses = learns(name, 35)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1  # one step's loss may stand out


@pytest.mark.slow
@every_kind
def test_every_kind_trains_200_steps_under_muon_without_a_spike(name):
    losses = learns(name, 200)
    lowest = losses[0]
    for loss in losses:
        assert loss < lowest + 0.5, f"a spike to {loss:.3f} after {lowest:.3f}"
        lowest = min(lowest, loss)
    assert losses[-1] < losses[0] - 1


def test_what_muon_is_not_asked_for_is_refused():
    layer = nn.Linear(2, 2)
    with pytest.raises(SpecError, match="optimizer: 'lion' unknown"):
        parameter_groups(layer, 1.0, optimizer="lion")
    with pytest.raises(SpecError, match="matrix_lr: only Muon"):
        parameter_groups(layer, 1.0, matrix_lr=0.1)
