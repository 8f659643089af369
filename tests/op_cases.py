"""Every op that has a fast form and a defining loop, with small inputs in float64."""

import pytest
import torch

from kizzasi.models.ops import conv, scan


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def short_conv():
    return (normal(2, 9, 3), normal(3, 4), normal(3), normal(2, 3, 3)), {"silu": True}


def selective():
    b, t, d, n = 2, 9, 3, 2
    u, B, C = normal(b, t, d), normal(b, t, n, seed=1), normal(b, t, n, seed=2)
    dt, A = 0.1 + 0.1 * normal(b, t, d, seed=3).sigmoid(), -normal(d, n).exp()
    return (u, dt, A, B, C, normal(d), normal(b, d, n)), {}


# name: fast op, loop, inputs that have gradients, index of the first that is a state
OPS = {
    "conv": (conv.causal_conv1d, conv.causal_conv1d_ref, short_conv, 3),
    "scan": (scan.selective_scan, scan.selective_scan_ref, selective, 6),
}
STARTS = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0, 0]]).bool()

every_op = pytest.mark.parametrize("name", OPS)
