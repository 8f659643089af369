"""Two processes that share the experts compute what one does, and their biases move together."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tolerance import assert_close

from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.mixer import LayerContext
from kizzasi.models.moe import after_step, share_experts

SPEC = MoESpec(
    **{"n_experts": 4, "hidden": 8, "n_identity": 1, "balance_weight": 0, "z_loss_weight": 0},
    router=TopK(bias_rate=0.1),
)


def layer_and_tokens():
    moe = SPEC.build(LayerContext(6))
    moe.reset_parameters(1, torch.Generator().manual_seed(0))
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return moe.double(), x


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    moe, x = layer_and_tokens()
    share_experts(moe, dist.group.WORLD)
    x = x[rank : rank + 1].requires_grad_()
    y = moe(x).y
    y.cos().sum().backward()
    result = {"y": y.detach(), "x": x.grad, "gate": moe.gate.weight.grad}
    result |= {name: p.grad for name, p in moe.experts.own.named_parameters()}
    after_step(moe)
    result["bias"] = moe.gate.bias.clone()
    for _ in range(rank):  # forwards of one process alone wait for nobody
        moe.gate(x)
    after_step(moe.gate, dist.group.WORLD)
    result["tally"] = moe.gate.bias
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
    for name, p in moe.experts.named_parameters():
        assert_close(torch.cat([a[name], b[name]]), p.grad)
    for name in ("bias", "tally"):
        assert torch.equal(a[name], b[name])
    assert a["bias"].any()
    layer, x = layer_and_tokens()
    layer(x)
    after_step(layer)
    assert_close(a["bias"], layer.gate.bias)
