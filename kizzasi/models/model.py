"""`SequenceModel`: a spec turned into modules, with a parallel and a recurrent form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models.adaptive import after_step
from kizzasi.models.block import Block, add_losses
from kizzasi.models.call import Call
from kizzasi.models.decoding.generate import generate
from kizzasi.models.decoding.streaming import forecast
from kizzasi.models.groups import parameter_groups
from kizzasi.models.init import Ready
from kizzasi.models.loss import IGNORED, mean_loss
from kizzasi.models.mixer import Mixer
from kizzasi.models.norm import Norm
from kizzasi.models.ops.devices import eager
from kizzasi.models.spec import ModelSpec
from kizzasi.models.state import (
    BlockState,
    ModelState,
    require_own,
)
from kizzasi.models.through import through


class ModelOutput(NamedTuple):
    """What a model returns.

    logits  (b, t, v) from forward, (b, v) from step; predicted frames for a signal stem.
    state   the state after the last token: pass it to the next call to continue.
    aux     auxiliary losses by name (a mixture's balance loss), already weighted.
    """

    logits: Tensor
    state: ModelState
    aux: Mapping[str, Tensor]

    def loss(
        self, targets: Tensor, mask: Tensor | None = None, *, ignore_index: int = IGNORED
    ) -> Tensor:
        """Mean loss over the positions that count, plus every auxiliary loss.

        Args:
            targets: ids (b, t) for cross entropy in nats, or frames like logits for squared error.
            mask: (b, t) bool, which positions count, or their weights; None means all.
            ignore_index: the id of labels that do not count.

        Raises:
            ShapeError: targets or mask do not fit, or an id is outside the vocabulary.
        """
        mean = mean_loss(self.logits, targets, mask, ignore_index)
        return mean + sum(self.aux.values())


class SequenceModel(nn.Module, metaclass=Ready):
    """A sequence model. Make one with `build_model(spec)` or `load(folder)`.

    `SequenceModel(spec)` is for those who place and initialise models by torch's own means
    (`torch.manual_seed`, `torch.device`, `torch.set_default_dtype`); see `Ready`.

    model(inputs) trains and prefills; model.step(token, state) decodes; both agree, and a state
    carries over from either to either.

    Attributes:
        recompute: set it to True to train in less memory (activation checkpointing). A forward then
            keeps only the input of every block, and backward runs the block again; gradients are
            the same, also with dropout, for about a third more time.
    """

    recompute: bool = False
    generate = generate
    forecast = forecast

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self._causal, self._digest = spec, spec.causal, spec.digest
        self.stem = spec.stem.build(spec.d_model, spec.tie_head)
        self.embed_norm = Norm(spec.norm, spec.d_model, spec.norm_eps) if spec.embed_norm else None
        self.blocks = nn.ModuleList(
            Block(block, spec.layer_context(i), spec.norm_eps, spec.dropout)
            for i, block in enumerate(spec.blocks)
        )
        self.norm = Norm(spec.norm, spec.d_model, spec.norm_eps)

    @classmethod
    def admit(cls, spec: ModelSpec) -> None:
        spec.check()

    def start(self, spec: ModelSpec) -> None:
        self.reset_parameters()

    def forward(
        self,
        inputs: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        last_only: bool = False,
        step: bool = False,
    ) -> ModelOutput:
        """Parallel form, or with `step` the recurrent one.

        Args:
            inputs: ids (b, t), or frames (b, t, n_in) for a signal stem; without t in a step.
            state: what an earlier call returned; None starts afresh.
            segment_ids: (b, t) integers. A change of id starts a new document, which sees nothing
                before it; the first id continues the state's document if it is the same.
            mask: (b, t), False for padding, which must come before a row's first token. Logits at
                padding mean nothing.
            last_only: make logits (b, 1, v) of the last token alone: all that a prompt is for.
            step: one token per row, and neither segment_ids nor mask.

        Raises:
            ShapeError: inputs, segment_ids or mask do not fit, or a document is longer than the
                positions that the stem knows.
            SpecError: a state was given to a model that is not causal, or a step asked of it.
        """
        if step or state is not None:
            self.require_causal("step" if step else "a carried state")
        self.stem.check(inputs, time=not step)
        if state is not None:
            start = partial(self._state, 1, torch.device("meta"), None)
            require_own(state, self._digest, len(inputs), start)
        x, after, aux, sick = through(
            self._body,
            inputs,
            state,
            segment_ids,
            mask,
            causal=self._causal,
            digest=self._digest,
            step=step,
        )
        if last_only and not step:
            x, sick = x[:, -1:], None if sick is None else sick[:, -1:]
        logits = self.stem.head(self.norm(x))
        if sick is not None:
            logits = logits.masked_fill(sick.unsqueeze(-1), torch.nan)
        return ModelOutput(logits, after, aux)

    def step(self, inputs: Tensor, state: ModelState) -> ModelOutput:
        """Recurrent form: one token (b,) or frame (b, n_in). Equals forward on one time step.

        Raises SpecError if the model is not causal.
        """
        return self(inputs, state, step=True)

    def _body(
        self, inputs: Tensor, position: Tensor, before: Sequence[Any] | None, call: Call
    ) -> tuple[Tensor, tuple[BlockState, ...], Mapping[str, Tensor]]:
        """The residual stream after all blocks, their states, and their losses."""
        if before is not None or call.shape[1] > (self.stem.max_positions or call.shape[1]):
            self._check_positions(position)
        x = self._embed(inputs, position)
        aux: Mapping[str, Tensor] = {}
        states: list[BlockState] = []
        memories = [None] * len(self.blocks) if before is None else before
        recompute = self.recompute and not call.step and torch.is_grad_enabled()
        for block, memory in zip(self.blocks, memories, strict=True):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            out = run(x, memory, call=call)
            x, aux, call = out.y, add_losses(aux, out.aux), call.offering(out.shared)
            states.append(out.state)
        return x, tuple(states), aux

    def init_state(self, batch_size: int) -> ModelState:
        """The state before any input, on the model's device and in its dtype."""
        weight = next(self.stem.parameters())
        return self._state(batch_size, weight.device, weight.dtype)

    def _state(self, batch: int, device: torch.device, dtype: torch.dtype | None) -> ModelState:
        blocks = tuple(block.init_state(batch, device, dtype) for block in self.blocks)  # pyright: ignore[reportCallIssue]
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        return ModelState(blocks, zeros, zeros, self._digest)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Initialise all parameters; the same seed gives the same weights. On CPU.

        Args:
            seed: None draws from torch's own generator (`torch.manual_seed`).
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.stem.reset_parameters(generator)
        for norm in (self.embed_norm, self.norm):
            if norm is not None:
                norm.reset_parameters()
        for block in self.blocks:
            block.reset_parameters(len(self.blocks), generator)  # pyright: ignore[reportCallIssue]

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimiser groups by each mixer's own rules; see `kizzasi.models.parameter_groups`."""
        return parameter_groups(self, lr, weight_decay)

    def after_step(self, group: ProcessGroup | None = None) -> None:
        """Let routers move their balancing bias; call it after every `optimizer.step()`, as
        `kizzasi.models.moe.after_every_step(optimizer, model)` does. Nothing for other models.

        Args:
            group: the processes that train on one batch together; None means all, if there are any.
        """
        after_step(self, group)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
    ) -> None:
        """Write config.json and model.safetensors, which `load` reads; see `checkpoints.save`."""
        from kizzasi.models.checkpoints.native import save

        save(self, folder, max_shard_size=max_shard_size, overwrite=overwrite)

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def extra_repr(self) -> str:
        device = next(self.parameters()).device
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        engines = {op.resolve(mixer.engine, device) for mixer in mixers for op in mixer.ops}
        names = "+".join(sorted(engines)) or "torch"
        return f"engine={names}, params={self.n_params:,}, {self.spec.digest[:12]}"

    def require_causal(self, wish: str) -> None:
        """Refuse what needs results that no later token can change."""
        if not self._causal:
            path, part = next((p, s) for p, s in self.spec.parts() if not s.causal)
            raise SpecError(
                f"{path}: {part.kind!r} lets a result depend on later tokens, which rules out "
                f"{wish}; pass whole sequences to forward, or choose a causal part"
            )

    def _embed(self, inputs: Tensor, position: Tensor) -> Tensor:
        x = self.stem.embed(inputs, position)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _check_positions(self, position: Tensor) -> None:
        known = self.stem.max_positions
        if known is None:
            return
        if torch.compiler.is_compiling():
            message = f"inputs: a document is longer than the stem's max_positions {known}"
            inside = (position < known).all()
            torch._assert_async(inside, message)  # pyright: ignore[reportPrivateImportUsage]
        elif eager() and int(position.max()) >= known:
            raise ShapeError(
                f"inputs: a document has {int(position.max()) + 1} tokens and the stem "
                f"max_positions {known}; give shorter documents"
            )
