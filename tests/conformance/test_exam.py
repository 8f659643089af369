"""The exam that every mixer and channel sits, in float64 under the one tolerance table.

A part whose spec says that it is not causal has no state and no step: it is asked for neither, and
must refuse both.
"""

import json

import pytest
import torch
from cases import (
    CAUSAL,
    CHANNELS,
    LAYERS,
    MIXERS,
    VOCAB,
    causal_models,
    devices,
    every_model,
    make,
    model_spec,
    other_parts,
    tokens,
)
from tolerance import assert_close, assert_close_in
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models import (
    ModelSpec,
    build_model,
    list_channels,
    list_mixers,
    load,
    load_state,
)
from kizzasi.models.mixer import Mixer
from kizzasi.models.state import map_state, named_leaves

# The counter knows every attention kernel but the CPU's; it is counted like the others.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    )
}
LENGTHS = (1, 2, 7, 63, 64, 65, 100)


def fold(model, inputs, state=None):
    """Logits of every position by the recurrent form alone, and the last state."""
    state = model.init_state(len(inputs)) if state is None else state
    logits = []
    for t in range(inputs.shape[1]):
        out = model.step(inputs[:, t], state)
        logits.append(out.logits)
        state = out.state
    return torch.stack(logits, 1), state


def assert_same_state(actual, expected):
    for (name, a), (_, b) in zip(named_leaves(actual), named_leaves(expected), strict=True):
        assert a.dtype == b.dtype, name
        assert_close(
            torch.view_as_real(a) if a.is_complex() else a.double(),
            torch.view_as_real(b) if b.is_complex() else b.double(),
            dtype=torch.float64,
            msg=name,
        )


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_every_registered_kind_is_examined():
    assert {name.split("-")[0] for name in MIXERS} == set(list_mixers())
    assert {name.split("-")[0] for name in CHANNELS} == set(list_channels())


@devices
@causal_models
@pytest.mark.parametrize("length", [1, 2, 7, 65])
def test_forward_equals_fold_of_step(name, length, device):
    model, x = make(name, device=device), tokens(2, length, device=device)
    out = model(x)
    logits, state = fold(model, x)
    assert_close(out.logits, logits)
    again, _ = fold(model, tokens(2, 3, 5, device), state)
    assert_close(model(tokens(2, 3, 5, device), out.state).logits, again)


@devices
@every_model
@pytest.mark.parametrize("length", LENGTHS)
def test_reference_equals_torch_engine(name, length, device):
    x = tokens(2, length, device=device)
    fast = make(name, device=device, engine="torch")
    slow = make(name, device=device, engine="reference")
    a, b = fast(x), slow(x)
    assert_close(a.logits, b.logits)
    assert_same_state(a.state, b.state)
    weights = torch.linspace(-1, 1, a.logits.numel(), dtype=torch.float64, device=device)
    ga = gradients(fast, (a.logits.flatten() * weights).sum() + sum(a.aux.values()))
    gb = gradients(slow, (b.logits.flatten() * weights).sum() + sum(b.aux.values()))
    assert ga.keys() == gb.keys() == dict(fast.named_parameters()).keys()
    for key in ga:
        assert_close(ga[key], gb[key], msg=key)


@devices
@causal_models
@pytest.mark.parametrize("splits", [(8, 8, 5), (1, 20), (20, 1), (7, 14)])
def test_any_split_with_the_state_carried_equals_one_call(name, splits, device):
    model, x = make(name, device=device, hybrid=name in MIXERS), tokens(2, 21, device=device)
    whole = model(x)
    weights = torch.linspace(-1, 1, whole.logits.numel(), dtype=torch.float64, device=device)
    expected = gradients(model, (whole.logits.flatten() * weights).sum())
    state, parts = None, []
    for piece in x.split(list(splits), dim=1):
        out = model(piece, state)
        state = out.state
        parts.append(out.logits)
    joined = torch.cat(parts, 1)
    assert_close(joined, whole.logits)
    assert_same_state(state, whole.state)
    actual = gradients(model, (joined.flatten() * weights).sum())
    for key in expected:
        assert_close(actual[key], expected[key], msg=key)


@devices
@causal_models
def test_causality(name, device):
    model, x = make(name, device=device), tokens(1, 20, device=device)
    before = model(x).logits
    for t in (1, 9, 19):
        other = x.clone()
        other[:, t:] = (other[:, t:] + 1) % VOCAB
        after = model(other).logits
        assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


@devices
@other_parts
def test_what_is_not_causal_reads_later_tokens_and_refuses_a_state(name, device):
    model, x = make(name, device=device), tokens(1, 20, device=device)
    out, other = model(x), x.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    moved = (model(other).logits - out.logits).abs().amax(-1)
    assert moved.gt(1e-9).all()
    for refused in (
        lambda: model(x, out.state),
        lambda: model.step(x[:, 0], model.init_state(1)),
        lambda: model.generate(x, 1),
    ):
        with pytest.raises(SpecError, match=r"blocks\[0\].*depend on later tokens"):
            refused()


