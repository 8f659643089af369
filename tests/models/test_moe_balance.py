"""A toy task on which top-1 routing without balancing collapses, and balanced routing does not."""

import pytest
import torch

from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.moe_routers import NoisyTopK, TopK
from kizzasi.models.channels.moe_telemetry import watch_routing
from kizzasi.models.mixer import LayerContext


def toy_batch(seed, n_rows, generator):
    """Eight clusters off the origin, each with its own linear map to learn."""
    fixed = torch.Generator().manual_seed(1000 + seed)
    centres, maps = torch.randn(8, 16, generator=fixed), torch.randn(8, 16, 16, generator=fixed) / 4
    cluster = torch.randint(0, 8, (n_rows, 256), generator=generator)
    x = centres[cluster] + 0.5 * torch.randn(n_rows, 256, 16, generator=generator)
    return x + 0.7, torch.einsum("btd,btde->bte", x, maps[cluster])


def toy_run(spec, seed):
    """Train; returns the loss and the max violation on fresh data."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    moe = spec.build(LayerContext(16))
    moe.reset_parameters(1, generator)
    optimizer = torch.optim.Adam(moe.parameters(), 1e-2)
    for _ in range(300):
        x, y = toy_batch(seed, 1, generator)
        out = moe(x)
        ((out.y - y).square().mean() + sum(out.aux.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    x, y = toy_batch(seed, 16, generator)
    with watch_routing(moe.eval()) as usage, torch.no_grad():
        loss = (moe(x).y - y).square().mean()
    return float(loss), usage[""].max_violation


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unbalanced_routing_collapses_and_balanced_routing_does_not(seed):
    base = {"top_k": 1, "hidden": 16, "z_loss_weight": 0.0}
    quiet = {**base, "balance_weight": 0.0}
    collapsed_loss, violation = toy_run(MoESpec(**quiet, normalize="all"), seed)
    assert violation > 1.5
    aux_free = TopK(score="sigmoid", bias_rate=0.002)
    noisy = {"importance_weight": 0.5, "load_weight": 0.5, "router": NoisyTopK()}
    for spec in (
        MoESpec(**base, normalize="all", balance_weight=0.5),
        MoESpec(**quiet, normalize="none", router=aux_free),
        MoESpec(**quiet, normalize="all", **noisy),
    ):
        loss, violation = toy_run(spec, seed)
        assert violation < 0.3
        assert loss <= collapsed_loss
