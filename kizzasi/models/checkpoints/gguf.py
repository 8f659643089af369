"""Llama, its dialects, Mamba and Mamba-2 as llama.cpp stores them: one GGUF file, often quantized.

The metadata are put in the words of transformers' config.json, the tensors under its names, and
the rest is the family's (llama.py). Two things are undone: llama.cpp turns pairs of neighbours and
has the rows of Llama's queries and keys in that order, and Llama 3's stretched positions are stored
as the number that divides each frequency.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints import foreign, gguf_ssm
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.gguf_blocks import dequantize
from kizzasi.models.checkpoints.gguf_file import GGUF, MAGIC, GGUFTensor, open_gguf
from kizzasi.models.checkpoints.llama import LLAMA, QWEN2, QWEN3
from kizzasi.models.checkpoints.names import apply
from kizzasi.models.checkpoints.quantized import GROUP, LevelTensor, quantize
from kizzasi.models.checkpoints.stored import Stored
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.model import SequenceModel
from kizzasi.models.ops.engines import Engine
from kizzasi.models.rope_scaling import RopeScaling
from kizzasi.models.spec import ModelSpec

# general.architecture: the family, and whether the rows of queries and keys are in pairs
STATE_SPACES = tuple(gguf_ssm.PARTS)
ARCHITECTURES = {"llama": (LLAMA, True), "qwen2": (QWEN2, False), "qwen3": (QWEN3, False)}
TRUNK = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
DIVISORS = "rope_freqs.weight"
PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}


class Matrix(NamedTuple):
    """A tensor of the file, whose rows are in pairs for so many heads; 0: in order."""

    tensor: GGUFTensor
    heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self) -> Tensor:
        """Its values; quantized ones in float32."""
        values = torch.from_numpy(dequantize(self.tensor.kind, self.tensor.data))
        dtype = PLAIN.get(self.tensor.kind.name, torch.float32)
        return self._in_order(values.view(self.tensor.shape)).to(dtype)

    def levels(self) -> LevelTensor | None:
        """Its integers, if scales are shared by 32 inputs."""
        unpack = self.tensor.kind.unpack
        with np.errstate(all="ignore"):
            blocks = self.tensor.data.view(self.tensor.kind.layout)
            found = None if unpack is None else unpack(blocks)
        if found is None or found.level.shape[-1] != GROUP:
            return None
        minimum = None if found.minimum is None else self._by_rows(found.minimum)
        return LevelTensor(self._by_rows(found.level), self._by_rows(found.scale), minimum)

    def _by_rows(self, groups: NDArray) -> Tensor:
        """(blocks, groups, size) to (n, groups of a row, size), copied: the file is read-only."""
        rows = torch.from_numpy(np.array(groups))
        return self._in_order(rows.view(self.tensor.shape[0], -1, groups.shape[-1]))

    def _in_order(self, rows: Tensor) -> Tensor:
        if not self.heads:
            return rows
        return rows[torch.arange(len(rows)).view(self.heads, -1, 2).mT.flatten()]


class Shaped(NamedTuple):
    """A tensor of a state space's file under its name there, and the shape it gets."""

    tensor: GGUFTensor
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        return gguf_ssm.value_of(self.name, Matrix(self.tensor).read(), self.shape)

    def levels(self) -> LevelTensor | None:
        return Matrix(self.tensor).levels() if len(self.shape) == 2 else None


