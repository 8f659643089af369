"""Text to ids and back, with the tokenizer that a checkpoint carries.

A GGUF file has its vocabulary and merges among the metadata; a folder in transformers' layout has a
tokenizer.json. Both are run by the package tokenizers, the extra `kizzasi-models[tokenizers]`.
Without either, ids are bytes.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kizzasi.errors import CheckpointError, DataError
from kizzasi.models.checkpoints.gguf import is_gguf
from kizzasi.models.checkpoints.gguf_file import open_gguf
from kizzasi.models.checkpoints.native import CONFIG
from kizzasi.models.checkpoints.storage import read_json

TOKENIZER = "tokenizer.json"
KEY = "tokenizer.ggml."
# What splits text before merging, by its name in GGUF. "{digits}" is how many make one piece.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"llama-bpe": "{1,3}", "qwen2": ""}
SPLITS = ("smollm", "gpt-2", *DIGITS)
NO_TOKENIZER = "none"  # what a file says of itself that has none
SPECIAL = (3, 4)  # token types: control, and user-defined


class Tokenizer(ABC):
    """eos: the id that ends a text, or several of which each does; None if none does."""

    eos: int | Sequence[int] | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Raises DataError for text that the vocabulary cannot express."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Incomplete UTF-8 becomes U+FFFD; special tokens become nothing."""


class ByteTokenizer(Tokenizer):
    """Ids are bytes; those beyond the vocabulary's end are refused."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        ids = list(text.encode())
        if max(ids, default=0) >= self.vocab_size:
            raise DataError(f"{text!r:.60}: has bytes beyond the vocabulary of {self.vocab_size}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(min(i, 255) for i in ids).decode("utf-8", errors="replace")


class PackagedTokenizer(Tokenizer):
    """A tokenizer of the package tokenizers; bos, if given, comes before every text."""

    def __init__(
        self, inner: Any, eos: int | Sequence[int] | None = None, bos: int | None = None
    ) -> None:
        self.inner, self.eos, self.bos = inner, eos, bos

    def encode(self, text: str) -> list[int]:
        return ([] if self.bos is None else [self.bos]) + self.inner.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids))


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: what `kizzasi.models.load` takes.
        vocab_size: of the model; what decides where the checkpoint has no tokenizer.

    Raises:
        CheckpointError: the tokenizer is damaged or of an unknown kind, the package that runs it is
            missing, or there is none and the ids cannot be bytes.
    """
    if path.is_file() and is_gguf(path):
        metadata = open_gguf(path).metadata
        if metadata.get(f"{KEY}model") != NO_TOKENIZER or vocab_size > 2 * 256:
            return from_gguf(metadata, str(path))
        return ByteTokenizer(vocab_size)
    if (path / TOKENIZER).is_file():
        eos = _eos(path)
        known = isinstance(eos, int) or (
            isinstance(eos, list) and all(isinstance(i, int) for i in eos)
        )
        return PackagedTokenizer(_read(path / TOKENIZER), eos if known else None)
    if vocab_size > 2 * 256:
        raise CheckpointError(
            f"{path}: no {TOKENIZER} there, and {vocab_size} ids are no bytes; put it in the folder"
        )
    return ByteTokenizer(vocab_size)


def from_gguf(metadata: Mapping[str, Any], where: str) -> PackagedTokenizer:
    """The byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) of a file.

    Raises:
        CheckpointError: as in `load_tokenizer`.
    """
    own = {key.removeprefix(KEY): v for key, v in metadata.items() if key.startswith(KEY)}
    model, split = own.get("model"), own.get("pre", "gpt-2")
    if model != "gpt2" or split not in SPLITS:
        raise CheckpointError(
            f"{where}: a tokenizer {model!r:.40} that splits text like {split!r:.40} is not "
            f"supported; only gpt2 with {', '.join(SPLITS)}"
        )
    tokens, merges = own.get("tokens"), own.get("merges")
    types = own.get("token_type")
    kinds = [1] * len(tokens or ()) if types is None else list(types)
    pairs = [tuple(merge.split(" ")) for merge in merges or ()]
    if not (isinstance(tokens, list) and len(kinds) == len(tokens) == len(set(tokens))):
        raise CheckpointError(f"{where}: {KEY}tokens: missing, doubled, or without a type; damaged")
    known = set(tokens)
    if any(len(pair) != 2 or not known >= {*pair, "".join(pair)} for pair in pairs):
        raise CheckpointError(f"{where}: {KEY}merges: one is not of two known tokens; damaged")
    package = tokenizers_package()
    whole = split == "llama-bpe"  # there, a piece that is a token stays whole
    table = {token: i for i, token in enumerate(tokens)}
    inner = package.Tokenizer(package.models.BPE(table, pairs, ignore_merges=whole))
    inner.pre_tokenizer = splitter(package, split)
    if split == "qwen2":
        inner.normalizer = package.normalizers.NFC()
    inner.decoder = package.decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in SPECIAL:
            added = package.AddedToken(token, special=bool(kind == 3), normalized=False)
            inner.add_special_tokens([added]) if kind == 3 else inner.add_tokens([added])
    bos = own.get("bos_token_id") if own.get("add_bos_token") else None
    return PackagedTokenizer(inner, ends_of(metadata), bos)


def ends_of(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """What ends a text, of a GGUF file: of a document and of a turn, if they differ."""
    found = [metadata.get(f"{KEY}{name}_token_id") for name in ("eos", "eot")]
    ends = [i for i in dict.fromkeys(found) if i is not None]
    return ends if len(ends) > 1 else next(iter(ends), None)


def splitter(package: Any, split: str) -> Any:
    """Text to pieces in GPT-2's stand-ins of bytes; the split is one of `SPLITS`."""
    parts = package.pre_tokenizers
    if split in DIGITS:
        pattern = package.Regex(WORDS.replace("{digits}", DIGITS[split]))
        first, own = [parts.Split(pattern, behavior="isolated")], False
    else:
        first, own = [parts.Digits(individual_digits=True)] * (split == "smollm"), True
    return parts.Sequence([*first, parts.ByteLevel(add_prefix_space=False, use_regex=own)])


def _eos(path: Path) -> Any:
    """What ends a text: generation_config.json says it, or config.json, ours under "generation"."""
    for name, key in (("generation_config.json", None), (CONFIG, "generation"), (CONFIG, None)):
        data = read_json(path / name) if (path / name).is_file() else {}
        data = data if key is None else data.get(key)
        if isinstance(data, dict) and data.get("eos_token_id") is not None:
            return data["eos_token_id"]
    return None


def _read(path: Path) -> Any:
    package = tokenizers_package()
    try:
        return package.Tokenizer.from_str(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot read it: {error}") from error
    except Exception as error:  # the package raises nothing more special
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error


def tokenizers_package() -> Any:
    """The package tokenizers. Raises CheckpointError if it is missing."""
    if importlib.util.find_spec("tokenizers") is None:
        raise CheckpointError(
            "the checkpoint's tokenizer needs the package tokenizers; "
            "pip install 'kizzasi-models[tokenizers]'"
        )
    import tokenizers

    return tokenizers
