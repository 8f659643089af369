"""Metadata of a GGUF file, and the words of transformers' config.json for the same things.

A table says both ways: {"embedding_length": "hidden_size", ...}, keys without "llama." before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints import foreign
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.foreign import Family
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.spec import ModelSpec

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
TIED = (HEAD, EMBEDDING)
COMMON = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
}
FLOATS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base")


def words_of(config: Config, shapes: Shapes, table: Mapping[str, str]) -> dict[str, Any]:
    """What the keys of a table say; and what the tensors do: the vocabulary, and a tied head."""
    config.skip("context_length")
    words = {word: config.get(key, float if key in FLOATS else int) for key, word in table.items()}
    words["vocab_size"] = vocabulary(config, shapes)
    words["tie_word_embeddings"] = HEAD not in shapes
    return words


def vocabulary(config: Config, shapes: Shapes) -> int:
    """How many tokens have an embedding. Raises CheckpointError."""
    if len(shapes.get(EMBEDDING, ())) != 2:
        where = config.where
        raise CheckpointError(f"{where}: no {EMBEDDING} in it; a part of a model, or damaged")
    config.only("vocab_size", shapes[EMBEDDING][0])
    return shapes[EMBEDDING][0]


def spec_of_words(kind: str, config: Config, words: dict[str, Any], shapes: Shapes) -> ModelSpec:
    """As the family of this model_type reads them."""
    said = Config({"model_type": kind, **words}, config.where)
    spec = foreign.FAMILIES[kind].spec(said, shapes)
    said.finish()
    return spec


def metadata_of(family: Family, spec: ModelSpec, table: Mapping[str, str]) -> dict[str, Any]:
    """The keys of a table for what a family says of a spec. Raises SpecError."""
    assert family.config is not None, f"{family.name} has a config.json"
    words = family.config(spec)
    return {key: words[word] for key, word in table.items()}
