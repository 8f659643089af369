"""The tokenizer of a transformers folder as metadata of GGUF; tokenizers/ reads it back.

RWKV's vocabulary goes along as it is. Else it must be byte-level BPE whose way of splitting text
has a name there. Whether it has is found out by comparing with what the reader would make of each
name, and then by encoding a few texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints.tokenizers import world
from kizzasi.models.checkpoints.tokenizers.tokenizer import (
    KEY,
    NO_TOKENIZER,
    SPLITS,
    TOKENIZER,
    WORLD,
    from_gguf,
    from_json,
    splitter,
    tokenizers_package,
)

NORMAL, CONTROL, OWN, UNUSED = 1, 3, 4, 5
TEXTS = ("I'VE 12345 cats,\r\n  and  naïve 漢字!", "don't (stop) 42", "\t x  \n\n y  ", "a  b")
IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}
IDS["pad_token_id"] = "padding_token_id"


def to_gguf(
    files: Mapping[str, bytes], generation: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
    """Metadata of a tokenizer, special ids, and the longest document.

    Args:
        files, generation: as in `Companions`.
        vocab_size: of the model; ids without a token get a name of their own.

    Raises:
        CheckpointError: the tokenizer cannot be said there, or its package is missing.
    """
    metadata = _ids(generation)
    if TOKENIZER not in files and world.FILE in files:
        return {**metadata, **_world(world.from_file(files[world.FILE], world.FILE), vocab_size)}
    if TOKENIZER not in files:
        if files:
            _refuse(f"a tokenizer in {', '.join(sorted(files))} without {TOKENIZER}")
        return {f"{KEY}model": NO_TOKENIZER, **metadata}
    package = tokenizers_package()
    inner, data = from_json(files[TOKENIZER], TOKENIZER), json.loads(files[TOKENIZER])
    model = data.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        _refuse(f"a tokenizer of the kind {model.get('type')!r}")
    split = _split(package, data, bool(model.get("ignore_merges")))
    tokens, types = _tokens(data, model["vocab"], vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
    metadata |= {f"{KEY}model": "gpt2", f"{KEY}pre": split}
    metadata |= {f"{KEY}tokens": tokens, f"{KEY}token_type": types, f"{KEY}merges": merges}
    metadata[f"{KEY}add_bos_token"] = _begins(inner, metadata.get(f"{KEY}bos_token_id"))
    template = _template(files)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    again = from_gguf(metadata, "the tokenizer")
    special = "".join(token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL)
    for sample in (*TEXTS, special[:1000]):
        if again.encode(sample) != inner.encode(sample).ids:
            _refuse(f"a tokenizer that splits {sample[:40]!r} in a way of its own")
    return metadata


def _world(vocabulary: world.World, vocab_size: int) -> dict[str, Any]:
    """RWKV's. Id 0 ends a text and begins one."""
    if max(vocabulary.tokens, default=0) >= vocab_size:
        most = max(vocabulary.tokens)
        raise CheckpointError(f"gguf: a token {most}, but the model has {vocab_size} ids")
    found = vocabulary.to_gguf(vocab_size)
    tokens = [(f"[PAD{i}]" if i else "<s>") if t is None else t for i, t in enumerate(found)]
    types = [(UNUSED if i else CONTROL) if t is None else NORMAL for i, t in enumerate(found)]
    keys = {"model": WORLD, "tokens": tokens, "token_type": types}
    return {f"{KEY}{key}": value for key, value in keys.items()}


def _refuse(what: str) -> Any:
    known = ", ".join(SPLITS)
    rule = f"byte-level BPE that splits text like {known} can be written"
    remedy = f"write the model without it: from a folder without {TOKENIZER}"
    raise CheckpointError(f"gguf: {what} is not supported; only {rule}. Or {remedy}")


def _ids(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Special ids; of several that end a text, the first two."""
    found: dict[str, Any] = {}
    for ours, theirs in IDS.items():
        value = generation.get(ours)
        if isinstance(value, list) and 1 <= len(value) <= 2:
            found[f"{KEY}eot_token_id"] = value[-1]
            value = value[0]
        if isinstance(value, list):
            raise CheckpointError(f"gguf: {ours}: {value} are more than two; keep two of them")
        if value is not None:
            found[f"{KEY}{theirs}"] = value
    context = generation.get("max_position_embeddings")
    return found if context is None else {**found, "context_length": context}


def _split(package: Any, data: Mapping[str, Any], whole: bool) -> str:
    """The name of a way of splitting text."""
    wanted = _parts(data.get("pre_tokenizer")), data.get("normalizer")
    for name in SPLITS:
        probe = package.Tokenizer(package.models.BPE())
        probe.pre_tokenizer = splitter(package, name)
        normalizer = {"type": "NFC"} if name == "qwen2" else None
        parts = _parts(json.loads(probe.to_str())["pre_tokenizer"])
        if (parts, normalizer) == wanted and whole == (name == "llama-bpe"):
            return name
    return _refuse("this tokenizer's pre_tokenizer or normalizer")


def _parts(part: Any) -> list[Any]:
    """A pre_tokenizer as a flat list of what counts."""
    if not isinstance(part, dict):
        return []
    if part.get("type") == "Sequence":
        return [one for inner in part.get("pretokenizers", ()) for one in _parts(inner)]
    usual = {"use_regex": True}
    return [{**usual, **{key: v for key, v in part.items() if key != "trim_offsets"}}]


def _tokens(
    data: Mapping[str, Any], table: Mapping[str, int], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Every id's token and type."""
    names = {i: token for token, i in table.items()}
    kinds = dict.fromkeys(names, NORMAL)
    for token in data.get("added_tokens", ()):
        names[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else OWN
    if max(names, default=0) >= vocab_size:
        raise CheckpointError(f"gguf: {len(names)} tokens, but the model has {vocab_size} ids")
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    return tokens, [kinds.get(i, UNUSED) for i in range(vocab_size)]


def _begins(inner: Any, bos: int | None) -> bool:
    """Whether every text is made to begin with bos."""
    with_it, plain = inner.encode("a").ids, inner.encode("a", add_special_tokens=False).ids
    if with_it not in (plain, [bos, *plain]):
        _refuse("a tokenizer that adds more than a first token")
    return with_it != plain


def _template(files: Mapping[str, bytes]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    template = config.get("chat_template")
    return template if isinstance(template, str) else None
