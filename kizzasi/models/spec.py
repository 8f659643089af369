"""`ModelSpec`: an architecture as data. Genotype, config file, cache key and checkpoint header.

A hybrid is one layer spec per layer, mostly `BlockSpec`s; `pattern` tiles a few of them over the
depth. A spec holds no device, dtype, engine, optimiser or schedule. Equal specs have equal digests
in every process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kizzasi.documents import read_document
from kizzasi.errors import SpecError
from kizzasi.files import write_text
from kizzasi.models.cost import Cost, norm
from kizzasi.models.heads import HeadSpec, Own
from kizzasi.models.layers.block import BlockSpec
from kizzasi.models.layers.layer import (
    LayerSpec,
    check_stack,
    cost_of,
    depth_of,
    places,
    settle_stack,
    window_of,
)
from kizzasi.models.mixer import ChannelSpec, LayerContext, MixerSpec
from kizzasi.models.norm import NormKind
from kizzasi.models.stems import StemSpec
from kizzasi.strict import Strict, added, coerce, require

MAX_FILE_BYTES = 16 * 2**20  # of a config.json
MAX_LAYERS = 4096


@dataclass(frozen=True)
class ModelSpec(Strict):
    """A whole sequence model.

    Args:
        d_model: width of the residual stream.
        blocks: the layers, first to last: BlockSpecs, or other topologies of `layers`.
        stem: `Tokens(vocab_size, max_positions)` or `Signal(n_in, n_out)`.
        norm: kind of the final norm, and of `embed_norm`.
        norm_eps: epsilon of every norm outside the mixers.
        embed_norm: normalise the embeddings too (RWKV's ln0).
        tie_head: the head is the embedding transposed (tokens only).
        dropout: probability, on each residual branch, in training.
        heads: what is read from the features, first the one that `ModelOutput.logits` holds; ()
            is the stem's own head alone.
        embed_scale: factor of the embeddings (Gemma's sqrt(d_model), Granite's and MiniCPM's
            multipliers).
        logit_scale: factor of the logits (Cohere; one over Granite's logits_scaling).
        logit_cap: logits are cap tanh(logits / cap) (Gemma 2); None leaves them alone.
    """

    d_model: int
    blocks: tuple[LayerSpec, ...]
    stem: StemSpec
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    embed_norm: bool = False
    tie_head: bool = False
    dropout: float = 0.0
    heads: tuple[HeadSpec, ...] = added(())
    embed_scale: float = added(1.0)
    logit_scale: float = added(1.0)
    logit_cap: float | None = added(None)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: str = "") -> ModelSpec:
        """Read plain data; `blocks` may be the arguments of `pattern`: pattern, letters, n_layers.

        Raises SpecError with the path of the offending key, for example
        "blocks[3].mixer.d_sate: unknown; did you mean d_state?".
        """
        tiles = data.get("blocks") if isinstance(data, Mapping) else None
        if isinstance(tiles, Mapping):
            data = {**data, "blocks": _tile(tiles)}
        return super().from_dict(data, path)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ModelSpec:
        """Read a .yaml, .yml or .json file. Raises SpecError naming the file."""
        data = read_document(path, "spec")
        try:
            return cls.from_dict(data)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write every field, as JSON if the name ends in .json, else as YAML."""
        write_text(Path(path), self.to_text(Path(path).suffix))

    def to_text(self, suffix: str) -> str:
        """Every field, as JSON for ".json", else as YAML."""
        import yaml

        data = self.to_dict()
        if suffix == ".json":
            return json.dumps(data, indent=2) + "\n"
        return yaml.safe_dump(data, sort_keys=False)

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    @property
    def depth(self) -> int:
        """Residual layers that an input passes through, those of a loop as often as it runs."""
        return depth_of(self.blocks)

    @property
    def context(self) -> LayerContext:
        """Where the first layer stands."""
        return LayerContext(self.d_model, 0, self.depth)

    def layer_context(self, index: int) -> LayerContext:
        """Where a layer stands."""
        return LayerContext(self.d_model, depth_of(self.blocks[:index]), self.depth)

    @property
    def plain_blocks(self) -> tuple[BlockSpec, ...]:
        """The layers, for those who know blocks alone. Raises SpecError if there are others."""
        for i, layer in enumerate(self.blocks):
            rule = f"{layer.kind!r} is no plain block, and nothing else can be read or written here"
            require(isinstance(layer, BlockSpec), f"blocks[{i}]", rule)
        return self.blocks  # pyright: ignore[reportReturnType]

    def settled(self) -> tuple[LayerSpec, ...]:
        """The layers with everything written out that those before decide.

        Raises SpecError if a layer takes what no layer before offers.
        """
        return settle_stack(self.blocks, False, "blocks")[0]

    def check(self) -> None:
        """Apply every rule, before any tensor exists. Raises SpecError with path and remedy."""
        require(len(self.blocks) <= MAX_LAYERS, "blocks", f"more than {MAX_LAYERS} layers")
        self.require_positive("", "d_model", "norm_eps")
        require(0 <= self.dropout < 1, "dropout", f"{self.dropout} is outside [0, 1)")
        rule = f"{self.logit_cap} is not positive; give a bound such as 30, or None"
        require(self.logit_cap is None or self.logit_cap > 0, "logit_cap", rule)
        self.stem.check("stem", self.tie_head)
        self._check_heads()
        check_stack(self.blocks, self.d_model, "blocks")
        self.settled()

    @property
    def own_head(self) -> bool:
        """Whether the stem's own head is among those that are read."""
        return not self.heads or any(isinstance(head, Own) for head in self.heads)

    def _check_heads(self) -> None:
        names = [head.name for head in self.heads]
        for i, head in enumerate(self.heads):
            path = f"heads[{i}]"
            head.check(path)
            fits = head.name.isidentifier() and names.index(head.name) == i
            rule = f"{head.name!r} must be a word, and name one head alone"
            require(fits, f"{path}.name", rule)
        rule = "no head is the stem's own, which alone can be tied; set it to false"
        require(self.own_head or not self.tie_head, "tie_head", rule)

    def cost(self, seq_len: int, batch: int = 1) -> Cost:
        """Analytic cost of one forward pass over (batch, seq_len) inputs; see `Cost`."""
        total = self.stem.cost(self.d_model, self.tie_head, seq_len * batch, self.own_head)
        for head in self.heads:
            total += head.cost(self.d_model, seq_len, batch)
        total += norm(self.norm, self.d_model)
        if self.embed_norm:
            total += norm(self.norm, self.d_model)
        total += Cost(state_bytes=2 * 8 * batch)  # position and segment, int64
        return total + cost_of(self.settled(), self.context, seq_len, batch)

    def coding_flops(self, seq_len: int, batch: int = 1) -> int:
        """Flops that a call takes beside its `cost` where layers encode: in training, and in a
        coded score."""
        at = zip(self.settled(), places(self.settled(), self.context), strict=True)
        return sum(layer.coding_flops(place, seq_len, batch) for layer, place in at)

    def training_flops(self, seq_len: int, batch: int = 1) -> int:
        """Flops of a forward pass in training: of `cost`, encoders and as many iterates as run."""
        trained = self.replace(blocks=tuple(layer.in_training() for layer in self.blocks))
        return trained.cost(seq_len, batch).flops + trained.coding_flops(seq_len, batch)

    @property
    def context_window(self) -> float:
        """How many inputs up to and including the present one an output can depend on."""
        return window_of(self.blocks)

    @property
    def encodes(self) -> bool:
        """Whether a layer sends itself a code of what is to come; see `LayerSpec.encodes`."""
        return any(layer.encodes for layer in self.blocks)

    @property
    def causal(self) -> bool:
        """False if an output depends on later inputs; see `MixerSpec.causal`."""
        return all(layer.causal for layer in self.blocks)

    def parts(self) -> Iterator[tuple[str, MixerSpec | ChannelSpec]]:
        """Every mixer and channel at any depth with its path, for example "blocks[3].mixer"."""
        for i, layer in enumerate(self.blocks):
            yield from layer.parts(f"blocks[{i}]")

    def replace(self, **changes: Any) -> ModelSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)


def pattern(
    letters: str, *, n_layers: int | None = None, **blocks: LayerSpec
) -> tuple[LayerSpec, ...]:
    """Tile letters over the depth: pattern("mma", m=BlockSpec(...), a=BlockSpec(...), n_layers=12).

    Args:
        letters: one letter per layer, repeated from the start until n_layers are filled.
        n_layers: depth; None means len(letters).
        blocks: a layer for every letter.

    Raises:
        SpecError: no letters, a letter without a block, or a block whose letter does not occur.
    """
    require(bool(letters), "pattern", "empty; give at least one letter")
    used, given = set(letters), set(blocks)
    require(used <= given, "pattern", f"no block given for {sorted(used - given)}")
    require(given <= used, "pattern", f"{sorted(given - used)} do not occur in {letters!r}")
    depth = len(letters) if n_layers is None else n_layers
    require(depth > 0, "n_layers", f"{depth} is not positive; give at least 1")
    require(depth <= MAX_LAYERS, "n_layers", f"more than {MAX_LAYERS} layers")
    return tuple(blocks[letters[i % len(letters)]] for i in range(depth))


def _tile(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mapping form of `blocks` in a config file, written out."""
    keys = {"pattern", "n_layers", "letters"}
    require(set(data) == keys, "blocks", f"expected a list of blocks or a mapping with {keys}")
    letters = data["letters"]
    require(isinstance(letters, Mapping), "blocks.letters", "expected a mapping of blocks")
    path = "blocks.letters"
    specs = {str(k): LayerSpec.from_dict(v, f"{path}.{k}") for k, v in letters.items()}
    text = coerce(data["pattern"], str, "blocks.pattern")
    n_layers = coerce(data["n_layers"], int, "blocks.n_layers")
    return [block.to_dict() for block in pattern(text, n_layers=n_layers, **specs)]
