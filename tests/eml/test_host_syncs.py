"""How often a search waits for its device: counted on the CPU, where to wait is to read."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kizzasi.eml import (
    AntitheticES,
    BlockDescent,
    CoordinateDescent,
    GaussNewton,
    ModuleObjective,
    PatternSearch,
    SeparableCma,
    Spsa,
    minimize,
)
from kizzasi.eml.search.coordinate import ListedDescent

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}


class Reads(TorchDispatchMode):
    """Counts what needs values of tensors on the host: a number, a mask, a list, an array."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(tensor, *args, **options):
            self.count += 1
            return method(tensor, *args, **options)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        if func is torch.ops.aten.index.Tensor:
            self.count += any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


def test_reads_are_counted(monkeypatch):
    x = torch.ones(3)
    with Reads(monkeypatch) as reads:
        for look in (
            lambda: float(x.sum()),
            lambda: bool((x > 0).all()),
            lambda: x[x > 0],
            lambda: x.tolist(),
            lambda: x.numpy(),
            lambda: x.cpu(),
            lambda: x.nonzero(),
        ):
            before = reads.count
            look()
            assert reads.count > before
        before = reads.count
        torch.where(x > 0, x, x[torch.tensor([0, 1, 2])])
        assert reads.count == before


# The best loss is read once a step, for the history; a path of single trials is decided there too.
OPTIMIZERS = {
    BlockDescent(): 1,
    GaussNewton(4): 1,
    PatternSearch(): 1,
    AntitheticES(population=8): 1,
    Spsa(pairs=2, adam=True): 1,
    SeparableCma(): 1,
    CoordinateDescent(): 2,
    ListedDescent(torch.arange(400) % 6, torch.linspace(-0.5, 0.5, 400).double()): 2,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_a_step_waits_once_for_its_device(optimizer, monkeypatch):
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 3)

    def criterion(out):
        return (out - x).flatten() if optimizer.residuals else (out - x).square().mean()

    objective = ModuleObjective(module, criterion, x)
    if isinstance(optimizer, ListedDescent):
        objective = ModuleObjective(module, criterion, x, names=["0.weight"])
    objective(objective.start[None])  # settles how candidates are run
    runs = []
    for evaluations in (60, 240):
        with Reads(monkeypatch) as reads:
            found = minimize(objective, optimizer, evaluations=evaluations)
        monkeypatch.undo()
        runs.append((len(found.history), reads.count))
    (few, once), (many, twice) = runs
    assert many > few
    assert (twice - once) / (many - few) <= OPTIMIZERS[optimizer]
