"""The compiled kernels against the defining loops: every instruction set, dtype, length, thread
count, and the occasions on which torch's form answers in their place."""

import pytest
import torch
from kernel_cases import CPU, LENGTHS, B, document_starts, every_kernel, made, results
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.mixers import MambaSpec
from kizzasi.models.ops.selective_scan import SELECTIVE_SCAN

library = pytest.importorskip(
    "kizzasi.models.ops.native.library",
    reason="no compiled kernels here: python -m kizzasi.models.ops.native.build",
    exc_type=ImportError,
)


def assert_agrees(name, t, dtype, starts):
    leaves, run = made(name, t, dtype)
    found, expected = (results(run, engine, leaves, starts) for engine in ("native", "reference"))
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert_close(x, y, msg=f"{name}, {t} tokens, {dtype}, result {i}")


@every_kernel
@pytest.mark.parametrize("packed", [False, True])
def test_a_kernel_equals_the_loop_at_every_length(name, packed):
    for t in LENGTHS:
        for dtype in (torch.float64, torch.float32):
            assert_agrees(name, t, dtype, document_starts(t) if packed else None)


@every_kernel
@pytest.mark.parametrize("isa", library.AVAILABLE)
def test_every_instruction_set_of_this_machine_agrees(name, isa):
    assert isa in library.AVAILABLE
    with library.using(isa):
        for dtype in (torch.float64, torch.float32):
            assert_agrees(name, 35, dtype, document_starts(35))


@every_kernel
def test_inputs_may_lie_anywhere(name):
    """Transposed, or cut out of wider rows."""
    leaves, run = made(name, 9)
    expected = results(run, "native", leaves)
    apart = [x.detach().mT.contiguous().mT if x.ndim > 1 else x for x in leaves]
    wider = [torch.cat([x.detach(), x.detach()], -1)[..., : x.shape[-1]] for x in leaves]
    for moved in (apart, wider):
        found = results(run, "native", [x.detach().requires_grad_() for x in moved])
        for x, y in zip(found, expected, strict=True):
            assert_close(x, y)


@every_kernel
def test_second_derivatives_of_inputs_that_lie_anywhere(name):
    leaves, run = made(name, 5)
    found = []
    for engine in ("native", "reference"):
        moved = [x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach() for x in leaves]
        moved = [x.requires_grad_() for x in moved]
        first = torch.autograd.grad(run(engine, moved).square().sum(), moved, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), moved))
    for x, y in zip(*found, strict=True):
        assert_close(x, y)


@every_kernel
def test_threads_change_nothing(name, monkeypatch):
    leaves, run = made(name, 40)
    expected = results(run, "native", leaves)
    monkeypatch.setattr(library, "threads", lambda numbers: 3)
    assert all(map(torch.equal, results(run, "native", leaves), expected))


@every_kernel
def test_what_kernels_cannot_do_torch_does(name):
    """Second derivatives, many gradients at once, torch.func; where work is counted."""
    leaves, run = made(name, 5)
    again = []
    for engine in ("native", "reference"):
        out = run(engine, leaves).square().sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        again.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for actual, expected in zip(*again, strict=True):
        assert_close(actual, expected)
    rows = torch.eye(4, len(run("native", leaves)), dtype=torch.float64)
    batched = [
        torch.autograd.grad(run(engine, leaves), leaves, rows, is_grads_batched=True)
        for engine in ("native", "reference")
    ]
    for actual, expected in zip(*batched, strict=True):
        assert_close(actual, expected)
    inside = torch.func.grad(lambda x: run("native", [x, *leaves[1:]]).square().sum())(leaves[0])
    assert_close(inside, torch.autograd.grad(run("native", leaves).square().sum(), leaves[0])[0])
    counts = []
    for engine in ("native", "torch"):
        with FlopCounterMode(display=False) as counter:
            run(engine, leaves)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@every_kernel
def test_without_gradients_nothing_is_kept(name):
    leaves, run = made(name, 40)
    with torch.no_grad():
        out = run("native", leaves)
    assert not out.requires_grad
    assert torch.equal(out, run("native", leaves))


@every_kernel
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_in_its_document(name, bad):
    leaves, run = made(name, 12)
    starts = torch.arange(12).expand(B, -1) % 6 == 0
    clean = run("native", leaves, starts)
    for i, x in enumerate(leaves):
        if x.shape[:2] != (B, 12):
            continue
        spoilt = [v.detach().clone() for v in leaves]
        spoilt[i][1, 8] = bad
        y = run("native", spoilt, starts)
        share = y.isfinite()
        assert 0 < (~share).sum() < len(y) / B
        assert_close(y[share], clean[share])


def test_auto_is_native_on_a_cpu_and_a_model_says_so():
    assert SELECTIVE_SCAN.resolve("auto", CPU) == "native"
    spec = ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Tokens(7))
    model = build_model(spec)
    assert "engine=native, params=" in repr(model)
    assert build_model(spec, engine="native").blocks[0].mixer.engine == "native"
    assert "engine=torch, params=" in repr(build_model(spec, engine="torch"))


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'mmx' is not among"), library.using("mmx"):
        pass
