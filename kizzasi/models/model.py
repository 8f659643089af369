"""`SequenceModel`: a spec turned into modules, with a parallel and a recurrent form."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models.adaptive import after_step
from kizzasi.models.call import Call
from kizzasi.models.decoding.cache_policy import with_cache
from kizzasi.models.decoding.generate import generate
from kizzasi.models.decoding.streaming import forecast
from kizzasi.models.groups import parameter_groups
from kizzasi.models.heads import Own, refuse_pooled
from kizzasi.models.init import Ready
from kizzasi.models.layers.stack import Stack
from kizzasi.models.loss import IGNORED, mean_loss, mean_loss_in_chunks, with_charge
from kizzasi.models.mixer import CHARGE, Mixer
from kizzasi.models.norm import Norm
from kizzasi.models.ops.devices import eager
from kizzasi.models.spec import ModelSpec
from kizzasi.models.state import ModelState, require_own
from kizzasi.models.through import through
from kizzasi.strict import unknown_name


class ModelOutput(NamedTuple):
    """What a model returns.

    logits  (b, t, v) from forward, (b, v) from step; predicted frames for a signal stem.
    state   the state after the last token: pass it to the next call to continue.
    aux     auxiliary losses by name (a mixture's balance loss), already weighted.
    heads   outputs of every head by name, if the spec names heads; `logits` are the first's.
    """

    logits: Tensor
    state: ModelState
    aux: Mapping[str, Tensor]
    heads: Mapping[str, Tensor] = {}  # read-only

    def loss(
        self,
        targets: Tensor | Mapping[str, Tensor],
        mask: Tensor | None = None,
        *,
        ignore_index: int = IGNORED,
    ) -> Tensor:
        """Mean loss over the positions that count, plus every auxiliary loss.

        Args:
            targets: ids (b, t) for cross entropy in nats, or frames like logits for squared error;
                of several heads by name, whose losses are added.
            mask: (b, t) bool, which positions count, or their weights; None means all.
            ignore_index: the id of labels that do not count.

        Raises:
            ShapeError: targets or mask do not fit, or an id is outside the vocabulary.
        """
        if isinstance(targets, Tensor):
            mean = mean_loss(self.logits, targets, mask, ignore_index)
            return mean + sum(self.aux.values())
        unknown = [name for name in targets if name not in self.heads]
        if unknown or not targets:
            wrong = f"{unknown[0]!r} {unknown_name(unknown[0], self.heads)}" if unknown else "empty"
            raise ShapeError(f"targets: {wrong}; give some of the heads {sorted(self.heads)}")
        losses = [
            mean_loss(self.heads[name], each, mask, ignore_index) for name, each in targets.items()
        ]
        return torch.stack(losses).sum() + sum(self.aux.values())


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
    with_cache = with_cache
    forecast = forecast

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self._causal, self._digest = spec, spec.causal, spec.digest
        self.stem = spec.stem.build(spec.d_model, spec.tie_head, spec.own_head)
        self.embed_norm = Norm(spec.norm, spec.d_model, spec.norm_eps) if spec.embed_norm else None
        self.blocks = Stack.of(spec.settled(), spec.context, spec.norm_eps, spec.dropout)
        self.norm = Norm(spec.norm, spec.d_model, spec.norm_eps)
        made = {head.name: head.build(spec.d_model) for head in spec.heads}
        self.heads = nn.ModuleDict({n: head for n, head in made.items() if head is not None})

    @classmethod
    def admit(cls, spec: ModelSpec) -> None:
        spec.check()

    def start(self, spec: ModelSpec) -> None:
        self.reset_parameters()

    def forward(
        self,
        inputs: Tensor | None = None,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        last_only: bool = False,
        step: bool = False,
        inputs_embeds: Tensor | None = None,
        read: Callable[[Tensor], Tensor] | None = None,
        n_blocks: int | None = None,
        coded: bool = False,
    ) -> ModelOutput:
        """Parallel form, or with `step` the recurrent one.

        Args:
            inputs: ids (b, t), or frames (b, t, n_in) for a signal stem; without t in a step.
            state: what an earlier call returned; None starts afresh.
            segment_ids: (b, t) integers. A change of id starts a new document, which sees nothing
                before it; the first id continues the state's document if it is the same.
            mask: (b, t), False for padding, which must come before a row's first token of this
                call. Logits at padding mean nothing.
            last_only: make logits (b, 1, v) of the last token alone: all that a prompt is for.
            step: one token per row, and neither segment_ids nor mask.
            inputs_embeds: (b, t, d) in place of the inputs' embeddings; (b, d) in a step.
            read: what to make of the normed features (b, t, d) in place of logits.
            n_blocks: run the first so many blocks alone, and give `read` what comes out of them, as
                it is; the state is of no use then. None means all.
            coded: for an honest score of a model with latent bits: they are chosen by the encoder,
                which sees what is to come, and paid for. Logits get one entry more (b, t, v + 1),
                the share of probability that the bits of a token cost, so that cross entropy is
                that of the tokens plus that of the bits. Changes nothing in other models.

        Raises:
            ShapeError: inputs, segment_ids or mask do not fit, or a document is longer than the
                positions that the stem knows.
            StateError: the state is of another model.
            SpecError: a state was given to a model that is not causal, or a step asked of it, or of
                a head that reads whole sequences.
        """
        if step or state is not None:
            self.require_causal("step" if step else "a carried state")
        given = self._check_inputs(inputs, inputs_embeds, time=not step)
        if self.spec.heads and read is None:
            refuse_pooled(self.spec.heads, state is not None, segment_ids is not None)
        if state is not None:
            start = partial(self._state, 1, torch.device("meta"), None)
            require_own(state, self._digest, len(given), start)
        body = partial(self._body, embedded=inputs is None, n_blocks=n_blocks)
        about = {"causal": self._causal, "digest": self._digest, "step": step}
        about["coded"] = coded = coded and self.spec.encodes
        x, after, aux, sick = through(body, given, state, segment_ids, mask, **about)
        if n_blocks is None:
            x = self.norm(x)
        if read is not None:
            x = x if sick is None else x.masked_fill(sick.unsqueeze(-1), torch.nan)
            return ModelOutput(read(x), after, aux)
        if coded:
            losses = {name: loss for name, loss in aux.items() if name != CHARGE}
            return ModelOutput(with_charge(self._own_head(x), aux[CHARGE]), after, losses)
        outputs = self._read_heads(x, mask, sick, last_only and not step)
        return ModelOutput(
            next(iter(outputs.values())), after, aux, outputs if self.spec.heads else {}
        )

    def _read_heads(
        self, x: Tensor, mask: Tensor | None, sick: Tensor | None, last_only: bool
    ) -> dict[str, Tensor]:
        """The outputs of all heads by name, NaN where the input was not finite."""
        outputs: dict[str, Tensor] = {}
        ends, ill = (x[:, -1:], sick if sick is None else sick[:, -1:]) if last_only else (x, sick)
        for spec in self.spec.heads or (Own(),):
            own = isinstance(spec, Own)
            features = ends if spec.pool is None else x
            out = self._own_head(features) if own else self.heads[spec.name](features, mask)
            if sick is not None and ill is not None:
                rows = {None: ill, "last": sick[:, -1], "mean": sick.any(1)}[spec.pool]
                out = out.masked_fill(rows.unsqueeze(-1), torch.nan)
            outputs[spec.name] = out
        return outputs

    def hidden(
        self,
        inputs: Tensor | None = None,
        state: ModelState | None = None,
        *,
        layer: int | None = None,
        **call: Any,
    ) -> Tensor:
        """Features (b, t, d): what the head reads, or what a layer puts out.

        Args:
            inputs, state, call: as for `forward`: segment_ids, mask, inputs_embeds.
            layer: 0 is the embeddings, k the residual stream after k blocks, without the final
                norm; None is what the head reads: after all blocks and the final norm.

        Raises:
            ShapeError: there is no such layer; else as `forward`.
        """
        depth = len(self.blocks)
        if layer is not None and not 0 <= layer <= depth:
            raise ShapeError(f"layer: {layer} is outside 0 (embeddings) to {depth} (all blocks)")
        return self(inputs, state, read=nn.Identity(), n_blocks=layer, **call).logits

    def loss(
        self,
        inputs: Tensor | None,
        targets: Tensor,
        *,
        counts: Tensor | None = None,
        ignore_index: int = IGNORED,
        mask: Tensor | None = None,
        **call: Any,
    ) -> Tensor:
        """`model(inputs).loss(targets)` without ever holding all logits: some tokens at a time, and
        again in backward. The same loss and gradients, in a fraction of the memory where the
        vocabulary is large; where it is small, all tokens at once.

        Args:
            inputs, mask, call: as for `forward`: state, segment_ids, inputs_embeds.
            targets: ids or frames, of the stem's own head.
            counts: (b, t) bool, which count, or their weights; None means all but padding.
            ignore_index: the id of labels that do not count.

        Raises as `forward` and `ModelOutput.loss` do, SpecError if the first head is not the own.
        """
        if self.spec.heads and not isinstance(self.spec.heads[0], Own):
            raise SpecError("heads[0]: not the stem's own; use model(inputs).loss(targets)")
        if mask is not None:
            counts = mask.bool() if counts is None else counts * mask.bool()

        def read(x: Tensor) -> Tensor:
            head, width = self._own_head, self.stem.n_out
            return mean_loss_in_chunks(head, width, x, targets, counts, ignore_index)

        out = self(inputs, mask=mask, read=read, **call)
        return out.logits + sum(out.aux.values())

    def step(self, inputs: Tensor, state: ModelState) -> ModelOutput:
        """Recurrent form: one token (b,) or frame (b, n_in). Equals forward on one time step.

        Raises SpecError if the model is not causal.
        """
        return self(inputs, state, step=True)

    def _body(
        self,
        inputs: Tensor,
        position: Tensor,
        before: Sequence[Any] | None,
        call: Call,
        *,
        embedded: bool,
        n_blocks: int | None,
    ) -> tuple[Tensor, tuple[Any, ...], Mapping[str, Tensor]]:
        """The residual stream after all blocks, their states, and their losses."""
        if before is not None or call.shape[1] > (self.stem.max_positions or call.shape[1]):
            self._check_positions(position)
        x = self._embed(inputs, position, embedded)
        recompute = self.recompute and not call.step and torch.is_grad_enabled()
        out = self.blocks(x, before, call, n_layers=n_blocks, recompute=recompute)
        return out.x, out.state, out.aux

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState:
        """The state before any input.

        Args:
            device: None is where the weights are, or torch's default while they lie elsewhere
                (offloaded).
            dtype: of the activations; None is that of the stem's weights.
        """
        weights = list(self.parameters())
        here = (weight.device for weight in weights if not weight.is_meta)
        place = next(here, torch.get_default_device()) if device is None else torch.device(device)
        return self._state(batch_size, place, dtype or weights[0].dtype)

    def _state(self, batch: int, device: torch.device, dtype: torch.dtype | None) -> ModelState:
        blocks = self.blocks.init_state(batch, device, dtype)
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
        self.blocks.reset_parameters(self.spec.depth, generator)
        for head in self.heads.values():
            head.reset_parameters(generator)  # pyright: ignore[reportCallIssue]

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

    def _check_inputs(self, inputs: Tensor | None, embeds: Tensor | None, *, time: bool) -> Tensor:
        """What is given of the two, once it fits."""
        if (inputs is None) == (embeds is None):
            raise ShapeError("inputs: give either inputs or inputs_embeds")
        if embeds is None:
            self.stem.check(inputs, time=time)  # pyright: ignore[reportArgumentType]
            return inputs  # pyright: ignore[reportReturnType]
        d = self.spec.d_model
        if embeds.ndim != 2 + time or embeds.shape[-1] != d or not embeds.is_floating_point():
            wanted = f"(b, t, {d})" if time else f"(b, {d})"
            given = f"{tuple(embeds.shape)} {embeds.dtype}"
            raise ShapeError(f"inputs_embeds: expected {wanted} of a floating dtype, got {given}")
        return embeds

    def _embed(self, inputs: Tensor, position: Tensor, embedded: bool) -> Tensor:
        if embedded:
            inputs = torch.where(position[..., None] < 0, 0.0, inputs)
            x = self.stem.placed(inputs, position)
        else:
            x = self.stem.embed(inputs, position)
            x = x if self.spec.embed_scale == 1 else self.spec.embed_scale * x
        return x if self.embed_norm is None else self.embed_norm(x)

    def _own_head(self, features: Tensor) -> Tensor:
        """Logits of the stem's own head."""
        logits, cap = self.stem.head(features), self.spec.logit_cap
        logits = logits if self.spec.logit_scale == 1 else self.spec.logit_scale * logits
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
