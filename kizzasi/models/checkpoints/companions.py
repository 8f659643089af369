"""What goes along with a model and is no part of it: its tokenizer, special ids, longest document
and settings of generation. A spec has no place for them, and the digest does not see them.

In transformers' folders they are files of the tokenizer, keys of config.json, and
generation_config.json; in GGUF they are metadata. In ours they are the same files, and two entries
of config.json:

    "tokenizer": ["tokenizer.json", ...]
    "generation": {"eos_token_id": 2, "max_position_embeddings": 8192, "config": {"top_p": 0.9}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints.gguf.container import open_gguf
from kizzasi.models.checkpoints.gguf.model import is_gguf
from kizzasi.models.checkpoints.native import CONFIG, NAME, to_json
from kizzasi.models.checkpoints.storage.files import read_json, small_file
from kizzasi.models.checkpoints.tokenizers import world
from kizzasi.models.checkpoints.tokenizers.tokenizer import KEY, WorldTokenizer, ends_of, from_gguf

GENERATION = "generation_config.json"
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", world.FILE),
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
POSITIONS = "max_position_embeddings"
OWN = ("transformers_version", "_from_model_config")  # what a program says of itself


class Companions(NamedTuple):
    """files: the tokenizer's, by name. generation: special ids, `max_position_embeddings`, and what
    generation_config.json says besides, under "config"."""

    files: Mapping[str, bytes] = {}
    generation: Mapping[str, Any] = {}

    def entries(self) -> dict[str, Any]:
        """What our config.json says of them."""
        entries = {"tokenizer": sorted(self.files), "generation": dict(self.generation)}
        return {key: value for key, value in entries.items() if value}

    @property
    def ids(self) -> dict[str, Any]:
        return {key: self.generation[key] for key in IDS if key in self.generation}

    def generation_config(self) -> dict[str, bytes]:
        """The file of transformers, by name, if there is something to say."""
        data = {**self.ids, **self.generation.get("config", {})}
        return {GENERATION: to_json(data)} if data else {}


def companions_of(path: Path) -> Companions:
    """Those of a checkpoint, whatever its format. Raises CheckpointError."""
    if path.is_file():
        return _of_gguf(path) if is_gguf(path) else Companions()
    files = {name: small_file(path / name) for name in FILES if (path / name).exists()}
    data = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if data.get("model_type") == NAME or "spec" in data:
        generation = data.get("generation", {})
        if not isinstance(generation, dict):
            raise CheckpointError(f"{path / CONFIG}: generation: {generation!r:.60} is no object")
        return Companions(files, generation)
    said = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    said = {key: value for key, value in said.items() if key not in OWN and value is not None}
    known = {**data, **said}  # as transformers generates: its own file counts first
    generation = {key: known[key] for key in (*IDS, POSITIONS) if known.get(key) is not None}
    rest = {key: value for key, value in said.items() if key not in generation}
    return Companions(files, {**generation, **({"config": rest} if rest else {})})


def _of_gguf(path: Path) -> Companions:
    metadata = open_gguf(path).metadata
    keys = {"bos_token_id": f"{KEY}bos_token_id"}
    keys["pad_token_id"] = f"{KEY}padding_token_id"
    keys[POSITIONS] = f"{metadata.get('general.architecture')}.context_length"
    generation = {ours: metadata[key] for ours, key in keys.items() if key in metadata}
    ends = ends_of(metadata)
    generation |= {} if ends is None else {"eos_token_id": ends}
    tokens = metadata.get(f"{KEY}tokens")
    if tokens is None:
        return Companions({}, generation)
    tokenizer = from_gguf(metadata, str(path))
    if isinstance(tokenizer, WorldTokenizer):
        return Companions({world.FILE: tokenizer.inner.to_file()}, generation)
    named: dict[str, str] = {}
    for key in ("bos", "eos", "pad"):
        i = generation.get(f"{key}_token_id", -1)
        i = i[0] if isinstance(i, list) else i
        named |= {f"{key}_token": tokens[i]} if 0 <= i < len(tokens) else {}
    template = metadata.get("tokenizer.chat_template")
    more = {} if template is None else {"chat_template": template}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **more}
    files = {
        "tokenizer.json": tokenizer.inner.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }
    return Companions(files, generation)
