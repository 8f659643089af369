"""Under torch.compile every router trains: the same losses, gradients and biases as without.

The fast suite captures the graphs and runs them as they are ("eager"), the slow one has the
compiler derive their gradients ("aot_eager").
"""

import pytest
import torch
from tolerance import assert_close

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.moe_routers import (
    ExpertChoice,
    Hash,
    NoisyTopK,
    Sinkhorn,
    Softmax,
    TopK,
)
from kizzasi.models.mixer import ChannelSpec
from kizzasi.models.mixers import MambaSpec
from kizzasi.models.moe import after_every_step

# The compiler itself makes a Function and looks at .grad while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
SWIGLU, MLP = ChannelSpec.registry["swiglu"], ChannelSpec.registry["mlp"]
DEEPSEEK = TopK(score="sigmoid", bias_rate=0.1, n_groups=2, top_groups=1, group_best=2)
SPECS = {
    "deepseek": MoESpec(n_experts=4, router=DEEPSEEK, shared_hidden=8, sequence_weight=0.1),
    "sinkhorn": MoESpec(n_experts=4, router=Sinkhorn()),
    "softmax": MoESpec(n_experts=3, top_k=3, router=Softmax(), importance_weight=0.1),
    "noisy": MoESpec(n_experts=4, router=NoisyTopK(), load_weight=0.1),
    "expert_choice": MoESpec(n_experts=4, router=ExpertChoice(), normalize="all"),
    "hash": MoESpec(n_experts=4, router=Hash(n_bits=4)),
    "capacity": MoESpec(n_experts=4, capacity_factor=0.6),
    "chance": MoESpec(n_experts=4, jitter=0.1, expert_dropout=0.2),
    "null": MoESpec(n_experts=4, n_null=1, n_identity=1),
    "mixed": MoESpec(n_experts=3, experts=(SWIGLU(hidden=8), MLP(), SWIGLU(hidden=12))),
}
X = torch.randint(0, 13, (3, 4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(9) >= torch.tensor([[0], [0], [3], [5]])


def make(spec, n_layers=1):
    block = BlockSpec(MambaSpec(d_state=2), spec)
    model = build_model(ModelSpec(8, (block,) * n_layers, Tokens(13)), dtype=torch.float64)
    return model.train()


def train(model, call, mask=None):
    """Three steps of two batches each; losses, then everything that the model holds."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    after_every_step(optimizer, model)
    torch.manual_seed(0)
    losses = []
    for x in X:
        for rows in x.split(2):
            own = None if mask is None else mask[: len(rows)]
            losses.append(call(rows, mask=own).loss(rows))
            losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.detach() for loss in losses], model.state_dict()


def assert_trains_alike(a, b):
    (losses, state), (wanted, wanted_state) = a, b
    for x, y in zip(losses, wanted, strict=True):
        assert_close(x, y)
    for name, tensor in state.items():
        assert tensor.device.type == "cpu", name
        assert_close(tensor.double(), wanted_state[name].double(), msg=name)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_every_router_trains_under_compile(name, backend):
    torch._dynamo.reset()
    model = make(SPECS[name])
    call = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    given = train(model, call)
    wanted = make(SPECS[name])
    assert_trains_alike(given, train(wanted, wanted))
    bias = getattr(model.blocks[0].channel.gate, "bias", None)
    assert bias is None or bias.any()


@pytest.mark.parametrize("name", ["deepseek", "sinkhorn"])
def test_biases_are_exact_with_padding_and_recomputed_blocks(name):
    wanted, model = make(SPECS[name]), make(SPECS[name])
    model.recompute = True
    assert_trains_alike(train(model, model, MASK), train(wanted, wanted, MASK))


@pytest.mark.parametrize("name", ["deepseek", "sinkhorn"])
def test_biases_are_exact_with_recomputed_blocks_under_compile(name):
    torch._dynamo.reset()
    wanted, model = make(SPECS[name]), make(SPECS[name])
    model.recompute = True
    call = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_trains_alike(train(model, call), train(wanted, wanted))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_deepseek_trains_under_inductor():
    torch._dynamo.reset()
    model, wanted = make(SPECS["deepseek"]), make(SPECS["deepseek"])
    assert_trains_alike(train(model, torch.compile(model)), train(wanted, wanted))
