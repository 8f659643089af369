"""What a mixture's spec refuses, and the words it uses."""

import pytest

from kizzasi.errors import SpecError
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.moe_routers import ExpertChoice, Softmax, TopK
from kizzasi.models.mixer import ChannelSpec

SWIGLU = ChannelSpec.registry["swiglu"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, r"moe.top_k: 9 is more than the 8 choices"),
        ({"top_k": 1}, r"moe.normalize: top_k 1 with \"topk\""),
        ({"n_experts": 0}, r"moe.n_experts: 0 is not positive"),
        ({"load_weight": 0.1}, r"moe.load_weight: only the router noisy_top_k"),
        ({"balance_weight": -1.0}, r"moe.balance_weight: -1.0 is negative"),
        ({"jitter": 1.0}, r"moe.jitter: 1.0 is outside"),
        (
            {"capacity_factor": 1.0, "router": ExpertChoice(), "normalize": "all"},
            r"moe.capacity_factor: expert choice fills",
        ),
        ({"shared_gate": True}, r"moe.shared_gate: there is no shared expert"),
        ({"router": TopK(n_groups=3)}, r"moe.router.n_groups: 3 does not divide"),
        ({"router": TopK(n_groups=8)}, r"moe.router.top_groups: 1 of 8 groups hold fewer"),
        ({"router": Softmax()}, r"moe.top_k: the softmax router uses all 8"),
        ({"experts": (SWIGLU(),)}, r"moe.n_experts: 8, but `experts` lists 1"),
        ({"n_experts": 2, "experts": (MoESpec(), SWIGLU())}, r"moe.experts\[0\]: 'moe' cannot be"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(SpecError, match=message):
        MoESpec(**changes).check(24, "moe")
