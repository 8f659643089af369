"""Latent attention to fading summaries: the layer against the equations at the top of its file."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import MLASpec


def by_the_formula(layer, spec, x):
    """One document, token by token."""
    rank, m = spec.kv_lora_rank, spec.n_latents
    u, q = layer.kv_a_proj(x), layer.q_proj(x).unflatten(-1, (spec.n_heads, -1))
    ys = []
    summaries = []
    for t in range(len(x)):
        weights = torch.tensor([spec.fade ** (t - i) for i in range(t + 1)], dtype=x.dtype)
        summaries.append((weights[:, None] * u[: t + 1]).sum(0) / weights.sum())
        seen = [i for i in range(t) if (i + 1) % spec.every == 0] + [t]
        h = torch.stack([summaries[i] for i in seen])
        c, r = layer.kv_a_layernorm(h[:, :rank]), h[:, rank:]
        heads = []
        for head in range(spec.n_heads):
            group = head // (spec.n_heads // m)
            place = head % (spec.n_heads // m)
            up = layer.kv_b_proj[group](c.chunk(m, -1)[group])
            each = up.unflatten(-1, (spec.n_heads // m, -1))[:, place]
            k = torch.cat([each[:, : spec.qk_nope_head_dim], r], -1)
            z = k @ q[t, head] / spec.qk_head_dim**0.5
            heads.append(z.softmax(0) @ each[:, spec.qk_nope_head_dim :])
        ys.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(ys)


@pytest.mark.parametrize(("fade", "every", "parts"), [(0.5, 3, 2), (0.0, 2, 1), (0.9, 1, 4)])
def test_summaries_are_their_equations(fade, every, parts):
    spec = MLASpec(
        n_heads=4,
        kv_lora_rank=8,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=5,
        position="none",
        n_latents=parts,
        every=every,
        fade=fade,
    )
    layer = spec.build(LayerContext(12)).double()
    layer.reset_parameters(1, torch.Generator().manual_seed(0))
    x = torch.randn(1, 11, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(layer(x).y[0], by_the_formula(layer, spec, x[0]))
