"""Rotary positions: what the rotation means, and the published ways to stretch it."""

import math

import pytest
import torch
from tolerance import assert_close

from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.ops.rope import (
    ntk_theta,
    rope_frequencies,
    rope_tables,
    rotate,
    split_pairs,
    yarn_attention_factor,
)

CPU = torch.device("cpu")


def turn(x, position, theta=10000.0, scale=1.0):
    frequencies = rope_frequencies(x.shape[-1], theta, device=CPU, dtype=torch.float64)
    return rotate(x, *rope_tables(position, frequencies, scale))


def test_frequencies_are_powers_of_theta():
    got = rope_frequencies(8, 100.0, device=CPU, dtype=torch.float64)
    assert_close(got, torch.tensor([100 ** (-i / 4) for i in range(4)], dtype=torch.float64))
    assert rope_frequencies(2, 100.0, device=CPU, dtype=torch.float64).tolist() == [1.0]


def test_pairs_are_turned_by_their_angle():
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    got = turn(x, torch.tensor([[3]]), theta=16.0)
    for i, frequency in enumerate((1.0, 0.25)):
        c, s = math.cos(3 * frequency), math.sin(3 * frequency)
        a, b = x[..., i], x[..., i + 2]
        assert_close(got[..., i], c * a - s * b)
        assert_close(got[..., i + 2], s * a + c * b)


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(m, n):
        at = torch.tensor([[m]]), torch.tensor([[n]])
        return (turn(q, at[0]) * turn(k, at[1])).sum()

    assert_close(score(7, 3), score(1007, 1003))
    assert not torch.allclose(score(7, 3), score(7, 4))


def test_interleaved_pairs_are_turned_as_the_paper_turns_them():
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    position = torch.tensor([[0, 1, 7]])
    got = turn(split_pairs(x), position, theta=16.0)
    frequencies = rope_frequencies(8, 16.0, device=CPU, dtype=torch.float64)
    angle = position[0, :, None] * frequencies
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(angle * 0 + 1, angle)
    assert_close(got, torch.cat([turned.real, turned.imag], -1))


def test_partial_rotation_leaves_the_rest():
    x = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    position = torch.arange(5).expand(2, -1)
    tables = rope_tables(position, rope_frequencies(4, 1e4, device=CPU, dtype=torch.float64))
    got = rotate(x, *tables)
    assert torch.equal(got[..., 4:], x[..., 4:])
    assert_close(got[..., :4], turn(x[..., :4], position))


def test_low_precision_is_rotated_in_float32():
    x = torch.randn(1, 2, 3, 8).bfloat16()
    tables = rope_tables(torch.tensor([[0, 1000, 5000]]), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert tables.dtype == torch.float32
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())


def test_the_ends_of_yarns_blend_may_stand_between_pairs():
    """gpt-oss: the ramp from pair 8.09 to 17.40 of 32, by hand."""
    theta, context, n = 150000.0, 4096, 64
    scaling = RopeScaling("yarn", 32.0, context, truncate=False)
    got = scaling.frequencies(n, theta, device=CPU, dtype=torch.float64)
    plain = rope_frequencies(n, theta, device=CPU, dtype=torch.float64)
    low, high = (32 * math.log(context / (2 * math.pi * r), theta) for r in (32, 1))
    ramp = ((torch.arange(32).double() - low) / (high - low)).clamp(0, 1)
    assert_close(got, plain * (1 - ramp) + plain / 32 * ramp)
    rounded = RopeScaling("yarn", 32.0, context).frequencies(n, theta, device=CPU, dtype=got.dtype)
    assert not torch.allclose(got, rounded)


def test_ntk_stretches_the_slowest_pair_by_the_factor():
    n, theta, factor = 16, 10000.0, 4.0
    plain = rope_frequencies(n, theta, device=CPU, dtype=torch.float64)
    stretched = rope_frequencies(n, ntk_theta(theta, factor, n), device=CPU, dtype=torch.float64)
    assert_close(plain[-1] / stretched[-1], torch.tensor(factor, dtype=torch.float64))
    assert_close(plain[0], stretched[0])


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    scaling = RopeScaling("yarn", 8.0, original_context=2048)
    where = {"device": CPU, "dtype": torch.float64}
    ratio = rope_frequencies(64, 1e4, **where) / scaling.frequencies(64, 1e4, **where)
    assert ratio[0] == 1
    assert_close(ratio[-1], torch.tensor(8.0, dtype=torch.float64))
    assert (ratio.diff() >= 0).all()
    assert scaling.scale == yarn_attention_factor(8.0) == 0.1 * math.log(8) + 1
    assert RopeScaling("yarn", 8.0, 2048, attention_factor=1.5).scale == 1.5
    assert yarn_attention_factor(1.0) == 1.0


@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        # their dynamic form at seq_len 2 x 128 has the static factor 2 x 2 - (2 - 1) = 3
        (RopeScaling("ntk", 3.0), {"rope_type": "dynamic", "factor": 2.0}),
        (
            RopeScaling("yarn", 4.0, original_context=128),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            RopeScaling("yarn", 40.0, 4096, beta_fast=16.0, beta_slow=2.0),
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
        (
            RopeScaling("yarn", 4.0, 16, attention_factor=0.7),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 0.7,
            },
        ),
        (
            RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
    ],
)
@pytest.mark.parametrize(("head_dim", "theta"), [(32, 10000.0), (64, 500000.0), (6, 100.0)])
def test_scaling_equals_transformers(scaling, theirs, head_dim, theta):
    pytest.importorskip("transformers", reason="parity with transformers: it is not installed")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": theta, **theirs},
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, CPU, seq_len=256)
    ours = scaling.frequencies(head_dim, theta, device=CPU, dtype=torch.float64)
    torch.testing.assert_close(ours.float(), frequencies, rtol=1e-6, atol=0)
    assert scaling.scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(("seq_len", "chosen"), [(256, "long_factor"), (64, "short_factor")])
def test_longrope_equals_transformers(seq_len, chosen):
    pytest.importorskip("transformers", reason="parity with transformers: it is not installed")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    lists = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 4.0, 9.0, 16.0]}
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={
            "rope_theta": 100.0,
            "rope_type": "longrope",
            "original_max_position_embeddings": 64,
            "factor": 8.0,
            **lists,
        },
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](config, CPU, seq_len=seq_len)
    ours = RopeScaling("longrope", 8.0, 64, divisors=tuple(lists[chosen]))
    got = ours.frequencies(8, 100.0, device=CPU, dtype=torch.float64)
    torch.testing.assert_close(got.float(), frequencies, rtol=1e-6, atol=0)
    assert ours.scale == pytest.approx(scale, rel=1e-12)
    assert RopeScaling.from_dict(ours.to_dict()) == ours
