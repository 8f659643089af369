"""Triton's kernels against the defining loops; without a GPU, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import KERNELS, B, document_starts, made, results
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.models.ops import engines

pytest.importorskip("triton", reason="triton is not installed")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
every_kernel = pytest.mark.parametrize(
    "name", [name for name, (table, _) in KERNELS.items() if "triton" in table.names]
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Let the kernels run where the tensors are."""
    monkeypatch.setitem(engines.DEVICES, "triton", DEVICE.type)


def assert_agrees(name, t, dtype, starts):
    leaves, run = made(name, t, dtype, DEVICE)
    found, expected = (results(run, engine, leaves, starts) for engine in ("triton", "reference"))
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert_close(x, y, msg=f"{name}, {t} tokens, {dtype}, result {i}")


@every_kernel
@pytest.mark.parametrize(
    ("t", "dtype", "packed"),
    [(1, torch.float32, True), (5, torch.float32, False), (18, torch.float64, True)],
)
def test_a_kernel_equals_the_loop(name, t, dtype, packed):
    assert_agrees(name, t, dtype, document_starts(t) if packed else None)


@pytest.mark.parametrize("name", ["scan", "conv", "delta"])
def test_inputs_may_lie_anywhere(name):
    leaves, run = made(name, 3, device=DEVICE)
    expected = results(run, "triton", leaves)
    moved = [x.detach().mT.contiguous().mT if x.ndim > 1 else x for x in leaves]
    found = results(run, "triton", [x.detach().requires_grad_() for x in moved])
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("name", ["scan", "conv", "linear", "decay"])
def test_what_kernels_cannot_do_torch_does(name):
    """Second derivatives, of inputs that lie anywhere."""
    leaves, run = made(name, 3, device=DEVICE)
    leaves = [x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    again = []
    for engine in ("triton", "reference"):
        out = run(engine, leaves).square().sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        again.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for actual, expected in zip(*again, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("name", ["scan", "conv"])
def test_low_precision_is_read_as_it_is(name):
    """The values of bfloat16 inputs, summed in float32, rounded once."""
    leaves, run = made(name, 5, torch.bfloat16, DEVICE)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    found, expected = results(run, "triton", leaves), results(run, "reference", wide)
    for x, y in zip(found, expected, strict=True):
        assert_close(x.float(), y, torch.bfloat16)


@every_kernel
def test_what_is_not_a_number_stays_in_its_document(name):
    leaves, run = made(name, 6, device=DEVICE)
    starts = (torch.arange(6).expand(B, -1) % 3 == 0).to(DEVICE)
    with torch.no_grad():
        clean = run("triton", leaves, starts)
        spoilt = [v.detach().clone() for v in leaves]
        spoilt[0][1, 4] = torch.nan
        y = run("triton", spoilt, starts)
    share = y.isfinite()
    assert 0 < (~share).sum() < len(y) / B
    assert_close(y[share], clean[share])


def test_auto_is_triton_on_cuda_and_torch_where_it_looks_on():
    table = KERNELS["scan"][0]
    assert table.resolve("auto", torch.device("cuda")) == "triton"
    with FlopCounterMode(display=False):
        assert table.pick("triton", DEVICE) is table.pick("torch", DEVICE)
    assert table.pick("triton", DEVICE) is not table.pick("torch", DEVICE)


COMPILE = """
import importlib, itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SIZES = {"STEPS": 16, "BD": 32, "N": 16, "BM": 32, "BT": 32, "BC": 64, "K": 4}
for name in ("conv", "decay_scan", "memory", "selective_scan"):
    module = importlib.import_module(f"kizzasi.models.ops.triton.{name}")
    for kernel in vars(module).values():
        if not isinstance(kernel, triton.JITFunction) or kernel.__name__.startswith("_"):
            continue
        for flag in (False, True):
            types, options = {}, {}
            for p in kernel.params:
                if p.is_constexpr:
                    types[p.name], options[p.name] = "constexpr", SIZES.get(p.name, flag)
                else:
                    own = {"starts_": "*u8", "doc_": "*i32"}.get(p.name, "*fp32")
                    types[p.name] = own if p.name.endswith("_") else "i32"
            source = ASTSource(kernel, types, options)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            print(kernel.__name__, flag, len(made.asm["cubin"]) > 0)
"""


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """To machine code (compute capability 9.0), which needs no GPU; every flag off, then on."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True\n") == done.stdout.count("\n") == 18
