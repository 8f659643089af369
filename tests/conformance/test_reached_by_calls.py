"""In a step as in a forward, layers are reached through their module's call and weights through the
layer that owns them: what acts there, hooks, adapters, parametrizations, sharding, offloading, acts
in decoding as in training."""

import warnings

import pytest
import torch
from cases import CAUSAL, KINDS, MIXERS, every_causal_kind, every_kind, make, tokens
from tolerance import assert_close
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.mixers import MambaSpec

LEAVES = (nn.Linear, nn.Conv1d, nn.Embedding)


def stepped(model, x):
    """Logits of the last token, by a step after a forward over the others."""
    return model.step(x[:, -1], model(x[:, :-1]).state).logits


@every_causal_kind
@torch.no_grad()
def test_hooks_on_blocks_mixers_and_channels_act_in_a_step(name):
    model, x = make(name).eval(), tokens(2, 6)
    before, shift = model(x).logits[:, -1], torch.linspace(-1, 1, 16, dtype=torch.float64)
    block = model.blocks[1]
    for part in (block, block.mixer, block.channel):
        if part is not None:
            hook = part.register_forward_hook(lambda _, __, out: out._replace(y=out.y + shift))
            steered = model(x).logits[:, -1]
            assert (steered - before).abs().max() > 1e-3
            assert_close(stepped(model, x), steered)
            hook.remove()


@every_causal_kind
def test_whatever_layer_a_forward_calls_a_step_calls_too(name):
    model, x = make(name), tokens(2, 6)
    called: dict[str, int] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LEAVES):
            layer.register_forward_hook(
                lambda *_, path=path: called.__setitem__(path, called.get(path, 0) + 1)
            )
    state = model(x[:, :-1]).state
    in_forward = set(called)
    called.clear()
    out = model.step(x[:, -1], state)
    assert set(called) == in_forward
    seen = []
    for block in model.blocks:
        block.mixer.register_full_backward_hook(lambda *_: seen.append("mixer"))
    out = model.step(x[:, -1], state)
    out.logits.sum().backward()
    assert seen == ["mixer"] * len(model.blocks)


@every_causal_kind
@torch.no_grad()
def test_functional_call_reaches_every_parameter_of_a_step(name):
    model, other, x = make(name), make(name), tokens(2, 6)
    for p in other.parameters():
        p.mul_(1.1)
    state = other(x[:, :-1]).state
    given = functional_call(
        model, dict(other.named_parameters()), (x[:, -1], state), {"step": True}
    )
    assert_close(given.logits, other.step(x[:, -1], state).logits)


@every_kind
@torch.no_grad()
def test_parametrized_and_pruned_layers_act_alike_in_both_forms(name):
    model, x = make(name), tokens(2, 6)
    before = model(x).logits
    for layer in [layer for layer in model.modules() if isinstance(layer, LEAVES)]:
        parametrizations.weight_norm(layer)
    assert_close(model(x).logits, before)
    for layer in [layer for layer in model.modules() if isinstance(layer, LEAVES)]:
        layer.parametrizations.weight.original0.mul_(0.5)
    after = model(x).logits
    assert (after - before).abs().max() > 1e-3
    pruned = make(name)
    for layer in [layer for layer in pruned.modules() if isinstance(layer, LEAVES)]:
        prune.l1_unstructured(layer, "weight", 0.3)
    assert (pruned(x).logits - before).abs().max() > 1e-3
    if CAUSAL[name]:
        assert_close(stepped(model, x), after[:, -1])
        assert_close(stepped(pruned, x), pruned(x).logits[:, -1])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@every_causal_kind
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_a_sharded_model_generates_the_same(name, one_process):
    from torch.distributed.fsdp import fully_shard

    model, sharded, x = make(name).eval(), make(name).eval(), tokens(2, 6)
    for block in sharded.blocks:
        fully_shard(block, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    expected = model.generate(x, 3, temperature=0)
    assert torch.equal(sharded.generate(x, 3, temperature=0), expected)  # before any forward
    sharded(x).loss(x).backward()
    assert torch.equal(sharded.generate(x, 3, temperature=0), expected)


@pytest.mark.parametrize("name", [n for n in KINDS if n in MIXERS] + ["mlp-gelu", "swiglu-plain"])
def test_an_offloaded_model_runs_and_generates_the_same(name):
    accelerate = pytest.importorskip("accelerate")
    model, offloaded, x = make(name).eval(), make(name).eval(), tokens(2, 6)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in offloaded.parameters())
    assert_close(offloaded(x).logits, model(x).logits)
    if CAUSAL[name]:
        begun = [each.step(x[:, 0], each.init_state(2)).logits for each in (offloaded, model)]
        assert_close(*begun)
        expected = model.generate(x, 3, temperature=0)
        assert torch.equal(offloaded.generate(x, 3, temperature=0), expected)


def tied():
    spec = ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),) * 2, Tokens(23), tie_head=True)
    return build_model(spec, seed=1)


def trained(peft, model, x, **target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied weights
        adapted = peft.get_peft_model(model, peft.LoraConfig(**target))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).loss(x).backward()
        optimizer.step()
    return adapted


def test_an_adapter_on_a_tied_embedding_is_in_the_head_too():
    peft, x = pytest.importorskip("peft"), tokens(2, 9)
    adapted = trained(peft, tied(), x, r=2, target_modules=["embedding", "in_proj"])
    before = adapted(x).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = adapted.merge_and_unload()
    assert_close(merged(x).logits, before, torch.float32)
    tied_offloaded = tied()
    expected = tied_offloaded(x).logits
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(tied_offloaded, execution_device=torch.device("cpu"))
    assert_close(tied_offloaded(x).logits, expected)


def test_an_adapter_on_a_parameter_acts_in_a_step():
    peft, x = pytest.importorskip("peft"), tokens(2, 9)
    model = tied()
    before = model(x).logits
    adapted = trained(peft, model, x, r=2, target_modules=[], target_parameters=["mixer.A_log"])
    with torch.no_grad():  # three steps move a decay by too little to be seen
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    after = adapted(x).logits
    assert (after - before).abs().max() > 1e-5
    assert_close(stepped(adapted.base_model.model, x), after[:, -1])


@pytest.mark.parametrize("part", ["mamba-small", "kda-two-heads", "long_conv-short"])
def test_an_adapter_on_a_short_convolution_trains_and_knows_documents(part):
    """It mixes channels, so no filter says what it does: it is called."""
    peft, x = pytest.importorskip("peft"), tokens(2, 9)
    model = make(part, dtype=torch.float32)
    before = model(x).logits
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv1d)]
    groups = model.get_submodule(convs[0]).groups
    adapted = trained(peft, model, x, r=groups, target_modules=convs)
    for path, p in adapted.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, path
            assert p.grad.abs().sum() > 0, path
    bare = adapted.base_model.model.double()
    after = bare(x).logits
    assert not torch.allclose(after.float(), before)
    assert_close(stepped(bare, x), after[:, -1])
    head = bare(x[:, :4])
    assert_close(bare(x[:, 4:], head.state).logits, after[:, 4:])
    ids = torch.tensor([[3, 3, 3, 3, 5, 5, 1, 1, 1], [2] * 9])
    packed = bare(x, segment_ids=ids)
    assert_close(packed.logits[:1, 4:6], bare(x[:1, 4:6]).logits)
    assert_close(packed.logits[:1, 6:], bare(x[:1, 6:]).logits)
    more = tokens(2, 2, 5)
    alone = bare(more[:1], bare(x[:1, 6:]).state).logits
    assert_close(bare(more, packed.state).logits[:1], alone)
