"""Text to ids and back, with the tokenizer that a checkpoint carries.

A GGUF file has its vocabulary and merges among the metadata; a folder in transformers' layout has a
tokenizer.json. Both are run by the package tokenizers, the extra `kizzasi-models[tokenizers]`.
RWKV's own vocabulary is run here (world.py). Without any of them, ids are bytes.
"""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from kizzasi.errors import CheckpointError, DataError
from kizzasi.files import read_bytes
from kizzasi.models.checkpoints.gguf.container import open_gguf
from kizzasi.models.checkpoints.gguf.model import is_gguf
from kizzasi.models.checkpoints.native import CONFIG
from kizzasi.models.checkpoints.storage.files import read_json, small_file
from kizzasi.models.checkpoints.tokenizers import world

TOKENIZER = "tokenizer.json"
MOST_FILE = 2**26  # bytes of a tokenizer.json
MOST_TEXT = 2**22  # characters of a prompt
MOST_GROWTH, MOST_PARTS = 1000, 20_000  # of the rules of a tokenizer
KEY = "tokenizer.ggml."
# What splits text before merging, by its name in GGUF. "{digits}" is how many make one piece.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"llama-bpe": "{1,3}", "qwen2": ""}
SPLITS = ("smollm", "gpt-2", *DIGITS)
WORLD = "rwkv"
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
    """A tokenizer of the package tokenizers, which neither pads nor truncates here.

    Args:
        inner: of the package.
        eos: see `Tokenizer`.
        bos: comes before every text, if given.
        vocab_size: of the model; larger ids are refused. None knows no model.
    """

    def __init__(
        self,
        inner: Any,
        eos: int | Sequence[int] | None = None,
        bos: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        inner.no_padding()
        inner.no_truncation()
        self.inner, self.eos, self.bos, self.vocab_size = inner, eos, bos, vocab_size

    def encode(self, text: str) -> list[int]:
        if len(text) > MOST_TEXT:
            raise DataError(f"{len(text):,} characters: more than the {MOST_TEXT:,} of a prompt")
        found = _guarded("this text", lambda: self.inner.encode(text).ids)
        ids = ([] if self.bos is None else [self.bos]) + found
        beyond = [i for i in ids if self.vocab_size is not None and not 0 <= i < self.vocab_size]
        if beyond:
            raise CheckpointError(
                f"the tokenizer gives id {beyond[0]}, and the model has {self.vocab_size}: it is "
                "another model's"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return _guarded("these ids", lambda: self.inner.decode(list(ids)))


def _guarded(what: str, call: Callable[[], Any]) -> Any:
    """The package raises plain exceptions, and panics, which are none."""
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"the checkpoint's tokenizer cannot take {what}: {reason:.200}") from error


class WorldTokenizer(Tokenizer):
    """RWKV's.

    Raises:
        CheckpointError: it has ids that the model has not.
    """

    def __init__(
        self,
        inner: world.World,
        eos: int | Sequence[int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        most = max(inner.tokens, default=0)
        if vocab_size is not None and most >= vocab_size:
            raise CheckpointError(
                f"the tokenizer has id {most}, and the model {vocab_size}: it is another model's"
            )
        self.inner, self.eos = inner, eos

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids)


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
            return from_gguf(metadata, str(path), vocab_size)
        return ByteTokenizer(vocab_size)
    eos = _ids(_eos(path), vocab_size)
    if (path / TOKENIZER).is_file():
        return PackagedTokenizer(_read(path / TOKENIZER), eos, None, vocab_size)
    if (path / world.FILE).is_file():
        inner = world.from_file(small_file(path / world.FILE), str(path))
        return WorldTokenizer(inner, eos, vocab_size)
    if vocab_size > 2 * 256:
        raise CheckpointError(
            f"{path}: no {TOKENIZER} there, and {vocab_size} ids are no bytes; put it in the folder"
        )
    return ByteTokenizer(vocab_size)


def from_gguf(
    metadata: Mapping[str, Any], where: str, vocab_size: int | None = None
) -> PackagedTokenizer | WorldTokenizer:
    """The byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) of a file, or
    RWKV's vocabulary.

    Raises:
        CheckpointError: as in `load_tokenizer`.
    """
    own = {key.removeprefix(KEY): v for key, v in metadata.items() if key.startswith(KEY)}
    model, split = own.get("model"), own.get("pre", "gpt-2")
    if model == WORLD:
        return WorldTokenizer(_world(own, where), ends_of(metadata), vocab_size)
    if model != "gpt2" or split not in SPLITS:
        raise CheckpointError(
            f"{where}: a tokenizer {model!r:.40} that splits text like {split!r:.40} is not "
            f"supported; only gpt2 with {', '.join(SPLITS)}"
        )
    tokens, merges = own.get("tokens"), own.get("merges")
    types = own.get("token_type")
    count = len(tokens) if isinstance(tokens, list) else 0
    try:
        kinds = [1] * count if types is None else list(types)
    except TypeError as error:
        raise CheckpointError(f"{where}: {KEY}token_type: expected numbers; damaged") from error
    merges = [] if merges is None else merges
    if not _texts(merges):
        raise CheckpointError(f"{where}: {KEY}merges: expected texts; damaged")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if not (_texts(tokens) and len(kinds) == len(tokens) == len(set(tokens))):
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
    ends = ends_of(metadata)
    for name, ids in (("eos", ends), ("bos", bos)):
        given = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(i) is not int or not 0 <= i < len(tokens) for i in given):
            raise CheckpointError(f"{where}: {KEY}{name}_token_id: {ids!r:.60} is no token")
    return PackagedTokenizer(inner, ends, bos, vocab_size)


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _world(own: Mapping[str, Any], where: str) -> world.World:
    """Of RWKV's vocabulary what is a normal token."""
    tokens, types = own.get("tokens"), own.get("token_type")
    kinds = [1] * len(tokens) if types is None and _texts(tokens) else types
    if not _texts(tokens) or kinds is None or np.shape(kinds) != (len(tokens),):
        raise CheckpointError(f"{where}: {KEY}tokens: missing, or without a type; damaged")
    normal = {i: text for i, text in enumerate(tokens) if kinds[i] == 1}
    return world.from_literals(normal, where)


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


def _ids(value: Any, vocab_size: int) -> int | list[int] | None:
    """Ids that a model can produce; others end no text."""
    given = value if isinstance(value, list) else [value]
    found = [i for i in given if type(i) is int and 0 <= i < vocab_size]
    return None if not found else found if isinstance(value, list) else found[0]


def _read(path: Path) -> Any:
    try:
        content = read_bytes(path, MOST_FILE)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error}") from error
    return from_json(content, str(path))


