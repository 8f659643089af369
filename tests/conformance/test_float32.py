"""Decays, step sizes, norms and routers are computed in at least float32, whatever they are stored
in, and states are kept in it."""

import pytest
import torch
import torch.distributed as dist
from cases import CAUSAL, every_kind, every_part, make, tokens
from tolerance import assert_close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from kizzasi.models.norm import float32_parameters
from kizzasi.models.state import named_leaves

LOW = torch.bfloat16


@every_part
def test_a_rounded_decay_counts_as_its_float32_value(name):
    """As FSDP2 shows them: the same values in bfloat16 give what they give in float32."""
    x, results = tokens(2, 33), []
    for store in (torch.float32, LOW):
        model = make(name, dtype=torch.float32)
        rounded = {id(p) for p in float32_parameters(model)}
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None and id(p) in rounded:
                    module._parameters[key] = nn.Parameter(p.detach().to(LOW).to(store))
        out = model(x)
        out.logits.sum().backward()
        step = model.step(x[:, 0], out.state).logits if CAUSAL[name] else out.logits
        results.append((out.logits, step))
    for a, b in zip(*results, strict=True):
        assert_close(b, a)


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


# FSDP's own pre-backward hook, about inputs that need no gradient.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@every_kind
def test_fsdp2_with_mixed_precision(name, mesh):
    """Masters and states stay float32; the loss is near that of model.bfloat16()."""
    x = tokens(2, 17)
    exact = make(name, dtype=torch.float32)(x).logits
    plain = (make(name, dtype=torch.float32).to(LOW)(x).logits.float() - exact).norm()
    model = make(name, dtype=torch.float32)
    policy = MixedPrecisionPolicy(
        param_dtype=LOW, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # Sines of a product: a filter of rounded weights is another filter, whoever computes it.
    ignored = float32_parameters(model) if name.startswith("long_conv") else None
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    out = model(x)
    out.loss(x).backward()
    assert (out.logits.float() - exact).norm() < 3 * plain + 1e-2 * exact.norm()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if CAUSAL[name]:
        again = model.step(x[:, 0], out.state)
        recurrent = {k: v for k, v in named_leaves(again.state) if v.is_floating_point()}
        low = make(name, dtype=torch.float32).to(LOW)
        for (key, leaf), (_, own) in zip(
            named_leaves(again.state), named_leaves(low.init_state(1)), strict=True
        ):
            if key in recurrent and own.dtype == torch.float32:
                assert leaf.dtype == torch.float32, key


def losses_of(name, low):
    """Of some steps with a carried state: autocast, scaled gradients, clipping."""
    model, x = make(name, dtype=torch.float32).train(), tokens(2, 9)
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=3e-4))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=low)
    losses, state = [], None
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.float16, enabled=low):
            out = model(x[:, :-1], state)
            loss = out.loss(x[:, 1:])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        state = out.state.detach() if CAUSAL[name] else None
    assert not low or scaler.get_scale() == 64.0  # nothing overflowed, no step was left out
    return losses


@every_kind
def test_float16_trains_with_a_loss_scaler_as_float32_does(name):
    assert losses_of(name, True) == pytest.approx(losses_of(name, False), rel=2e-2)