@devices
@every_model
def test_batch_rows_are_independent(name, device):
    model, x = make(name, device=device), tokens(3, 17, device=device)
    whole = model(x)
    for row in range(3):
        assert_close(model(x[row : row + 1]).logits[0], whole.logits[row])
    if not CAUSAL.get(name, True):
        return
    order = torch.tensor([2, 0, 0], device=device)
    forked = model(x[order, :4], whole.state.gather(order)).logits
    for i, row in enumerate(order.tolist()):
        alone = model(x[row : row + 1]).state
        assert_close(model(x[row : row + 1, :4], alone).logits[0], forked[i])


@devices
@every_model
@pytest.mark.parametrize("cut", [None, 6, 9])
def test_packed_equals_separate(name, cut, device):
    if cut is not None and not CAUSAL.get(name, True):
        pytest.skip("not causal: no state to carry")
    model = make(name, device=device, hybrid=name in MIXERS)
    documents = [tokens(1, n, n, device) for n in (6, 1, 11, 3)]
    packed = torch.cat(documents, 1)
    ids = torch.cat([torch.full_like(d, 7 - i) for i, d in enumerate(documents)], 1)
    if cut is None:
        logits = model(packed, segment_ids=ids).logits
        state = model(packed, segment_ids=ids).state
    else:
        first = model(packed[:, :cut], segment_ids=ids[:, :cut])
        second = model(packed[:, cut:], first.state, segment_ids=ids[:, cut:])
        logits, state = torch.cat([first.logits, second.logits], 1), second.state
    separate = [model(d) for d in documents]
    assert_close(logits, torch.cat([out.logits for out in separate], 1))
    if not CAUSAL.get(name, True):
        return
    more = tokens(1, 4, 9, device)
    assert_close(model(more, state).logits, model(more, separate[-1].state).logits)
    assert_close(fold(model, more, state)[0], fold(model, more, separate[-1].state)[0])


@devices
@every_model
@pytest.mark.parametrize("splits", [(12,), (4, 4, 4), (1, 11)])
def test_left_padded_equals_unpadded(name, splits, device):
    if len(splits) > 1 and not CAUSAL.get(name, True):
        pytest.skip("not causal: no state to carry")
    model = make(name, device=device, hybrid=name in MIXERS)
    rows = [tokens(1, n, n, device) for n in (12, 5, 1)]
    x = torch.cat([torch.cat([tokens(1, 12 - r.shape[1], 3, device), r], 1) for r in rows])
    mask = torch.arange(12, device=device) >= torch.tensor([[0], [7], [11]], device=device)
    state, parts, start = None, [], 0
    for n in splits:
        out = model(x[:, start : start + n], state, mask=mask[:, start : start + n])
        state, start = out.state, start + n
        parts.append(out.logits)
    logits = torch.cat(parts, 1)
    for i, row in enumerate(rows):
        assert_close(logits[i, 12 - row.shape[1] :], model(row).logits[0])
    if CAUSAL.get(name, True):
        more = tokens(1, 3, 8, device)
        continued, _ = fold(model, more.expand(3, -1), state)
        for i, row in enumerate(rows):
            assert_close(continued[i], model(more, model(row).state).logits[0])
    gradients(model, logits[mask].sum())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_padding_on_the_right_is_refused(name):
    model, x = make(name), tokens(2, 4)
    with pytest.raises(ShapeError, match="row 1 has padding after a real token"):
        model(x, mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    if not CAUSAL.get(name, True):
        return
    with pytest.raises(ShapeError, match="row 0 has padding after a real token"):
        model(x, model(x).state, mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))


@devices
@causal_models
def test_state_is_a_value(name, device):
    """Nobody writes into a state, and gradients flow into it."""
    model, x = make(name, device=device), tokens(2, 9, device=device)
    state = model(x).state.detach()
    copy = map_state(torch.clone, state)
    first = fold(model, x, state)[0]
    parallel = model(x, state).logits
    assert_same_state(state, copy)
    assert_close(fold(model, x, state)[0], first)
    live = map_state(
        lambda t: t.requires_grad_() if t.is_floating_point() or t.is_complex() else t, copy
    )
    model(x[:, :2], live).logits.sum().backward()
    from_forward = [t.grad for _, t in named_leaves(live) if t.requires_grad]
    again = map_state(lambda t: t.detach().clone().requires_grad_() if t.requires_grad else t, live)
    fold(model, x[:, :2], again)[0].sum().backward()
    for a, (leaf_name, t) in zip(
        from_forward, [(n, t) for n, t in named_leaves(again) if t.requires_grad], strict=True
    ):
        assert a is not None, leaf_name
        assert t.grad is not None, leaf_name
        assert_close(
            torch.view_as_real(a) if a.is_complex() else a,
            torch.view_as_real(t.grad) if a.is_complex() else t.grad,
            msg=leaf_name,
        )
    assert_close(model(x, copy).logits, parallel)


