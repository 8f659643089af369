"""RWKV-7's mixer and channel mix: contract, initialisation, cost, parity with published code."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.call import Call
from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, ParallelSpec, SequenceRoutedSpec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec

REVERSE = (
    Path(__file__).resolve().parents[3] / "shared/data/rwkv7_reverse/reverse_L2_only_rwkv7.pth"
)
SPEC = RWKV7Spec(head_dim=4, decay_rank=3, a_rank=2, v_rank=3, gate_rank=5)
FIRST = LayerContext(12, index=0, n_layers=3)
LATER = LayerContext(12, index=2, n_layers=3)
CHANNEL = RWKVChannelSpec(hidden=20)
TAKES = replace(SPEC, value_residual=True)
PARTS = {"first": (SPEC, FIRST), "later": (TAKES, LATER), "channel": (CHANNEL, LATER)}
every_part = pytest.mark.parametrize("part", list(PARTS))


def build(part, dtype=torch.float64):
    """A part whose parameters all matter: its initialisation plus noise."""
    spec, layer = PARTS[part]
    module = spec.build(layer)
    g = torch.Generator().manual_seed(0)
    module.reset_parameters(layer.n_layers, g)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return module.to(dtype)


def draw(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def call(module, x, v_first, state=None, segments=None):
    offer = {"v_first": v_first}
    return module(x, state, call=Call.of(x, segments).offering(offer))


def step(module, x, v_first, state):
    return module.step(x, state, call=Call.of(x, step=True).offering({"v_first": v_first}))


def flat(state):
    return torch.cat([leaf.flatten(1) for leaf in state], 1)


@every_part
@pytest.mark.parametrize("engine", ["torch", "reference"])
def test_forward_is_a_fold_of_step_and_any_split_is_one_call(part, engine):
    module, x, v_first = build(part), draw(2, 37, 12), draw(2, 37, 12, seed=2)
    module.engine = engine
    whole = call(module, x, v_first)
    state, ys = module.init_state(2, dtype=torch.float64), []
    for i in range(37):
        out = step(module, x[:, i], v_first[:, i], state)
        state = out.state
        ys.append(out.y)
    assert_close(torch.stack(ys, 1), whole.y)
    assert_close(flat(state), flat(whole.state))
    head = call(module, x[:, :9], v_first[:, :9])
    tail = call(module, x[:, 9:], v_first[:, 9:], head.state)
    assert_close(torch.cat([head.y, tail.y], 1), whole.y)
    assert_close(flat(tail.state), flat(whole.state))


@every_part
def test_engines_agree_in_every_gradient(part):
    module, x, v_first = build(part), draw(2, 40, 12), draw(2, 40, 12, seed=2)
    state = type(module.init_state(2))(*(draw(*s.shape, seed=3) for s in module.init_state(2)))
    segments = torch.cat([torch.zeros(2, 11), torch.ones(2, 29)], 1).long()
    leaves = [x, v_first, *state, *module.parameters()]
    results = []
    for engine in ("torch", "reference"):
        module.engine = engine
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        out = call(module, x, v_first, state, segments=segments)
        offers = [s.square().sum() for s in out.shared.values()]
        sum([out.y.square().sum(), flat(out.state).square().sum(), *offers]).backward()
        zero = torch.zeros(())
        results.append(
            [out.y, flat(out.state), *(zero if p.grad is None else p.grad for p in leaves)]
        )
    for fast, loop in zip(*results, strict=True):
        assert_close(fast, loop)


@every_part
def test_a_packed_document_is_a_separate_one(part):
    module, x, v_first = build(part), draw(1, 40, 12), draw(1, 40, 12, seed=2)
    segments = torch.tensor([[-1] * 5 + [0] * 12 + [1] * 23])
    out = call(module, x, v_first, segments=segments)
    for lo, hi in ((5, 17), (17, 40)):
        alone = call(module, x[:, lo:hi], v_first[:, lo:hi])
        assert_close(out.y[:, lo:hi], alone.y)
    assert_close(flat(out.state), flat(alone.state))


@every_part
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 64), (1, 100)])
def test_cost_is_what_is_measured(part, batch, length):
    spec, layer = PARTS[part]
    module, x = build(part, torch.float32), draw(batch, length, 12, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = call(module, x, x)
    cost = spec.cost(layer, length, batch)
    assert cost.params == cost.active_params == sum(p.numel() for p in module.parameters())
    assert cost.flops == counter.get_total_flops()
    assert cost.state_bytes == sum(leaf.nbytes for leaf in out.state)


def test_the_first_layer_offers_its_value_and_needs_none():
    x = draw(2, 5, 12)
    out = build("first")(x)
    assert set(out.shared) == {"v_first"}
    assert out.shared["v_first"].shape == (2, 5, 12)
    assert not call(build("later"), x, x).shared


def test_parameter_names_are_the_official_ones():
    official = "x_r x_w x_k x_v x_a x_g w0 w1 w2 a0 a1 a2 g1 g2 k_k k_a r_k ln_x.weight ln_x.bias "
    official += "receptance.weight key.weight value.weight output.weight"
    assert set(build("first").state_dict()) == set(official.split())
    assert set(build("later").state_dict()) == {*official.split(), "v0", "v1", "v2"}
    assert set(build("channel").state_dict()) == {"x_k", "key.weight", "value.weight"}


def test_only_linear_layers_decay_and_w0_learns_twice_as_fast():
    block = BlockSpec(RWKV7Spec(head_dim=8), RWKVChannelSpec(), norm="layer")
    model = build_model(ModelSpec(16, (block, block), Tokens(5), norm="layer"))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in model.parameter_groups(lr=1.0, weight_decay=0.1):
        for p in group["params"]:
            name = names[id(p)]
            assert (group["weight_decay"] > 0) == (p.ndim == 2 and name.endswith("weight")), name
            assert group["lr"] == (2.0 if name.endswith("w0") else 1.0), name


def test_the_ramps_of_the_initialisation():
    """Against the formulas written per channel, in the middle of a model of 5 layers."""
    d, n, index, n_layers = 16, 8, 2, 5
    layer = LayerContext(d, index, n_layers)
    mixer, channel = (
        RWKV7Spec(head_dim=n, value_residual=True).build(layer),
        RWKVChannelSpec().build(layer),
    )
    for module in (mixer, channel):
        module.reset_parameters(n_layers, torch.Generator().manual_seed(0))
    depth, left = index / (n_layers - 1), 1 - index / n_layers
    for i in range(d):
        ramp, zigzag = i / (d - 1) - 0.5, (i % n - (n - 1) / 2) / ((n - 1) / 2)
        zigzag *= abs(zigzag)
        expected = {
            "x_r": 1 - (i / d) ** (0.2 * left),
            "x_w": 1 - (i / d) ** (0.9 * left),
            "x_v": 1 - (i / d) ** (0.7 * left),
            "w0": -6 + 6 * (i / (d - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag,
            "a0": -0.19 + 0.3 * zigzag + 0.4 * ramp,
            "v0": 0.73 - 0.4 * ramp,
            "k_k": 0.71 - 0.1 * ramp,
        }
        for name, value in expected.items():
            assert mixer.get_parameter(name)[i].item() == pytest.approx(value, abs=1e-5), name
        assert channel.x_k[i].item() == pytest.approx(1 - (i / d) ** left**4, abs=1e-5)
    assert (mixer.ln_x.weight == ((1 + index) / n_layers) ** 0.7).all()
    for zero in (mixer.w1, mixer.a1, mixer.v1, mixer.g1, mixer.output.weight, channel.value.weight):
        assert not zero.any()
    squares = {mixer.receptance: 1.0, mixer.key: 0.01, mixer.value: 1.0, channel.key: 1.0}
    for linear, square in squares.items():
        assert_close(linear.weight.T @ linear.weight, square * torch.eye(d))
    assert_close(mixer.w2.T @ mixer.w2, 0.01 * 2 * torch.eye(d))  # rank 32 over 16 channels


def test_bfloat16_keeps_the_recurrence_and_its_parameters_in_float32():
    module = build("later", torch.float32)
    x, v_first = draw(2, 30, 12, dtype=torch.float32), draw(2, 30, 12, dtype=torch.float32, seed=2)
    expected = call(module, x, v_first).y
    with torch.autocast("cpu", torch.bfloat16):
        mixed = call(module, x, v_first)
        stepped = step(module, x[:, 0], v_first[:, 0], module.init_state(2))
    assert mixed.y.dtype is stepped.y.dtype is torch.bfloat16
    assert mixed.state.wkv.dtype is stepped.state.wkv.dtype is torch.float32
    assert_close(mixed.y.float(), expected, torch.bfloat16)
    module.to(torch.bfloat16)
    kept = {name for name, p in module.named_parameters() if p.dtype is torch.float32}
    assert kept == {*module.float32_parameters, "ln_x.weight", "ln_x.bias"}
    low = call(module, x.bfloat16(), v_first)
    assert low.y.dtype is torch.bfloat16
    assert low.state.wkv.dtype is torch.float32
    assert module.init_state(2, dtype=torch.bfloat16).wkv.dtype is torch.float32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RWKV7Spec(), "head_dim: 64 does not divide d_model 100; set d_model to 128, or head_dim"),
        (RWKV7Spec(head_dim=1), "head_dim: 1 is too small"),
        (RWKV7Spec(head_dim=50, gate_rank=0), "gate_rank: 0 is not positive"),
        (RWKVChannelSpec(hidden=0), "hidden: 0 is not positive"),
    ],
)
def test_broken_rules_are_named(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(100, "mixer")


def published_model(d=32, n=16, n_layers=3, vocab=19):
    """A model of random weights, and the same weights under RWKV-LM's names."""
    block = BlockSpec(RWKV7Spec(head_dim=n), RWKVChannelSpec(), norm="layer")
    spec = ModelSpec(d, (block,) * n_layers, Tokens(vocab), norm="layer", embed_norm=True)
    model = build_model(spec)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    places = {
        "stem.embedding": "emb",
        "stem.lm_head": "head",
        "embed_norm": "blocks.0.ln0",
        "mixer_norm": "ln1",
        "channel_norm": "ln2",
        "mixer.": "att.",
        "channel.": "ffn.",
    }
    weights = {}
    for name, p in model.state_dict().items():
        if name.startswith("norm."):
            name = "ln_out." + name.removeprefix("norm.")
        for ours, theirs in places.items():
            name = name.replace(ours, theirs)
        weights[name] = p.clone()
    return model, weights


