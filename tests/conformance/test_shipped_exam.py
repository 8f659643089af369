"""The exam that is shipped: ours pass it, and every kind of fault is named."""

import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cases import CHANNELS, MIXERS

from kizzasi.models.cost import dense
from kizzasi.models.mixer import MixerSpec
from kizzasi.testing import check_layer, check_mixer

PARTS = {**MIXERS, **CHANNELS}
SOME = ["mamba-small", "attention-encoder", "rwkv_channel-v7", "moe-top2", "parallel-sum"]


@pytest.mark.parametrize("name", SOME)
def test_ours_pass(name):
    check_mixer(PARTS[name])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", PARTS)
def test_our_layers_pass(name):
    check_layer(PARTS[name])  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def page():
    """The names of docs/own_mixer.md, its first block."""
    text = (Path(__file__).parent.parent.parent / "docs/own_mixer.md").read_text()
    namespace: dict = {"__name__": "own_mixer"}
    known = dict(MixerSpec.registry)
    code = text.split("```python\n")[1].split("```")[0]
    module = types.ModuleType("own_mixer")
    sys.modules["own_mixer"] = module
    exec(compile(code, "own_mixer", "exec"), vars(module))
    namespace.update(vars(module))
    yield namespace
    del sys.modules["own_mixer"]
    MixerSpec.registry.clear()
    MixerSpec.registry.update(known)


def faulty(page, **changes):
    """A spec whose mixer, or spec, differs from the page's in some methods."""
    fade, spec = page["Fade"], page["FadeSpec"]
    own = {k: v for k, v in changes.items() if k != "cost"}
    module = type("Faulty", (fade,), {**own, "__module__": "own_mixer"})
    body = {"kind": "fade", "build": lambda self, layer: module(self, layer)}
    body |= {k: v for k, v in changes.items() if k == "cost"}
    broken = type("FaultySpec", (spec,), {**body, "__annotations__": {"kind": ClassVar[str]}})
    MixerSpec.registry["fade"] = broken
    return broken()


def test_the_page_passes(page):
    check_mixer(page["FadeSpec"]())


def test_faults_are_named(page):
    check_mixer(faulty(page))  # nothing is changed
    fade, state = page["Fade"], page["FadeState"]
    parallel = fade.parallel

    def sees_ahead(self, x, before, call):
        return parallel(self, x.flip(1).cumsum(1).flip(1), before, call)

    def forgets_documents(self, x, before, call):
        return parallel(self, x, before, type(call)(call.shape, call.device, step=call.step))

    def drops_state(self, x, before, call):
        return parallel(self, x, None, call)

    def mixes_rows(self, x, before, call):
        return parallel(self, x + x.mean(0, keepdim=True), before, call)

    def writes(self, x, before, call):
        out = parallel(self, x, before, call)
        if before is not None and not before.memory.requires_grad:
            before.memory.add_(1.0)
        return out

    def other_step(self, x, before, call):
        out = parallel(self, 2 * x[:, None], before, call)
        return out._replace(y=out.y[:, 0])

    def half_reset(self, n_layers, generator=None):
        page["linear_"](self.proj, generator)
        torch.nn.init.uniform_(self.decay, 1.0, 4.0)

    def narrow(self, x, before, call):
        out = parallel(self, x.float().to(x.dtype), before, call)
        return out._replace(state=state(out.state.memory.float()))

    for changes, question in (
        ({"parallel": sees_ahead}, "is causal"),
        ({"parallel": forgets_documents}, "packed equals separate"),
        ({"parallel": drops_state}, "steps equal|splits equal|state is a value"),
        ({"parallel": mixes_rows}, "rows are independent"),
        ({"parallel": writes}, "state is a value"),
        ({"recurrent": other_step}, "steps equal one call|state is a value"),
        ({"reset_parameters": half_reset}, "the seed sets everything"),
        ({"parallel": narrow}, "float64 stays float64"),
        ({"cost": lambda self, layer, seq_len, batch: dense(3)}, "cost is measured"),
    ):
        with pytest.raises(AssertionError, match=question):
            check_mixer(faulty(page, **changes))