def from_json(content: bytes, where: str) -> Any:
    """The package's own, of a tokenizer.json. Raises CheckpointError."""
    package = tokenizers_package()
    try:
        text = content.decode()
        _require_modest(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot read it: {error}") from error
    try:
        return _guarded("its own file", lambda: package.Tokenizer.from_str(text))
    except DataError as error:
        raise CheckpointError(f"{where}: not a tokenizer: {error}") from error


def _require_modest(data: Any) -> None:
    """Raise ValueError where a few characters would become very many."""
    if not isinstance(data, dict):
        raise ValueError("expected a JSON object")
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        growth, todo, n = 1, [data.get(name)], 0
        while todo:
            part, n = todo.pop(), n + 1
            if isinstance(part, dict):
                texts = (part.get("content"), part.get("prepend"))
                for text in (t for t in texts if isinstance(t, str)):
                    growth *= max(1, len(text))
                todo += part.values()
            elif isinstance(part, list):
                todo += part
            if growth > MOST_GROWTH or n > MOST_PARTS:
                raise ValueError(f"{name}: would make far too much of a text")


def tokenizers_package() -> Any:
    """The package tokenizers. Raises CheckpointError if it is missing."""
    if importlib.util.find_spec("tokenizers") is None:
        raise CheckpointError(
            "the checkpoint's tokenizer needs the package tokenizers; "
            "pip install 'kizzasi-models[tokenizers]'"
        )
    import tokenizers

    return tokenizers
