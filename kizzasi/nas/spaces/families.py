"""Families: spaces that give all layers the same genes, and what the genes mean.

A family turns the searchers' genes into a `BlockSpec`. Every gene reaches the model:

| family | mixer | d_state is | expand_factor is | channel |
|---|---|---|---|---|
| mamba | mamba | SSM state per channel | d_inner / d_model | none |
| rwkv | rwkv7 | head width | hidden / d_model of the channel mix | rwkv_channel |
| s4 | s4d | SSM state per channel | hidden / d_model | swiglu |
| transformer | attention, RoPE | head width | hidden / d_model | swiglu |

The head is tied to the embedding: at small sizes a second table is a large share of the budget.
"a+b" alternates families over the depth, for example "mamba+transformer".

E = trunc(expand_factor)
capacity = d_model * d_state * n_layers
The parameter counts are coarse estimates by family; they rank architectures, they do not size them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import numpy as np

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, LayerSpec, ModelSpec, Signal, Tokens
from kizzasi.models.channels import RWKVChannelSpec, SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RWKV7Spec, S4DSpec
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Combinations
from kizzasi.strict import unknown_name


def _mamba(d_model: int, d_state: int, expand: float) -> BlockSpec:
    return BlockSpec(MambaSpec(d_state=d_state, expand=expand))


def _rwkv(d_model: int, d_state: int, expand: float) -> BlockSpec:
    channel = RWKVChannelSpec(hidden=round(d_model * expand))
    return BlockSpec(RWKV7Spec(head_dim=d_state), channel, norm="layer")


def _s4(d_model: int, d_state: int, expand: float) -> BlockSpec:
    return BlockSpec(S4DSpec(d_state=d_state), SwiGLUSpec(hidden=round(d_model * expand)))


def _transformer(d_model: int, d_state: int, expand: float) -> BlockSpec:
    if d_model % d_state:
        raise SpecError(
            f"d_state: {d_state} is the head width and does not divide d_model {d_model}; "
            "choose a divisor"
        )
    heads = AttentionSpec(n_heads=d_model // d_state)
    return BlockSpec(heads, SwiGLUSpec(hidden=round(d_model * expand)))


FAMILIES: dict[str, Callable[[int, int, float], BlockSpec]] = {
    "mamba": _mamba,
    "rwkv": _rwkv,
    "s4": _s4,
    "transformer": _transformer,
}


def model_spec(
    model_type: str,
    *,
    d_model: int,
    d_state: int,
    n_layers: int,
    expand_factor: float,
    dropout: float,
    vocab_size: int | None = None,
    stem: Tokens | Signal | None = None,
) -> ModelSpec:
    """Turn genes into a real architecture, over a vocabulary or with any stem.

    Raises:
        SpecError: an unknown family, or genes that do not fit each other.
    """
    names = model_type.split("+")
    for name in names:
        if name not in FAMILIES:
            raise SpecError(f"model_type: {name!r} {unknown_name(name, FAMILIES)}")
    stem = Tokens(vocab_size) if vocab_size is not None else stem
    assert stem is not None, "neither a vocabulary nor a stem"
    blocks = [FAMILIES[name](d_model, d_state, expand_factor) for name in names]
    spec = ModelSpec(
        d_model=d_model,
        blocks=tuple(blocks[i % len(blocks)] for i in range(n_layers)),
        stem=stem,
        norm=blocks[0].norm,
        embed_norm=names[0] == "rwkv",
        tie_head=isinstance(stem, Tokens),
        dropout=dropout,
    )
    spec.check()
    return spec


# Estimated parameters of one layer from (d_model, d_state, E): numbers or arrays of them.
_LAYER_PARAMS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "mamba": lambda d_model, d_state, e: 2 * d_model * (d_model * e + d_state * 2) + d_model,
    "transformer": lambda d_model, d_state, e: 8 * d_model * d_model,
    "rwkv": lambda d_model, d_state, e: 5 * d_model * d_model,
    "s4": lambda d_model, d_state, e: 2 * d_model * d_state + d_model * d_model,
}


def _other_layer_params(d_model: Any, d_state: Any, e: Any) -> Any:
    return 2 * d_model * d_model


@dataclass(frozen=True)
class ArchCandidate:
    """One architecture of an `ArchSearchSpace`."""

    d_model: int
    d_state: int
    n_layers: int
    model_type: str
    expand_factor: float
    dropout: float

    def param_count(self) -> int:
        """Estimate the number of parameters.

        n_layers * layer(d_model, d_state, E)

        mamba        2 d_model (d_model E + 2 d_state) + d_model
        transformer  8 d_model^2
        rwkv         5 d_model^2
        s4           2 d_model d_state + d_model^2
        any other    2 d_model^2
        """
        layer_params = _LAYER_PARAMS.get(self.model_type, _other_layer_params)
        return self.n_layers * layer_params(self.d_model, self.d_state, int(self.expand_factor))

    def proxy_score(self) -> float:
        """Score capacity against size, without training; higher is better.

        log2(capacity) / max(log2(param_count + 1), 1)
        """
        product = float(self.d_model) * self.d_state * self.n_layers
        capacity = math.log2(product) if product else -math.inf
        return capacity / max(math.log2(self.param_count() + 1.0), 1.0)

    @property
    def name(self) -> str:
        """A short description for tables."""
        return (
            f"{self.model_type} d{self.d_model} L{self.n_layers} n{self.d_state} "
            f"x{self.expand_factor:g}"
        )

    def to_spec(
        self, *, vocab_size: int | None = None, stem: Tokens | Signal | None = None
    ) -> ModelSpec:
        """The real model that these genes describe, over a vocabulary or with any stem.

        Raises:
            SpecError: an unknown family, genes that do not fit each other, or no stem.
        """
        if vocab_size is not None:
            stem = Tokens(vocab_size)
        if stem is None:
            raise SpecError("stem: the genes of a family name none; give stem=Tokens(...)")
        return model_spec(
            self.model_type,
            d_model=self.d_model,
            d_state=self.d_state,
            n_layers=self.n_layers,
            expand_factor=self.expand_factor,
            dropout=self.dropout,
            stem=stem,
        )

    def exact_param_count(self, *, vocab_size: int) -> int:
        """Count the parameters of the real model, embedding and head included."""
        return self.to_spec(vocab_size=vocab_size).cost(1).params


def analytic_score(spec: ModelSpec) -> float:
    """The `proxy_score` of any model: equal to that of the genes where there are some.

        log2(d_model * mean d_state * n_layers) / max(log2(params + 1), 1)

    A layer's d_state is what the table above says, and of other mixers their state per channel, or
    else the width of their heads. Layers of one family have its estimate of parameters, all others
    2 d_model^2 each.
    """
    layers = [_layer_genes(layer, spec.d_model) for layer in spec.blocks]
    n, states = len(layers), [float(state) for _, state, _ in layers]
    kinds = {(family, e) for family, _, e in layers}
    family, e = kinds.pop() if len(kinds) == 1 else ("", 0)
    layer_params = _LAYER_PARAMS.get(family, _other_layer_params)
    params = sum(layer_params(spec.d_model, state, e) for _, state, _ in layers)
    product = float(spec.d_model) * (sum(states) / max(n, 1)) * n
    capacity = math.log2(product) if product else -math.inf
    return capacity / max(math.log2(params + 1.0), 1.0)


def _layer_genes(layer: LayerSpec, d_model: int) -> tuple[str, int, int]:
    """Family, d_state and E of a layer."""
    mixer = layer.mixer if isinstance(layer, BlockSpec) else None
    if isinstance(mixer, MambaSpec):
        return "mamba", mixer.d_state, int(mixer.expand)
    if isinstance(mixer, RWKV7Spec):
        return "rwkv", mixer.head_dim, 0
    if isinstance(mixer, S4DSpec):
        return "s4", mixer.d_state, 0
    if isinstance(mixer, AttentionSpec):
        return "transformer", d_model // mixer.n_heads, 0
    told = {} if mixer is None else mixer.to_dict()
    heads = told.get("n_heads")
    return "", told.get("d_state") or told.get("head_dim") or (d_model // heads if heads else 1), 0


_genes = attrgetter(*(field.name for field in fields(ArchCandidate)))


@dataclass(frozen=True)
class ArchSearchSpace:
    """Every combination of one option per list; implements `Space[ArchCandidate]`.

    Args:
        d_model_options, d_state_options, n_layers_options: integers >= 1.
        model_types: names of families; unknown ones get the default parameter estimate.
        expand_factor_options: numbers >= 0; estimates truncate them.
        dropout_options: probabilities in [0, 1).
    """

    d_model_options: Sequence[int] = (64, 128, 256, 512)
    d_state_options: Sequence[int] = (8, 16, 32, 64)
    n_layers_options: Sequence[int] = (2, 4, 6, 8, 12)
    model_types: Sequence[str] = ("mamba", "rwkv", "s4", "transformer")
    expand_factor_options: Sequence[float] = (1.0, 2.0, 4.0)
    dropout_options: Sequence[float] = (0.0, 0.1, 0.2)

    def is_valid(self) -> bool:
        """Say whether every list has an option."""
        return self.size > 0

    def check(self) -> None:
        """Check every rule.

        Raises:
            SpecError: a list is empty, not a list, repeats an option, or holds an impossible one;
                the message names the list.
        """
        for field, options in zip(fields(self), self._axes(), strict=True):
            rule, holds = _RULES[field.name]
            if not isinstance(options, (tuple, list)):
                raise SpecError(f"{field.name}: {options!r} is not a tuple of options; give one")
            for option in options:
                if not holds(option):
                    raise SpecError(f"{field.name}: {option!r} is not {rule}; change or remove it")
            if len(set(options)) < len(options):
                raise SpecError(f"{field.name}: {options!r} repeats an option; give each one once")

    @property
    def size(self) -> int:
        """The number of combinations."""
        return math.prod(map(len, _option_lists(self)))

    def sample(self, rng: Xorshift64) -> ArchCandidate:
        """Draw each gene from its list."""
        return ArchCandidate(*[rng.choice(options) for options in self._axes()])

    def mutate(self, candidate: ArchCandidate, rng: Xorshift64, prob: float) -> ArchCandidate:
        """Redraw each gene from its list with probability `prob`; it may stay the same."""
        genes = zip(_genes(candidate), self._axes(), strict=True)
        return ArchCandidate(
            *[rng.choice(options) if rng.next_f64() < prob else gene for gene, options in genes]
        )

    def crossover(self, a: ArchCandidate, b: ArchCandidate, rng: Xorshift64) -> ArchCandidate:
        """Take each gene from `a` or `b`, one fair coin per gene."""
        genes = zip(_genes(a), _genes(b), strict=True)
        return ArchCandidate(*[x if rng.next_f64() < 0.5 else y for x, y in genes])

    def build(self, decide: Callable[[str, int], int]) -> ArchCandidate:
        """Take option number `decide(gene, n_options)` for each gene."""
        axes = zip(fields(ArchCandidate), self._axes(), strict=True)
        return ArchCandidate(*[axis[decide(gene.name, len(axis))] for gene, axis in axes])

    def iterate(self, limit: int | None = None) -> Combinations[ArchCandidate]:
        """Return the grid, the last list turning fastest; candidates are made when looked at."""
        return Combinations(ArchCandidate, self._axes(), range(self.size)[:limit])

    def contains(self, candidate: ArchCandidate) -> bool:
        """Say whether every gene is in its list."""
        genes = zip(_genes(candidate), _option_lists(self), strict=True)
        return all(gene in options for gene, options in genes)

    def _axes(self) -> tuple[Sequence[Any], ...]:
        axes = _option_lists(self)
        for field, options in zip(fields(self), axes, strict=True):
            if len(options) == 0:
                raise SpecError(f"{field.name}: the list is empty; give at least one option")
        return axes


_option_lists = attrgetter(*(field.name for field in fields(ArchSearchSpace)))


def _positive(option: Any) -> bool:
    return isinstance(option, int) and not isinstance(option, bool) and option >= 1


def _number_below(limit: float) -> Callable[[Any], bool]:
    return lambda option: isinstance(option, (int, float)) and 0 <= option < limit


# What an option must be, and the test of it.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "d_model_options": ("an integer >= 1", _positive),
    "d_state_options": ("an integer >= 1", _positive),
    "n_layers_options": ("an integer >= 1", _positive),
    "model_types": ("a name", lambda option: isinstance(option, str) and option != ""),
    "expand_factor_options": ("a finite number >= 0", _number_below(math.inf)),
    "dropout_options": ("a number in [0, 1)", _number_below(1.0)),
}


def proxy_scores(candidates: Sequence[ArchCandidate]) -> np.ndarray:
    """Score a batch: (n,) float64, equal to each candidate's `proxy_score`.

    A lazy grid is scored by columns and no candidate is made. The logarithm is the scalar one,
    so that equal scores stay equal to the last bit (exact below 2^53 parameters).
    """
    if not isinstance(candidates, Combinations):
        return np.array([candidate.proxy_score() for candidate in candidates])
    digits = candidates.digits()
    model_types: Sequence[Any] = candidates.axes[3]
    expand = [int(option) for option in candidates.axes[4]]  # pyright: ignore[reportArgumentType]
    numeric = zip((*candidates.axes[:3], expand), (*digits[:3], digits[4]), strict=True)
    d_model, d_state, n_layers, e = (np.array(axis, float)[digit] for axis, digit in numeric)
    params = np.empty(len(candidates))
    for number, name in enumerate(model_types):
        rows = digits[3] == number
        layer_params = _LAYER_PARAMS.get(name, _other_layer_params)
        params[rows] = n_layers[rows] * layer_params(d_model[rows], d_state[rows], e[rows])
    return _log2(d_model * d_state * n_layers) / np.maximum(_log2(params + 1.0), 1.0)


def _log2(values: np.ndarray) -> np.ndarray:
    none = values == 0
    logs = map(math.log2, np.where(none, 1.0, values).tolist())
    return np.where(none, -math.inf, np.fromiter(logs, np.float64, len(values)))
