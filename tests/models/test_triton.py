"""Triton's kernels against the defining loops; without a GPU, in Triton's interpreter."""

import os
import subprocess
import sys

import kernel_cases
import pytest
import torch
from kernel_cases import KERNELS, document_starts, made, results
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import SpecError
from kizzasi.models.ops import devices, engines

pytest.importorskip("triton", reason="triton is not installed")
memory = pytest.importorskip("kizzasi.models.ops.triton.memory")
first_use = pytest.importorskip("kizzasi.models.ops.triton.first_use")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
every_kernel = pytest.mark.parametrize(
    "name", [name for name, (table, _) in KERNELS.items() if "triton" in table.names]
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Let the kernels run where the tensors are, on memory that is not a number, with few programs:
    the interpreter takes milliseconds for each."""
    monkeypatch.setitem(engines.DEVICES, "triton", DEVICE.type)
    monkeypatch.setattr(kernel_cases, "B", 1)
    for chunk in ("CHUNK", "CHUNK_OF_LOOKUPS"):
        monkeypatch.setattr(memory, chunk, 16)
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    poison = lambda v: v.fill_(float("nan")) if v.is_floating_point() else v  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def assert_agrees(name, t, dtype, starts):
    leaves, run = made(name, t, dtype, DEVICE)
    found, expected = (results(run, engine, leaves, starts) for engine in ("triton", "reference"))
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert_close(x, y, msg=f"{name}, {t} tokens, {dtype}, result {i}")


@every_kernel
@pytest.mark.parametrize(
    ("t", "dtype", "packed"), [(5, torch.float32, False), (18, torch.float64, True)]
)
def test_a_kernel_equals_the_loop(name, t, dtype, packed):
    """18 tokens: a chunk of 16 and a rest."""
    assert_agrees(name, t, dtype, document_starts(t) if packed else None)


@pytest.mark.parametrize(
    ("name", "t"),
    [*(("linear-head-bonus", t) for t in (1, 15, 16, 17)), ("delta-channel", 1), ("wkv7", 33)],
)
def test_chunks_of_any_length(name, t):
    assert_agrees(name, t, torch.float64, None)


@pytest.mark.parametrize("strong", [-torch.inf, -3e3])
@pytest.mark.parametrize("width", [1, 3])
def test_strong_decays_cost_weak_ones_no_digits(width, strong):
    """A difference of running sums of -3000 and more would be off by 1e-4."""
    q, k, v = (kernel_cases.normal(1, 30, 2, 3, seed=i) for i in range(3))
    w = -kernel_cases.normal(1, 30, 2, width).square() / 10
    w[:, 4::7] = strong
    leaves = [x.float().requires_grad_() for x in (q, k, v, w)]
    table = KERNELS["linear"][0]
    found, expected = (
        results(lambda engine, x, _: table.pick(engine, DEVICE)(*x)[0], engine, leaves)
        for engine in ("triton", "reference")
    )
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, torch.float32)


@pytest.mark.parametrize("name", ["scan", "conv", "delta"])
def test_inputs_may_lie_anywhere(name, monkeypatch):
    monkeypatch.setattr(kernel_cases, "B", 2)
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


@pytest.mark.parametrize("name", ["scan", "conv", "linear", "delta"])
def test_low_precision_is_summed_in_float32(name):
    """The values of bfloat16 inputs, summed in float32, rounded once."""
    leaves, run = made(name, 5, torch.bfloat16, DEVICE)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    found, expected = results(run, "triton", leaves), results(run, "reference", wide)
    for x, y in zip(found, expected, strict=True):
        assert_close(x.float(), y, torch.bfloat16)


@pytest.mark.parametrize(
    "name", ["scan", "conv", "decay", "linear", "ssd", "trapezoid", "delta", "wkv7"]
)
def test_what_is_not_a_number_stays_in_its_document(name, monkeypatch):
    monkeypatch.setattr(kernel_cases, "B", 2)
    leaves, run = made(name, 6, device=DEVICE)
    starts = (torch.arange(6).expand(2, -1) % 3 == 0).to(DEVICE)
    with torch.no_grad():
        clean = run("triton", leaves, starts)
        spoilt = [v.detach().clone() for v in leaves]
        spoilt[0][1, 4] = torch.nan
        y = run("triton", spoilt, starts)
    share = y.isfinite()
    assert 0 < (~share).sum() < len(y) / 2
    assert_close(y[share], clean[share])


def test_auto_is_triton_on_cuda_and_torch_where_it_looks_on():
    table = KERNELS["scan"][0]
    assert table.resolve("auto", torch.device("cuda")) == "triton"
    with FlopCounterMode(display=False):
        assert table.pick("triton", DEVICE) is table.pick("torch", DEVICE)
    assert table.pick("triton", DEVICE) is not table.pick("torch", DEVICE)


class Asked:
    """An op that counts its calls."""

    def __init__(self, run, name):
        self.run, self.calls, self.__name__ = run, 0, name

    def __call__(self, *given, **named):
        self.calls += 1
        return self.run(*given, **named)


@pytest.mark.parametrize("name", first_use.EXAMPLES)
def test_an_op_that_disagrees_with_its_loop_refuses_to_work(name, monkeypatch):
    """The torch form stands for the kernels: of the true op, and with a gradient that is off."""
    monkeypatch.setattr(devices, "on_cuda", lambda x: True)
    loop, example = first_use.EXAMPLES[name]
    torch_form = getattr(sys.modules[loop.__module__], name)
    op = Asked(torch_form, name)
    ready = first_use.proven(op)
    before = torch.get_rng_state()
    with torch.inference_mode():
        ready(*example())
    ready(*example())
    assert op.calls == 3  # the proof, once, and two calls
    assert torch.equal(torch.get_rng_state(), before)

    def spoilt(first, *rest):
        return torch_form(first + 1e-2 * (first - first.detach()), *rest)

    ready = first_use.proven(Asked(spoilt, name))
    for _ in range(2):
        with pytest.raises(SpecError, match=f"'triton' of {name} is .* away .* engine=\"torch\""):
            ready(*example())


def test_every_op_in_triton_proves_itself():
    """What its table calls is what `proven` made."""
    for _, (table, _) in KERNELS.items():
        if "triton" in table.names:
            op = getattr(table, "table", table)
            function = op._load("triton")
            assert function.__wrapped__.__name__ in first_use.EXAMPLES, op.op


COMPILE = """
import importlib
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SIZES = {"STEPS": 16, "BD": 32, "N": 16, "BM": 32, "BT": 32, "BC": 32, "K": 4, "BK": 16}
SIZES |= {"C": 16, "LEVELS": 4, "BN": 16, "TERMS": 2, "PRECISION": "tf32"}
for name in ("conv", "decay_scan", "products", "scores", "selective_scan"):
    module = importlib.import_module(f"kizzasi.models.ops.triton.{name}")
    for kernel in vars(module).values():
        if not isinstance(kernel, triton.JITFunction) or kernel.__name__.startswith("_"):
            continue
        names = {p.name for p in kernel.params if p.is_constexpr} - SIZES.keys()
        cases = [(False, False), (True, True)] if names else [(True, True)]
        for flag, one in [*cases, (True, False)] if "ONE" in names else cases:
            types, options = {}, {}
            for p in kernel.params:
                if p.is_constexpr:
                    own = one if p.name == "ONE" else flag
                    types[p.name], options[p.name] = "constexpr", SIZES.get(p.name, own)
                else:
                    own = {"starts_": "*u8", "doc_": "*i32"}.get(p.name, "*fp32")
                    types[p.name] = own if p.name.endswith("_") else "i32"
            source = ASTSource(kernel, types, options)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            print(kernel.__name__, flag, one, len(made.asm["cubin"]) > 0)
"""


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """To machine code (compute capability 9.0), which needs no GPU; every flag off, then on. Blocks
    are small, for the compiler's time."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True\n") == done.stdout.count("\n") == 25, done.stdout
