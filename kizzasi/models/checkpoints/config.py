"""A foreign config.json, read strictly: every key is used, known to be harmless, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.strict import coerce

T = TypeVar("T")
REQUIRED: Any = object()
# Keys of transformers that do not change what a model computes in evaluation: origin, special
# tokens, sampling, forms of the output, training.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version dtype torch_dtype use_cache initializer_range
    pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id attention_dropout
    _name_or_path _attn_implementation_autoset output_attentions output_hidden_states output_scores
    return_dict return_dict_in_generate torchscript use_bfloat16 id2label label2id _num_labels
    problem_type task_specific_params finetuning_task tokenizer_class prefix
    chunk_size_feed_forward max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size num_return_sequences bad_words_ids remove_invalid_values
    transformers.js_config unsloth_fixed unsloth_version
    """.split()  # noqa: SIM905
)

# Keys of transformers that say nothing as long as they have this value.
INERT = {
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "encoder_no_repeat_ngram_size": 0,
    "quantization_config": None,
}


class Config:
    """The keys of a config.json, handed out one by one; `finish` refuses those that remain.

    Args:
        data: the JSON object.
        where: what error messages start with, such as the file's path.
        prefix: of the keys in messages, for an object inside another.
    """

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.data, self.where, self.prefix = data, where, prefix
        self._left = set(data)

    def get(self, key: str, kind: type[T], default: Any = REQUIRED, *, null: Any = REQUIRED) -> T:
        """The value of a key, which must be of this type (an int may stand for a float).

        Args:
            key, kind: as said. `kind` may also be an annotation such as list[int].
            default: if the key is absent; without one it must be there.
            null: if the key is there and null; without one, as if absent.
        """
        self._left.discard(key)
        value = self.data.get(key)
        if value is None:
            value = null if key in self.data and null is not REQUIRED else default
            if value is REQUIRED:
                self.refuse(key, "missing; the model cannot be built without it")
            return value
        try:
            return coerce(value, kind, key)
        except SpecError as error:
            raise CheckpointError(f"{self.where}: {self.prefix}{error}") from error

    def count(self, key: str, at_most: int, default: Any = REQUIRED) -> int:
        """How often something is repeated: from 1 to what the stored tensors can possibly hold."""
        value = self.get(key, int, default)
        if not 1 <= value <= at_most:
            self.refuse(key, f"{value} cannot be: the tensors stored allow 1 to {at_most}")
        return value

    def choose(self, key: str, table: Mapping[Any, T], default: Any = REQUIRED) -> T:
        """What the table makes of the value of a key (or of the default)."""
        value = self.get(key, type(next(iter(table))), default)
        if value not in table:
            self.refuse(key, f"{value!r:.80} is not supported; only {list(table)} are")
        return table[value]

    def only(self, key: str, *allowed: Any) -> None:
        """The key is absent, null, or has one of these values."""
        value = self.data.get(key)
        self._left.discard(key)
        if value is not None and value not in allowed:
            choice = ", ".join(map(repr, allowed)) or "null"
            self.refuse(key, f"{value!r:.80} is not supported; only {choice} is")

    def within(self, key: str) -> Config | None:
        """An object inside this one, to be finished by itself; None if absent or null."""
        value = self.get(key, dict, None)
        prefix = f"{self.prefix}{key}."
        return None if value is None else Config(value, self.where, prefix)

    def skip(self, *keys: str) -> None:
        """Keys known to be harmless in this family."""
        self._left -= set(keys)

    def finish(self, harmless: Iterable[str] = HARMLESS) -> None:
        """Refuse every key that nobody asked for."""
        for key in sorted(self._left - set(harmless)):
            if self.data[key] is not None and self.data[key] != INERT.get(key):
                rule = "unknown here, and ignoring it might change what the model computes"
                self.refuse(key, f"{self.data[key]!r:.80} is {rule}; remove it if it does not")

    def refuse(self, key: str, reason: str) -> Any:
        """Raise CheckpointError about a key."""
        raise CheckpointError(f"{self.where}: {self.prefix}{key}: {reason}")