def is_gguf(path: Path) -> bool:
    """Whether a file starts like one. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(
    path: Path,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    engine: Engine,
    quantized: bool = False,
) -> SequenceModel:
    """See `kizzasi.models.load`."""
    family, spec, matrices = recognise(path)
    storage = {
        key: Stored(m.shape, PLAIN.get(m.tensor.kind.name, torch.float32), m.read)
        for key, m in matrices.items()
    }
    model = foreign.build(path, family, spec, storage, device=device, dtype=dtype, engine=engine)
    if quantized:
        links = apply(family.layouts(spec)[0], list(model.state_dict()))
        ours = {link.theirs[0]: link.ours[0] for link in links}
        found = {ours[key]: m.levels() for key, m in matrices.items()}
        quantize(model, {key: levels for key, levels in found.items() if levels is not None})
    return model


def recognise(path: Path) -> tuple[foreign.Family, ModelSpec, dict[str, Matrix | Shaped]]:
    """The family whose names the tensors have, and the architecture. Reads no weights."""
    file = open_gguf(path)
    name = file.metadata.get("general.architecture")
    if name in STATE_SPACES:
        return _state_space(str(name), file, path)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *STATE_SPACES])
        raise CheckpointError(f"{path}: architecture {name!r:.60} is not supported; only {known}")
    (family, paired), tensors = ARCHITECTURES[name], dict(file.tensors)
    divisors = tensors.pop(DIVISORS, None)
    config = _config(name, file.metadata, tensors, str(path))
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    matrices: dict[str, Matrix | Shaped] = {}
    for key, tensor in tensors.items():
        pairs = re.fullmatch(r"blk\.\d+\.attn_([qk])\.\w+", key) if paired else None
        matrices[_their_name(key)] = Matrix(tensor, heads[pairs[1]] if pairs else 0)
    shapes = {key: m.tensor.shape for key, m in matrices.items()}
    spec = foreign.read_spec(family, config, shapes, path)
    if divisors is not None:
        spec = _stretched(spec, Matrix(divisors).read().flatten().tolist())
    return family, spec, matrices


def _state_space(
    name: str, file: GGUF, path: Path
) -> tuple[foreign.Family, ModelSpec, dict[str, Matrix | Shaped]]:
    """Mamba and Mamba-2."""
    family = foreign.FAMILIES[name]
    config = gguf_ssm.config_of(name, file.metadata, file.tensors, str(path))
    found: dict[str, Matrix | Shaped] = {}
    for key, tensor in file.tensors.items():
        shape = gguf_ssm.shape_of(name, key, tensor.shape)
        found[gguf_ssm.their_name(name, key)] = Shaped(tensor, key, shape)
    shapes = {key: matrix.shape for key, matrix in found.items()}
    return family, foreign.read_spec(family, config, shapes, path), found


def _config(
    name: str, metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor], where: str
) -> dict[str, Any]:
    """The metadata in the words of config.json."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    keys = Config(own, where, prefix)
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{where}: no token_embd.weight in it; a part of a model, or damaged")
    vocab_size, d_model = tensors["token_embd.weight"].shape[0], keys.get("embedding_length", int)
    n_heads = keys.get("attention.head_count", int)
    head_dim = keys.get("attention.key_length", int, d_model // max(n_heads, 1))
    keys.only("attention.value_length", head_dim)
    keys.only("rope.dimension_count", head_dim)
    keys.only("vocab_size", vocab_size)
    keys.only("expert_count", 0)
    keys.only("expert_used_count", 0)
    keys.skip("context_length", "rope.scaling.finetuned")
    config = {
        "model_type": name,
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "head_dim": head_dim,
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", int, n_heads),
        "num_hidden_layers": keys.get("block_count", int),
        "intermediate_size": keys.get("feed_forward_length", int),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": keys.get("rope.freq_base", float, 1e4),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    kind = keys.get("rope.scaling.type", str, "none")
    if kind == "linear":
        factor = keys.get("rope.scaling.factor", float)
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        keys.refuse("rope.scaling.type", f"{kind!r:.40} is not supported; only none and linear are")
    keys.finish(harmless=())
    return config


def _their_name(name: str) -> str:
    """transformers' name of a tensor; one that it has not keeps its own, to be refused."""
    match = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    table = LAYER if match is not None and match[1] else TRUNK
    if match is None or match[3] not in table:
        return name
    start = f"model.layers.{match[2]}." if match[1] else ""
    return f"{start}{table[match[3]]}.{match[4]}"


def _stretched(spec: ModelSpec, divisors: list[float]) -> ModelSpec:
    """Every frequency divided by its own number; queries and keys keep their size."""
    scaling = RopeScaling("longrope", 1.0, 2, attention_factor=1.0, divisors=tuple(divisors))
    blocks = []
    for block in spec.plain_blocks:
        assert isinstance(block.mixer, AttentionSpec), "of the Llama family"
        blocks.append(replace(block, mixer=replace(block.mixer, rope_scaling=scaling)))
    return spec.replace(blocks=tuple(blocks))
