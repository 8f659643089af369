"""Modules and stages of a document: what stands in the pipeline, in order, as layers.

Every stage has weights of its own; `repeat` runs them several times. An embedding and a readout at
the ends are the stem's, and may be left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.models.layers.layer import check_stack
from kizzasi.nas.pipelines.compiling.latents import Bits, encoder_of, latent, latent_fields
from kizzasi.nas.pipelines.compiling.stack import INHERITED, Frame, layers_of
from kizzasi.nas.pipelines.compiling.topology import layer
from kizzasi.nas.pipelines.document import Arch, Module, Params, Stage
from kizzasi.nas.pipelines.misfits import DROP, Findings
from kizzasi.strict import unknown_name

KINDS = {"module": "transformer"}
READ_PARAMS = {"embedding": "vocab_size", "latent_sampler": "latent_dim", "custom": "layers"}
OF_A_STACK = (
    "n_layers",
    "mix_unit",
    "ffn",
    "norm",
    "pos",
    "cond",
    "kv_policy",
    "residual",
    "hierarchy",
    "depth_router",
    "recurrence",
)


@dataclass
class Line:
    """The pipeline as it is put together.

    Args:
        arch: of the document.
        ctx_len: window of training.
        vocab_size: of the stem.
        layers: so far.
        spans: layers of every stage so far, as (first, last + 1).
        whole: whether nothing is missing.
        encoders, latents: stages that stand beside the line, and what they are made of.
    """

    arch: Arch
    ctx_len: int
    vocab_size: int
    findings: Findings
    layers: list[Any] = field(default_factory=list)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    whole: bool = True
    encoders: dict[str, list[Any]] = field(default_factory=dict)
    latents: dict[str, Bits] = field(default_factory=dict)

    def take(self, stage: Stage, i: int) -> None:
        """Put one stage at the end."""
        path, findings = f"arch.pipeline[{i}]", self.findings
        if stage.name in self.spans:
            findings.add(f"{path}.name", f"{stage.name!r} names two stages", "choose another")
        name = stage.module or stage.name
        module = self.arch.modules.get(name)
        if module is None:
            found = unknown_name(name, self.arch.modules)
            findings.add(f"{path}.module", f"{name!r} {found}", "")
            self.whole = False
            return
        kind = KINDS.get(stage.kind or module.kind, stage.kind or module.kind)
        if kind != module.kind:
            rule = f"{stage.kind!r}, but the module {name!r} is of kind {module.kind!r}"
            findings.drop(f"{path}.kind", rule)
        self._order(stage, path)
        given = module.params or Params()
        for what in READ_PARAMS.values():
            if getattr(given, what) is not None and READ_PARAMS.get(module.kind) != what:
                findings.drop(f"arch.modules.{name}.params.{what}", f"{module.kind!r} reads none")
        first = len(self.layers)
        takers = {
            "embedding": self._embedding,
            "readout": self._readout,
            "transformer": self._transformer,
            "custom": self._custom,
            "latent_sampler": self._latent_sampler,
        }
        takers[module.kind](stage, module, f"arch.modules.{name}", path)
        self.spans[stage.name] = (first, len(self.layers))

    def _samples(self, stage: Stage) -> bool:
        module = self.arch.modules.get(stage.module or stage.name)
        return module is not None and module.kind == "latent_sampler"

    def _order(self, stage: Stage, path: str) -> None:
        """What a stage reads: the stage before it, or what is refused."""
        findings = self.findings
        before = list(self.spans)
        for name in ("inputs", "kv_from", "mem_from"):
            for j, source in enumerate(getattr(stage, name)):
                if source not in self.spans:
                    found = unknown_name(source, before)
                    findings.add(
                        f"{path}.{name}[{j}]",
                        f"{source!r} {found}",
                        "name an earlier stage",
                        (f"{path}.{name}", DROP),
                    )
        before = [name for name in before if name not in (*self.encoders, *self.latents)]
        reads = tuple(name for name in stage.inputs if name not in self.latents)
        if reads and before and not self._samples(stage) and reads != (before[-1],):
            rule = f"{list(stage.inputs)}: a stage reads the stream that {before[-1]!r} leaves"
            findings.drop(f"{path}.inputs", rule)
        for name, mode in (("train_only", "train"), ("prefill_only", "prefill")):
            if getattr(stage, name) and stage.mode not in (None, mode):
                findings.drop(f"{path}.{name}", f"the mode is {stage.mode!r}")
        mode = stage.mode or ("train" if stage.train_only else None)
        mode = mode or ("prefill" if stage.prefill_only else "all")
        beside = stage.name in self._encoding() or self._samples(stage)
        if beside and mode != "train_prefill":
            rule = "an encoder and its latent run where the tokens are known, and nowhere else"
            findings.set(f"{path}.mode", rule, "train_prefill")
        elif mode != "all" and not beside:
            rule = f"what runs in {mode!r} alone would make another model when decoding"
            findings.drop(f"{path}.mode" if stage.mode else f"{path}.train_only", rule)
        if stage.params is not None:
            findings.drop(f"{path}.params", "settings belong to the module")

    # ----------------------------------------------------------------- kinds of module

    def _embedding(self, stage: Stage, module: Module, path: str, where: str) -> None:
        given = None if module.params is None else module.params.vocab_size
        if self.layers:
            self.findings.drop(where, "an embedding stands first")
        self._same(given, self.vocab_size, f"{path}.params.vocab_size", "train.vocab_size")
        self._end(stage, module, path, where)

    def _readout(self, stage: Stage, module: Module, path: str, where: str) -> None:
        self._same(module.output_dim, self.vocab_size, f"{path}.output_dim", "train.vocab_size")
        if stage.name != self.arch.pipeline[-1].name:
            self.findings.drop(where, "a readout stands last")
        self._end(stage, module, path, where)

    def _end(self, stage: Stage, module: Module, path: str, where: str) -> None:
        self._same(module.d_model, self.arch.d_model, f"{path}.d_model", "arch.d_model")
        for name in OF_A_STACK:
            if getattr(module, name) is not None:
                self.findings.drop(f"{path}.{name}", f"{module.kind!r} has no layers")
        if stage.repeat not in (None, 1):
            self.findings.drop(f"{where}.repeat", f"{module.kind!r} is there once")
        if module.budget is not None:
            self._budget(module, stage, path, where, 0)

    def _same(self, given: int | None, wanted: int | None, path: str, other: str) -> None:
        if given is not None and given != wanted:
            self.findings.set(path, f"{given}, but {other} is {wanted}", wanted)

    def _transformer(self, stage: Stage, module: Module, path: str, where: str) -> None:
        if module.output_dim is not None:
            self.findings.drop(f"{path}.output_dim", "a transformer does not read it")
        layers = layers_of(module, Frame(path, self.arch, self.ctx_len), self.findings)
        if layers is None:
            self.whole = False
            return
        if stage.name in self._encoding():
            self.encoders[stage.name] = encoder_of(layers, f"{path}.mix_unit", self.findings)
            return
        self._put(layers, stage, module, path, where)

    def _encoding(self) -> set[str]:
        """Stages that a latent sampler reads."""
        modules = self.arch.modules
        samplers = [
            stage
            for stage in self.arch.pipeline
            if (m := modules.get(stage.module or stage.name)) and m.kind == "latent_sampler"
        ]
        return {name for stage in samplers for name in stage.inputs}

    def _custom(self, stage: Stage, module: Module, path: str, where: str) -> None:
        for name in OF_A_STACK:
            if getattr(module, name) is not None:
                self.findings.drop(f"{path}.{name}", "params.layers says it")
        given = None if module.params is None else module.params.layers
        layers = layers_from(given, f"{path}.params.layers", self.findings)
        if layers is None:
            self.whole = False
        else:
            self._put(layers, stage, module, path, where)

    def _latent_sampler(self, stage: Stage, module: Module, path: str, where: str) -> None:
        source = next((name for name in stage.inputs if name in self.encoders), None)
        if source is None:
            self.findings.drop(where, "its inputs name no stage that could be its encoder")
            return
        for name in OF_A_STACK:
            if name != "cond" and getattr(module, name) is not None:
                self.findings.drop(f"{path}.{name}", "a latent has no layers of its own")
        if module.params is not None and module.params.latent_dim is not None:
            rule = "a latent is as wide as its bits, cond.source.H"
            self.findings.drop(f"{path}.params.latent_dim", rule)
        given = latent_fields(module.cond, f"{path}.cond", self.findings)
        ops = () if module.cond is None else module.cond.ops
        self.latents[stage.name] = Bits(self.encoders[source], given, ops, f"{path}.cond")

    def _put(self, layers: list[Any], stage: Stage, module: Module, path: str, where: str) -> None:
        if stage.repeat is not None and stage.repeat > 1:
            layers = [layer("loop", layers, n_loops=stage.repeat)]
        layers = self._reading(layers, stage, where)
        for name in (*stage.inputs, *stage.kv_from, *stage.mem_from):
            if name in self.latents:
                bits = self.latents[name]
                width, found = self.arch.d_model or 1, self.findings
                layers = [latent(layers, bits, width, found)] if bits.encoder else layers
        self.layers += layers
        if module.budget is not None or stage.budget is not None:
            flops = self._flops(layers)
            self._budget(module, stage, path, where, flops)

    def _reading(self, layers: list[Any], stage: Stage, where: str) -> list[Any]:
        """The layers, their attention reading keys and values, or the stream, of a stage."""
        for name, source in (("kv_from", "kv_from"), ("mem_from", "memory_from")):
            path, findings = f"{where}.{name}", self.findings
            if future := [one for one in getattr(stage, name) if one in self.encoders]:
                rule = f"{future[0]!r} sees the whole document, and would show the future"
                findings.drop(path, rule, "read it through a latent_sampler")
                continue
            beside = {*self.encoders, *self.latents}
            named = [one for one in getattr(stage, name) if one in self.spans and one not in beside]
            if not named:
                continue
            if len(named) > 1:
                rule = f"{named}: a layer reads one other"
                findings.set(path, rule, named[:1], "name one stage")
            first, last = self.spans[named[0]]
            plain = all(isinstance(one, BlockSpec) for one in layers)
            attends = plain and all(one.mixer.kind == "attention" for one in layers)
            if last == first or not attends:
                rule = f"only plain layers of attention read {named[0]!r}, which has layers"
                self._keep_latent(path, rule, getattr(stage, name))
                continue
            read = [replace(one, mixer=replace(one.mixer, **{source: last - 1})) for one in layers]
            try:
                check_stack((*self.layers, *read), self.arch.d_model or 1, "layers")
            except SpecError as error:
                self._keep_latent(path, str(error).partition(": ")[2], getattr(stage, name))
                continue
            layers = read
        return layers

    def _keep_latent(self, path: str, rule: str, named: tuple[str, ...]) -> None:
        """Find keys that cannot be read, and leave the latents that are named beside them."""
        latents = [name for name in named if name in self.latents]
        remedy = "name the latent alone" if latents else "leave it out"
        self.findings.add(path, rule, remedy, (path, latents or DROP))

    # ----------------------------------------------------------------- budgets

    def _flops(self, layers: list[Any]) -> int:
        """Of a token in these layers, forward."""
        assert self.arch.d_model is not None
        tokens = self.ctx_len
        layers = [one for one in layers if not one.sources] or layers
        alone = ModelSpec(self.arch.d_model, tuple(layers), Tokens(1))
        return -(-(alone.cost(tokens).flops - 2 * tokens * self.arch.d_model) // tokens)

    def _budget(self, module: Module, stage: Stage, path: str, where: str, flops: int) -> None:
        findings, own = self.findings, module.budget
        times = stage.budget
        if own is None:
            findings.drop(f"{where}.budget", "there is no budget of the module to multiply")
            return
        if own.latency_ms is not None:
            rule = "a latency is a machine's, and a document is read on any"
            remedy = "leave it out, and bound a search by --max-latency-ms"
            findings.drop(f"{path}.budget.latency_ms", rule, remedy)
        factor = (
            1.0 if times is None or times.compute_multiplier is None else (times.compute_multiplier)
        )
        if own.flops_per_token is None:
            if times is not None and times.compute_multiplier is not None:
                findings.drop(f"{where}.budget.compute_multiplier", "there is nothing to multiply")
        elif flops > factor * own.flops_per_token:
            rule = f"a token takes {flops:,} flops, more than {factor * own.flops_per_token:,.0f}"
            findings.set(f"{path}.budget.flops_per_token", rule, float(-(-flops // factor)))
        given = times is not None and times.tokens_multiplier is not None
        if given and own.tokens_per_step is None:
            findings.drop(f"{where}.budget.tokens_multiplier", "there is nothing to multiply")

    def tokens(self, per_step: int) -> None:
        """Find modules that may not see as many tokens as a step has."""
        for i, stage in enumerate(self.arch.pipeline):
            name = stage.module or stage.name
            module = self.arch.modules.get(name)
            own = None if module is None else module.budget
            if own is None or own.tokens_per_step is None:
                continue
            times = stage.budget and stage.budget.tokens_multiplier
            allowed = own.tokens_per_step * (times or 1.0)
            if per_step > allowed:
                rule = f"a step has {per_step:,} tokens, more than {allowed:,.0f} of stage {i}"
                path = f"arch.modules.{name}.budget.tokens_per_step"
                self.findings.set(path, rule, -(-per_step // 1))

    def unread(self) -> None:
        """Find modules without a stage, and what the model says that every module says itself."""
        used = {stage.module or stage.name for stage in self.arch.pipeline}
        for name in self.arch.modules:
            if name not in used:
                self.findings.drop(f"arch.modules.{name}", "no stage names it")
        stacks = [m for m in self.arch.modules.values() if m.kind == "transformer"]
        for name in OF_A_STACK:
            inherits = name in INHERITED and any(getattr(m, name) is None for m in stacks)
            if name != "norm" and getattr(self.arch, name) is not None and not inherits:
                rule = "the modules of the pipeline say it, each for itself"
                self.findings.drop(f"arch.{name}", rule)


def layers_from(given: Any, path: str, findings: Findings) -> list[Any] | None:
    """Layers as a ModelSpec writes them."""
    if not isinstance(given, list) or not given:
        findings.add(path, "it is needed", "give a list of layers as a ModelSpec writes them")
        return None
    try:
        blocks = ModelSpec.from_dict(
            {"d_model": 1, "blocks": given, "stem": {"kind": "tokens", "vocab_size": 1}}
        )
    except SpecError as error:
        text = str(error).replace("blocks", path, 1)
        where, _, rule = text.partition(": ")
        findings.add(where, rule, "")
        return None
    return list(blocks.blocks)