@every_model
def test_saved_and_loaded_gives_the_same_logits(name, tmp_path):
    model, x = make(name, dtype=torch.float32), tokens(2, 9)
    out = model(x)
    model.save_pretrained(tmp_path / "model")
    out.state.save(tmp_path / "state.safetensors")
    again = load(tmp_path / "model")
    assert again.spec == model.spec
    assert torch.equal(again(x).logits, out.logits)
    if not CAUSAL.get(name, True):
        return
    state = load_state(tmp_path / "state.safetensors", again.init_state(1))
    assert torch.equal(again(x, state).logits, model(x, out.state).logits)


@every_model
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 64), (1, 100)])
def test_analytic_cost_equals_the_measured_one(name, batch, length):
    spec = model_spec(name, hybrid=name in MIXERS)
    cost = spec.cost(length, batch)
    meta = build_model(spec, device="meta")
    assert cost.params == sum(p.numel() for p in meta.parameters())
    model = build_model(spec)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        out = model(tokens(batch, length))
    assert cost.flops == counter.get_total_flops()
    assert cost.state_bytes == out.state.nbytes


@every_model
def test_initialisation_sets_everything_from_the_seed_alone(name):
    spec = model_spec(name, hybrid=True)
    before = torch.get_rng_state()
    a, b, c = (build_model(spec, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for tensor in (*a.parameters(), *a.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    a.reset_parameters(0)
    for (key, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), key
    x = tokens(2, 9)
    assert torch.equal(a(x).logits, b(x).logits)
    assert not torch.equal(a(x).logits, c(x).logits)
    assert a(x).logits.std() < 10


def noisy(model, dtype):
    """The model with relative errors of the dtype's size in all weights."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            error = 2 * torch.rand(p.shape, generator=generator, dtype=torch.float64) - 1
            p.mul_(1 + torch.finfo(dtype).eps * error.to(p.device))
    return model


@devices
@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype, device):
    """Low-precision models and autocast, forward, step and gradients: they err no more than the
    exact model with weights rounded at random; the declared parameters keep float32."""
    x = tokens(2, 33, device=device)

    def run(model, autocast=False):
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            logits = model(x).logits
            stepped = fold(model, x)[0] if CAUSAL.get(name, True) else logits
        weights = torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits)
        return logits, stepped, gradients(model, (logits.double() * weights).sum())

    exact = run(make(name, device=device))
    allowed = run(noisy(make(name, device=device), dtype))
    low = make(name, device=device, dtype=torch.float32).to(dtype)
    for prefix, module in low.named_modules():
        for key in getattr(module, "float32_parameters", ()):
            parameter = dict(module.named_parameters()).get(key)
            assert parameter is None or parameter.dtype == torch.float32, f"{prefix}.{key}"
    of_low = run(low)
    assert of_low[0].dtype == dtype
    of_mixed = run(make(name, device=device, dtype=torch.float32), autocast=True)
    for kind, found in (("model", of_low), ("autocast", of_mixed)):
        for what, *values in zip(
            ("logits", "step", "gradients"), found, exact, allowed, strict=True
        ):
            assert_close_in(dtype, *values, msg=f"{what} of {kind}")


@every_model
def test_spec_survives_json_and_says_what_is_misspelt(name):
    spec = model_spec(name)
    data = json.loads(json.dumps(spec.to_dict()))
    assert ModelSpec.from_dict(data) == spec
    where = "mixer" if name in MIXERS else "channel"
    data["blocks"][1][where]["widht"] = 3
    with pytest.raises(SpecError, match=rf"blocks\[1\]\.{where}\.widht: unknown"):
        ModelSpec.from_dict(data)


@every_model
def test_float64_stays_float64(name):
    model = make(name)
    out = model(tokens(2, 5))
    assert out.logits.dtype == torch.float64
    wide = (torch.float64, torch.complex128)
    for key, leaf in named_leaves(out.state):
        assert leaf.dtype in wide or not (leaf.is_floating_point() or leaf.is_complex()), key


@every_model
def test_parameter_groups_hold_every_parameter_once(name):
    model = make(name)
    groups = model.parameter_groups(1e-3, 0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    assert all(p.ndim >= 2 for p in decayed)
    assert {m.engine for m in model.modules() if isinstance(m, Mixer)} == {"auto"}
    assert len(model.blocks) == LAYERS


@pytest.mark.parametrize("name", [n for n in (*MIXERS, *CHANNELS) if n != "moe-listed"])
def test_flops_can_be_counted_on_the_meta_device(name):
    """Nothing is allocated. A list of experts is split by data, which meta tensors lack."""
    spec = model_spec(name)
    model = build_model(spec, device="meta")
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        model(torch.zeros(2, 7, dtype=torch.long, device="meta"))
    assert counter.get_total_flops() == spec.cost(7, 2).flops