RUN_PACKAGE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from rwkv.model import RWKV
path, tokens = sys.argv[1], [int(t) for t in sys.argv[2:]]
model = RWKV(model=path, strategy="cpu fp32")
at_once, state = model.forward(tokens, None, full_output=True)
torch.save({"logits": at_once, "wkv": [state[i] for i in range(1, len(state), 3)]}, path + ".out")
"""


@pytest.mark.skipif(find_spec("rwkv") is None, reason="the package rwkv is not installed")
def test_parity_with_the_rwkv_package(tmp_path):
    model, weights = published_model()
    torch.save(weights, tmp_path / "tiny.pth")
    tokens = torch.randint(19, (1, 45), generator=torch.Generator().manual_seed(1))
    command = [
        sys.executable,
        "-c",
        RUN_PACKAGE,
        str(tmp_path / "tiny"),
        *map(str, tokens[0].tolist()),
    ]
    env = {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=120)
    theirs = torch.load(tmp_path / "tiny.out", weights_only=True)
    with torch.no_grad():
        ours = model(tokens)
    assert_close(ours.logits[0], theirs["logits"])
    for block, wkv in zip(ours.state.blocks, theirs["wkv"], strict=True):
        assert_close(block.mixer.wkv[0], wkv)


def published_numbers():
    """The 600 rows "digits,reversed###" that RWKV-LM scores, and which next tokens count.

    Ten random numbers of every length from 1 to 60, from Python's generator with seed 42; what
    follows "," up to and including the first "#" counts.
    """
    rng = random.Random(42)
    rows, counts = [], []
    for n in range(1, 61):
        for _ in range(10):
            digits = str(rng.randint(10 ** (n - 1) if n > 1 else 0, 10**n - 1))
            row = f"{digits},{digits[::-1]}".ljust(129, "#")
            rows.append(["0123456789,#".index(c) for c in row])
            counts.append([n <= i <= 2 * n for i in range(128)])
    return torch.tensor(rows), torch.tensor(counts)


@pytest.mark.weights
@pytest.mark.skipif(not REVERSE.exists(), reason=f"no trained weights at {REVERSE}")
def test_a_trained_model_reverses_every_published_number():
    """396,500 of 396,500 is published: 18,900 digits, each length's counted again with all longer.

    Other numbers are not all right: 17 of 287,188 digits were wrong for 9,000 random ones.
    The ten longest are also written token by token, in the recurrent form.
    """
    model, (rows, counts) = load(REVERSE), published_numbers()
    with torch.no_grad():
        right = (model(rows[:, :-1]).logits.argmax(-1) == rows[:, 1:]) & counts
    totals = torch.stack([right.sum(1), counts.sum(1)]).view(2, 60, 10).sum(-1).cumsum(-1).sum(-1)
    assert totals.tolist() == [396_500, 396_500]
    longest = rows[-10:, :122]
    assert model.generate(longest[:, :61], 61, temperature=0).equal(longest)


def model_of(*mixers):
    return ModelSpec(16, tuple(BlockSpec(mixer) for mixer in mixers), Tokens(7))


def takes(model):
    return [block.mixer.spec.value_residual for block in model.blocks]


def test_the_value_residual_is_a_field_that_the_place_fills_in():
    plain, other = RWKV7Spec(head_dim=8), AttentionSpec(n_heads=2)
    assert takes(build_model(model_of(plain, plain, plain))) == [False, True, True]
    explicit = model_of(
        replace(plain, value_residual=False), other, replace(plain, value_residual=False)
    )
    model = build_model(explicit)
    assert [hasattr(block.mixer, "v0") for block in model.blocks] == [False] * 3
    assert sum(p.numel() for p in model.parameters()) == explicit.cost(1).params
    x = torch.arange(6)[None] % 7
    out, state = model(x), model(x[:, :5]).state
    assert_close(model.step(x[:, 5], state).logits, out.logits[:, -1])
    with pytest.raises(SpecError, match=r"blocks\[1\].mixer.value_residual: no RWKV-7 before it"):
        model_of(other, replace(plain, value_residual=True)).check()


def test_a_spec_without_the_field_keeps_its_digest_and_its_meaning():
    plain = RWKV7Spec(head_dim=8)
    old = model_of(plain, plain)
    assert "value_residual" not in old.canonical_json()
    assert ModelSpec.from_dict(old.to_dict()) == old
    written = model_of(*(replace(plain, value_residual=v) for v in (False, True)))
    assert written.digest != old.digest
    a, b = build_model(old, seed=3), build_model(written, seed=3)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert torch.equal(
        a(torch.zeros(1, 4, dtype=torch.long)).logits, b(torch.zeros(1, 4, dtype=torch.long)).logits
    )


def test_composites_pass_the_place_on_or_keep_it_to_themselves():
    plain = RWKV7Spec(head_dim=8)
    side_by_side, encoder = ParallelSpec((plain, plain)), SequenceRoutedSpec((plain, plain), 2)
    blocks = model_of(side_by_side, encoder, plain).settled()
    assert [m.value_residual for m in blocks[0].mixer.mixers] == [False, True]
    assert [m.value_residual for m in blocks[1].mixer.mixers] == [False, False]
    assert blocks[2].mixer.value_residual
    assert not model_of(encoder, plain).settled()[1].mixer.value_residual
    alone = side_by_side.layer(16)
    assert [hasattr(m, "v0") for m in alone.mixer.mixers] == [False, True]
