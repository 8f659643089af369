"""Two processes that share the experts compute what one process computes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tolerance import assert_close

from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.mixer import LayerContext

SPEC = MoESpec(n_experts=4, hidden=8, n_identity=1, balance_weight=0, z_loss_weight=0)


def layer_and_tokens():
    moe = SPEC.build(LayerContext(6))
    moe.reset_parameters(1, torch.Generator().manual_seed(0))
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return moe.double(), x


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    moe, x = layer_and_tokens()
    moe.share_experts(dist.group.WORLD)
    x = x[rank : rank + 1].requires_grad_()
    y = moe(x).y
    y.cos().sum().backward()
    result = {"y": y.detach(), "x": x.grad, "gate": moe.gate.weight.grad}
    result |= {
        f"{rank * 2 + i}.{n}": p.grad
        for i, e in enumerate(moe.experts)
        for n, p in e.named_parameters()
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_two_processes_equal_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    moe, x = layer_and_tokens()
    x.requires_grad_()
    y = moe(x).y
    y.cos().sum().backward()
    assert_close(torch.cat([a["y"], b["y"]]), y.detach())
    assert_close(torch.cat([a["x"], b["x"]]), x.grad)
    assert_close(a["gate"] + b["gate"], moe.gate.weight.grad)
    for i, expert in enumerate(moe.experts):
        for name, p in expert.named_parameters():
            assert_close((a if i < 2 else b)[f"{i}.{name}"], p.grad)
