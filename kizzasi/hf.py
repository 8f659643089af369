"""Kizzasi models in transformers: its AutoClasses, `generate` and Trainer.

    import kizzasi.hf
    kizzasi.hf.register()
    model = AutoModelForCausalLM.from_pretrained("runs/first/best")

The model is the same `SequenceModel`, found as `.model`, in the clothes of a PreTrainedModel. What
it saves is a folder of ours. Needs the package transformers (`pip install 'kizzasi-models[hf]'`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kizzasi.errors import CheckpointError, ShapeError
from kizzasi.models import ModelSpec, SequenceModel, Tokens, build_model, load
from kizzasi.models.build import skeleton
from kizzasi.models.checkpoints import native
from kizzasi.models.checkpoints.companions import GENERATION, IDS, OWN, POSITIONS, companions_of
from kizzasi.models.state import ModelState

Parent: Any = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig
# transformers 5 came to call it "cache".
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


class StateCache:
    """A state, for `generate` to carry: what transformers calls a cache."""

    is_compileable = False

    def __init__(self, state: ModelState) -> None:
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the longest row has seen."""
        return int(self.state.position.max())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index, as beams want them."""
        self.state = self.state.gather(beam_idx)


class KizzasiConfig(Parent):
    """config.json of a folder of ours: the spec as plain data, and what goes along with it."""

    model_type = native.NAME

    def __init__(
        self,
        spec: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        more |= {"tie_word_embeddings": False}  # the spec ties them, with one parameter
        super().__init__(**more)
        self.spec, self.generation = spec, dict(generation or {})
        for key in (*IDS, POSITIONS):
            if key in self.generation:
                setattr(self, key, self.generation[key])
        if spec is not None:
            model = ModelSpec.from_dict(spec)
            self.hidden_size, self.num_hidden_layers = model.d_model, len(model.blocks)
            self.vocab_size = getattr(model.stem, "vocab_size", None)


class KizzasiForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of ours as transformers calls one.

    Args:
        config: with a spec of a causal model of tokens.
        model: None builds one, freshly initialised.
    """

    config_class = KizzasiConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True  # of most mixers: a state cannot be cut back to fewer tokens

    def __init__(self, config: Any, model: SequenceModel | None = None) -> None:
        super().__init__(config)
        if config.spec is None:
            raise CheckpointError("config: no spec; load one, or KizzasiConfig(spec.to_dict())")
        spec = ModelSpec.from_dict(config.spec) if model is None else model.spec
        if not isinstance(spec.stem, Tokens) or not spec.causal:
            kind = spec.stem.kind if spec.causal else "not causal"
            raise CheckpointError(f"spec: {kind}; a causal language model has a stem of tokens")
        self.model = build_model(spec) if model is None else model
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **hub: Any,
    ) -> KizzasiForCausalLM:
        """Load a folder; `hub` is what transformers passes to find and download files."""
        path = Path(pretrained_model_name_or_path)
        given = dtype if dtype is not None else torch_dtype
        wanted = getattr(torch, given) if isinstance(given, str) and given != "auto" else given
        place = device_map.get("") if isinstance(device_map, Mapping) else device_map
        if place == "auto":
            place = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(path, device=place, dtype=None if wanted == "auto" else wanted)
        along = companions_of(path).generation
        config = config or KizzasiConfig(model.spec.to_dict(), along)
        whole = cls(config, model)
        ids = {key: along[key] for key in IDS if key in along}
        whole.generation_config = GenerationConfig(**{**ids, **along.get("config", {})})
        return whole.eval()

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = native.SHARD_BYTES,
        **hub: Any,
    ) -> None:
        """Write a folder of ours, in place of an earlier one, as transformers does.

        Args:
            state_dict: what to write in place of this model's own tensors, such as gathered ones.
        """
        if push_to_hub:
            raise CheckpointError("push_to_hub: not done here; upload the folder when it is saved")
        if not is_main_process:
            return
        model = self.model
        if state_dict is not None:
            model = skeleton(model.spec, torch.device("meta"))
            tensors = {name.removeprefix("model."): t for name, t in state_dict.items()}
            model.load_state_dict(tensors, assign=True)
        said = {} if self.generation_config is None else self.generation_config.to_dict()
        said = {k: v for k, v in said.items() if k not in OWN and v is not None}
        ids = {key: said.pop(key) for key in IDS if key in said}
        positions = getattr(self.config, POSITIONS, None)
        generation = ids | ({} if positions is None else {POSITIONS: positions})
        generation |= {"config": said} if said else {}
        files = {GENERATION: native.to_json({**ids, **said})}
        native.save(
            model,
            save_directory,
            max_shard_size=max_shard_size,
            overwrite=True,
            entries={"generation": generation} if generation else {},
            files=files,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, the state as a cache, and with labels the loss, auxiliary losses included.

        Args:
            input_ids: (b, t), those after the cache.
            attention_mask: (b, t or more), 0 at padding, of which the last t columns count. Padding
                on the right is left out of account: nothing before it sees it.
            labels: (b, t) as input_ids, shifted here; -100 is ignored.
            logits_to_keep: of the last so many tokens only; 0 means all.
            more: the cache, under the name that this transformers has for it, and numbers for the
                loss.

        Raises:
            ShapeError: no ids.
        """
        if input_ids is None:
            raise ShapeError("input_ids: missing; this model reads ids, not embeddings")
        cache = more.pop(CACHE, None)
        more.pop("position_ids", None)  # the state knows them
        state = None if cache is None else cache.state
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        if mask is not None and (state is not None or bool(mask[:, 0].all())):
            mask = None
        out = self.model(input_ids, state, mask=mask)
        loss = None
        if labels is not None:
            own = {k: v for k, v in more.items() if k == "num_items_in_batch"}
            size = out.logits.shape[-1]
            loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=size, **own)
            loss = loss + sum(out.aux.values())
        logits = out.logits[:, -logits_to_keep:] if logits_to_keep else out.logits
        carried: Any = {CACHE: StateCache(out.state)} if use_cache is not False else {}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **carried)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Names as in a folder of ours, without "model.", are understood: Trainer resumes so."""
        if not any(name.startswith("model.") for name in state_dict):
            state_dict = {f"model.{name}": tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def init_weights(self) -> None:
        """Nothing: `build_model` and `load` have done it."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing, as above."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.stem.embedding  # pyright: ignore[reportReturnType]

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Train in less memory; see `SequenceModel.recompute`."""
        self.model.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.recompute = False


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know folders of ours. May be called again."""
    transformers.AutoConfig.register(native.NAME, KizzasiConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(KizzasiConfig, KizzasiForCausalLM, exist_ok=True)
