"""Ready-made search spaces, and what their names stand for.

`tiny`, `hybrid`, `mamba_rwkv` and `moe` are spaces of models with holes: each layer chooses its own
mixer and channel, or layers repeat by a pattern. They are made for models of 40,000 to 1,000,000
parameters and stretch to others: widths as n^0.375, depths as n^0.25, so that parameters, which go
with depth times width squared, go as n. `SMALL_SPACE` gives all layers of a family the same genes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import Tokens
from kizzasi.nas.spaces.families import ArchSearchSpace
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.stem import Stem
from kizzasi.nas.spaces.template.parse import choice, pattern, repeat
from kizzasi.strict import unknown_name

BYTES = Tokens(256)
USUAL = 200_000  # parameters, for which widths and depths are written down here
SMALLEST, LARGEST = 40_000, 1_000_000  # parameters, between which they serve as they are
WIDTHS = (48, 56, 64, 72, 80, 88, 96, 112, 128, 160, 192)  # fine, to meet a narrow band


def width_ratio(n_params: int) -> float:
    """How many times as wide as written down here models of this size are."""
    return 1.0 if SMALLEST <= n_params <= LARGEST else (n_params / USUAL) ** 0.375


@dataclass(frozen=True)
class Stretch:
    """Numbers of a space for models of some size, in place of those for small ones.

    Args:
        n_params: of the models.
    """

    n_params: int

    def widths(self, *small: int) -> Any:
        """A choice of widths, multiples of 8, and of 64 from 512 on."""
        found = dict.fromkeys(map(self._width, small))
        return choice(*found)

    def _width(self, small: int) -> int:
        ratio = width_ratio(self.n_params)
        if ratio == 1:
            return small
        grain = 64 if small * ratio >= 512 else 8
        return max(grain, grain * round(small * ratio / grain))

    def heads(self, *small: int) -> Any:
        """A choice of numbers of heads, which grow as widths do."""
        times = 2 ** round(math.log2(width_ratio(self.n_params)))
        return choice(*dict.fromkeys(max(1, int(n * times)) for n in small))

    def head_dims(self, *small: int) -> Any:
        """A choice of widths of heads, which grow half as fast, up to 128."""
        times = 2 ** round(math.log2(width_ratio(self.n_params)) / 2)
        return choice(*dict.fromkeys(min(128, max(4, int(n * times))) for n in small))

    def depth(self, small: int) -> int:
        """The most layers."""
        usual = width_ratio(self.n_params) == 1
        return small if usual else max(2, round(small * (self.n_params / USUAL) ** 0.25))


def tiny(stem: Stem = BYTES, n_params: int = USUAL) -> ModelSpace:
    """One to three layers of Mamba or attention: 1,752 models, few enough to train them all."""
    mamba = {"mixer": {"kind": "mamba", "d_state": choice(8, 16)}}
    attention = {
        "mixer": {"kind": "attention", "n_heads": choice(2, 4)},
        "channel": choice(None, {"kind": "swiglu"}, {"kind": "swiglu", "hidden": 64}),
    }
    return _space(stem, choice(32, 48, 64), repeat(choice(mamba, attention), 1, 3))


def hybrid(stem: Stem = BYTES, n_params: int = USUAL) -> ModelSpace:
    """Two to eight layers, recurrent, state-space or attention, most with a channel mixer."""
    size = Stretch(n_params)
    heads = size.heads(2, 4, 8)
    mixer = choice(
        {"kind": "mamba", "d_state": choice(8, 16, 32), "expand": choice(1.0, 1.5, 2.0)},
        {"kind": "mamba2", "d_state": choice(16, 32, 64), "head_dim": size.head_dims(16, 32)},
        {"kind": "rwkv7", "head_dim": size.head_dims(8, 16, 32)},
        {"kind": "gla", "n_heads": heads, "expand_k": choice(0.5, 1.0)},
        {"kind": "gated_delta", "n_heads": heads},
        {"kind": "retention", "n_heads": heads},
        {"kind": "s4d", "d_state": choice(16, 64)},
        {"kind": "attention", "n_heads": heads, "window": choice(None, 32, 128)},
    )
    block = {"mixer": mixer, "channel": _channel(size, None)}
    return _space(stem, size.widths(*WIDTHS), _layers(block, size.depth(8)))


def mamba_rwkv(stem: Stem = BYTES, n_params: int = USUAL) -> ModelSpace:
    """Two to eight layers of the Mamba and RWKV families: a state of constant size."""
    size = Stretch(n_params)
    mixer = choice(
        {"kind": "mamba", "d_state": choice(8, 16, 32), "expand": choice(1.0, 1.5, 2.0)},
        {"kind": "mamba2", "d_state": choice(16, 32, 64), "head_dim": size.head_dims(16, 32)},
        {"kind": "rwkv6", "head_dim": size.head_dims(8, 16, 32)},
        {"kind": "rwkv7", "head_dim": size.head_dims(8, 16, 32)},
    )
    block = {"mixer": mixer, "channel": _channel(size, None, {"kind": "rwkv_channel"})}
    return _space(stem, size.widths(*WIDTHS), _layers(block, size.depth(8)))


def moe(stem: Stem = BYTES, n_params: int = USUAL) -> ModelSpace:
    """Two to six layers of Mamba or attention, each with a dense channel mixer or experts."""
    size = Stretch(n_params)
    experts = {
        "kind": "moe",
        "n_experts": choice(4, 8),
        "top_k": choice(1, 2),
        "hidden": size.widths(32, 64, 128),
        "shared_hidden": choice(0, size.widths(64)),
    }
    mixer = choice(
        {"kind": "mamba", "d_state": choice(8, 16), "expand": choice(1.0, 2.0)},
        {"kind": "attention", "n_heads": size.heads(2, 4, 8), "window": choice(None, 64)},
    )
    block = {"mixer": mixer, "channel": _channel(size, experts)}
    return _space(stem, size.widths(*WIDTHS), _layers(block, size.depth(6)))


def _layers(block: Any, most: int) -> dict[str, Any]:
    """Two layers or more: one or two blocks tiled over the depth, or every layer on its own."""
    texts = ("a", "ab", "aab", "aaab")
    tiled = pattern(*texts, n_layers=choice(*range(2, most + 1)), a=block, b=block)
    return choice(tiled, repeat(block, 2, most))


def _channel(size: Stretch, *more: Any) -> dict[str, Any]:
    """A SwiGLU of some width, an MLP, or one of `more`."""
    swiglu = {"kind": "swiglu", "hidden": choice(None, size.widths(64, 128, 256, 384))}
    mlp = {"kind": "mlp", "hidden": size.widths(128, 256), "activation": "relu2"}
    return choice(swiglu, mlp, *more)


def _space(stem: Stem, d_model: Any, blocks: Any) -> ModelSpace:
    tied = isinstance(stem, Tokens)
    return ModelSpace({"d_model": d_model, "stem": stem, "tie_head": tied, "blocks": blocks})


SMALL_SPACE = ArchSearchSpace(
    d_model_options=(48, 64, 80, 96, 112, 128),
    d_state_options=(8, 16, 32),
    n_layers_options=(2, 3, 4, 5, 6),
    model_types=("mamba", "rwkv", "s4", "transformer", "rwkv+transformer", "mamba+transformer"),
    expand_factor_options=(1.0, 1.5, 2.0, 3.0, 4.0),
    dropout_options=(0.0,),
)
SPACES: dict[str, Callable[[Stem, int], ModelSpace]] = {
    "tiny": tiny,
    "hybrid": hybrid,
    "mamba_rwkv": mamba_rwkv,
    "moe": moe,
}


def read_space(
    name: str, stem: Stem = BYTES, n_params: int = USUAL
) -> ArchSearchSpace | ModelSpace:
    """The ready-made space of this name, or the one in a YAML or JSON file.

    Args:
        name: see there.
        stem: of the models.
        n_params: about how large they will be; of a file, nothing changes.

    Raises:
        SpecError: no such name, or what is wrong with the file.
    """
    if name == "families":
        return SMALL_SPACE
    if name in SPACES:
        return SPACES[name](stem, n_params)
    if Path(name).suffix not in (".yaml", ".yml", ".json"):
        known = unknown_name(name, ["families", *SPACES])
        raise SpecError(f"space: {name!r} {known}; or give a .yaml file")
    return ModelSpace.from_file(name, stem)


def definition(space: Any) -> Any:
    """A space as plain data for the journal; of one that is not ours, its type's name."""
    if isinstance(space, ModelSpace):
        return dict(space.template)
    if isinstance(space, ArchSearchSpace):
        return dict(vars(space))
    return f"{type(space).__module__}.{type(space).__qualname__}"
