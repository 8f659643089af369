"""Which implementation of an op runs: the rule, what is refused, and that nothing is swapped."""

import ast
import sys
import types
from pathlib import Path

import pytest
import torch

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, KDASpec, MambaSpec, RWKV7Spec
from kizzasi.models.ops.delta import DELTA_RULE, delta_rule, delta_rule_ref, delta_rule_step
from kizzasi.models.ops.engines import Engines

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def loop():
    return "loop"


def fast():
    return "fast"


@pytest.fixture
def kernels(monkeypatch):
    module = types.ModuleType("some_kernels")
    module.compiled = lambda: "compiled"
    module.fused = lambda: "fused"
    monkeypatch.setitem(sys.modules, "some_kernels", module)


def test_auto_takes_what_is_fastest_where_the_inputs_are(kernels):
    op = Engines(
        "op",
        reference=loop,
        torch=fast,
        native="some_kernels:compiled",
        triton="some_kernels:fused",
    )
    assert op.names == ("reference", "torch", "native", "triton")
    assert op.pick("auto", CPU)() == "compiled"
    assert op.pick("auto", CUDA)() == "fused"
    assert op.pick("auto", torch.device("meta"))() == "fast"
    assert op.pick("reference", CUDA)() == "loop"
    assert op.pick("torch", CPU)() == "fast"
    with pytest.raises(SpecError, match="engine: 'native' runs on cpu, not on cuda:0"):
        op.pick("native", CUDA)
    with pytest.raises(SpecError, match="engine: 'triton' runs on cuda, not on cpu"):
        op.pick("triton", CPU)


def test_what_is_missing_is_refused_by_name_and_passed_over_by_auto():
    op = Engines("op", reference=loop, torch=fast, native="no_such_module:compiled")
    assert op.pick("auto", CPU)() == "fast"
    with pytest.raises(SpecError, match="'native' of op cannot be imported"):
        op.pick("native", CPU)
    bare = Engines("op", reference=loop, torch=fast)
    rule = r"engine: op has no 'native'; choose auto or one of \['reference', 'torch'\]"
    with pytest.raises(SpecError, match=rule):
        bare.pick("native", CPU)


def spec(*mixers):
    return ModelSpec(16, tuple(BlockSpec(mixer) for mixer in mixers), Tokens(7))


def test_a_model_says_which_engines_it_runs_on_and_refuses_others(tmp_path):
    both = spec(AttentionSpec(2), RWKV7Spec(head_dim=8))
    model = build_model(both, engine="torch")
    assert "engine=torch, params=" in repr(model)
    model.blocks[1].mixer.engine = "reference"
    assert "engine=reference+torch" in repr(model)
    assert "engine=reference," in repr(build_model(both, engine="reference"))
    for name, rule in (
        ("triton", r"blocks.0.mixer: engine: attention has no 'triton'"),
        ("native", r"blocks.0.mixer: engine: attention has no 'native'"),
        ("tritn", r"engine: 'tritn' is unknown; choose one of \['auto', 'reference', "),
    ):
        with pytest.raises(SpecError, match=rule):
            build_model(both, engine=name)
    model.save_pretrained(tmp_path / "model")
    assert "engine=reference," in repr(load(tmp_path / "model", engine="reference"))
    with pytest.raises(CheckpointError, match=r"has no 'triton'"):
        load(tmp_path / "model", engine="triton")


def test_the_engine_asked_for_is_the_one_that_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(DELTA_RULE, "_later", {})  # as where no kernel is compiled
    monkeypatch.setitem(
        DELTA_RULE._ready, "torch", lambda *a: calls.append("torch") or delta_rule(*a)
    )
    monkeypatch.setitem(
        DELTA_RULE._ready, "reference", lambda *a: calls.append("loop") or delta_rule_ref(*a)
    )
    mixer, x = KDASpec(n_heads=2).build(LayerContext(16)), torch.randn(1, 3, 16)
    for mixer.engine in ("auto", "torch", "reference"):
        mixer(x)
    assert calls == ["torch", "torch", "loop"]


def test_every_op_with_a_defining_loop_ends_with_its_table():
    folder = Path(__file__).parents[2] / "kizzasi/models/ops"
    loops, tabled = set(), set()
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text())
        named = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        loops |= {name for name in named if name.endswith("_ref")}
        tables = [
            n for n in tree.body if isinstance(n, ast.Assign) and "Engines(" in ast.unparse(n)
        ]
        assert not tables or tree.body[-1] is tables[-1], path
        for table in tables:
            assert isinstance(table.value, ast.Call)
            tabled |= {ast.unparse(k.value) for k in table.value.keywords if k.arg == "reference"}
    assert tabled - loops == {"no_program"}  # a program repeats steps; it defines none
    assert loops <= tabled


@pytest.mark.parametrize("op", [delta_rule, delta_rule_ref])
def test_an_op_decides_its_precision(op):
    """bfloat16 in, at least float32 inside and in the memory, under autocast too."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 4, generator=g) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)
    decay, beta = -torch.rand(1, 9, 2, 1, generator=g), torch.rand(1, 9, 2, generator=g)
    low = [x.bfloat16() for x in (q, k, v, decay, beta)]
    expected = op(*(x.float() for x in low))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, memory = op(*low)
        step, _ = delta_rule_step(memory, *(x[:, 0] for x in low))
    assert y.dtype == memory.dtype == step.dtype == torch.float32
    assert torch.equal(y, expected[0])
    assert torch.equal(memory, expected[1])


def test_layers_without_an_op_of_their_own_run_as_they_are():
    """A plain layer has one way to run, under every name that the other layers have."""
    from kizzasi.models.channels import MLPSpec

    block = BlockSpec(MambaSpec(d_state=4), MLPSpec())
    model = build_model(ModelSpec(16, (block,), Tokens(7)), engine="reference")
    assert model.blocks[0].channel.ops == ()
