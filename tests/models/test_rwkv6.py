"""RWKV-5.2 and RWKV-6: each time mix against a loop written from the paper, and its names."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.rwkv5 import RWKV5Spec
from kizzasi.models.mixers.rwkv6 import RWKV6Spec

D, N = 12, 4
LAYER = LayerContext(D, index=1, n_layers=3)
SPECS = {"rwkv5": RWKV5Spec(N), "rwkv6": RWKV6Spec(N, mix_rank=3, decay_rank=2)}
both = pytest.mark.parametrize("kind", SPECS)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(kind, noise=0.3):
    module = SPECS[kind].build(LAYER).double()
    module.reset_parameters(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.add_(noise * draw(*p.shape, seed=i))
    return module


def eagle_streams(p, x, before):
    """Equations 3 to 5: inputs of r, k, v, g, and the decay of every channel."""
    mixed = (x * (m := p[f"time_mix_{s}"]) + before * (1 - m) for s in "rkvg")
    return *mixed, torch.exp(-torch.exp(p["time_decay"].flatten()))


def finch_streams(p, x, before):
    """Equations 10 to 15, ddlerp and the decay, for one token."""
    gate = x + (before - x) * p["time_maa_x"]
    low = torch.tanh(gate @ p["time_maa_w1"]).view(5, -1)

    def ddlerp(stream):
        i = "wkvrg".index(stream)
        return x + (before - x) * (p[f"time_maa_{stream}"] + low[i] @ p["time_maa_w2"][i])

    rate = p["time_decay"] + torch.tanh(ddlerp("w") @ p["time_decay_w1"]) @ p["time_decay_w2"]
    return *(ddlerp(s) for s in "rkvg"), torch.exp(-torch.exp(rate))


def paper(module, x, streams):
    """One token and one head at a time, for one sequence x (t, d). Returns y and the memory."""
    p = dict(module.named_parameters())
    memory, before, ys = torch.zeros(D // N, N, N, dtype=x.dtype), torch.zeros_like(x[0]), []
    for token in x:
        x_r, x_k, x_v, x_g, w = streams(p, token, before)
        r, k, v = (
            (p[f"{name}.weight"] @ s).view(-1, N)
            for name, s in (("receptance", x_r), ("key", x_k), ("value", x_v))
        )
        heads = []
        for h, decay in enumerate(w.view(-1, N)):
            written = torch.outer(k[h], v[h])
            read = r[h] @ (memory[h] + torch.diag(p["time_faaaa"][h]) @ written)
            heads.append(read / 8)  # head_size_divisor, with an eps of 1e-5
            memory = memory.index_put((torch.tensor(h),), torch.diag(decay) @ memory[h] + written)
        y = F.group_norm(
            torch.cat(heads)[None], D // N, p["ln_x.weight"], p["ln_x.bias"], eps=1e-5
        )[0]
        ys.append(p["output.weight"] @ (F.silu(p["gate.weight"] @ x_g) * y))
        before = token
    return torch.stack(ys), memory


@both
@pytest.mark.parametrize("length", [1, 6, 37])
def test_it_is_the_papers_loop(kind, length):
    module, x = build(kind), draw(2, length, D)
    out = module(x)
    for row in range(2):
        streams = eagle_streams if kind == "rwkv5" else finch_streams
        y, memory = paper(module, x[row], streams)
        assert_close(out.y[row], y)
        assert_close(out.state.wkv[row], memory)
    assert torch.equal(out.state.shift, x[:, -1])


@both
def test_names_are_the_published_ones(kind):
    matrices = "receptance key value gate output ln_x"
    own = {
        "rwkv5": "time_mix_k time_mix_v time_mix_r time_mix_g time_decay time_faaaa",
        "rwkv6": "time_maa_x time_maa_w time_maa_k time_maa_v time_maa_r time_maa_g time_maa_w1 "
        "time_maa_w2 time_decay time_decay_w1 time_decay_w2 time_faaaa",
    }
    names = {*own[kind].split(), *(f"{m}.weight" for m in matrices.split()), "ln_x.bias"}
    assert set(build(kind).state_dict()) == names


def test_shapes_are_the_published_ones():
    shapes = {name: tuple(p.shape) for name, p in build("rwkv6").named_parameters()}
    assert shapes["time_maa_w1"] == (D, 15)
    assert shapes["time_maa_w2"] == (5, 3, D)
    assert shapes["time_decay_w1"] == (D, 2)
    assert shapes["time_decay_w2"] == (2, D)
    assert shapes["time_faaaa"] == (D // N, N)
    assert dict(build("rwkv5").named_parameters())["time_decay"].shape == (D // N, N)
    assert RWKV6Spec().ranks(2048) == (32, 64)
    assert RWKV6Spec().ranks(4096) == (64, 128)


@both
def test_initial_values_are_the_published_ones(kind):
    """Layer 1 of 3: half of the way down, two thirds of the layers left."""
    module = build(kind, noise=0.0)
    p = {name: x.detach() for name, x in module.named_parameters()}
    i = torch.arange(D, dtype=torch.float64)
    present, near = (i / D) ** (2 / 3), (i / D) ** (1 / 3)
    given = {"k": present, "v": present + 0.15, "r": near, "g": near}
    if kind == "rwkv6":
        given = {s: 1 - share for s, share in {**given, "x": present, "w": present}.items()}
    for stream, share in given.items():
        name = f"time_mix_{stream}" if kind == "rwkv5" else f"time_maa_{stream}"
        assert_close(p[name].float(), share.float(), msg=name)
    decay = -6 + 5 * (i / (D - 1)) ** 1.35
    assert_close(p["time_decay"].flatten().float(), decay.float())
    first = 0.5 * (1 - i / (D - 1)) + 0.1 * torch.tensor([0.0, 1, -1]).repeat(D // 3)
    assert_close(p["time_faaaa"].flatten().float(), first.float())
    for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0), ("gate", 0.1)):
        product = (p[f"{name}.weight"] @ p[f"{name}.weight"].T).float()
        assert_close(product, gain**2 * torch.eye(D), msg=name)
    assert not p["output.weight"].any()
    assert_close(p["ln_x.weight"].float(), torch.full((D,), (2 / 3) ** 0.7))
    if kind == "rwkv6":
        assert not p["time_maa_w1"].any()
        assert not p["time_decay_w1"].any()
        for name in ("time_maa_w2", "time_decay_w2"):
            assert 0.005 < p[name].abs().max() <= 0.01


@both
def test_only_matrices_decay_and_time_decay_learns_twice_as_fast(kind):
    model = build_model(ModelSpec(D, (BlockSpec(SPECS[kind]),), Tokens(5)))
    names = {p: name for name, p in model.named_parameters()}
    groups = {}
    for group in model.parameter_groups(1e-3, 0.1):
        for p in group["params"]:
            groups[names[p].removeprefix("blocks.0.mixer.")] = group
    fast = {name for name, group in groups.items() if group["lr"] > 1e-3}
    assert fast == {"time_decay"}
    assert groups["time_decay"]["lr"] == 2e-3
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    matrices = {f"{m}.weight" for m in ("receptance", "key", "value", "gate", "output")}
    assert {name for name in decayed if "." in name and "stem" not in name} == matrices
    assert not {name for name in decayed if name.startswith("time_")}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RWKV5Spec(), "head_dim: 64 is no divisor of d_model 12"),
        (RWKV6Spec(head_dim=1), "head_dim: 1 is no divisor of d_model 12 that is at least 2"),
        (RWKV6Spec(head_dim=4, mix_rank=0), "mix_rank: 0 is not positive"),
        (RWKV6Spec(head_dim=4, decay_rank=0), "decay_rank: 0 is not positive"),
    ],
)
def test_broken_rules_are_named(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(D, "mixer")
