"""The stages of a document whose layers are those of a spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from kizzasi.models import BlockSpec, LayerSpec, ModelSpec
from kizzasi.nas.pipelines.compiling.latents import encoder_of
from kizzasi.nas.pipelines.compiling.stack import Frame, layers_of
from kizzasi.nas.pipelines.document import Stack
from kizzasi.nas.pipelines.misfits import Findings
from kizzasi.nas.pipelines.printing.parts import block_words
from kizzasi.nas.pipelines.printing.topology import folded, latent_words
from kizzasi.nas.pipelines.reading import read
from kizzasi.nas.pipelines.writing import said

STACK = {field.name for field in dataclasses.fields(Stack)}
FROM = {"kv": "kv_from", "memory": "mem_from"}


@dataclass
class Line:
    """Modules and stages as they are written, layer after layer.

    Args:
        spec: the model.
        ctx_len: window of training.
        modules, stages: so far.
        ends: the stages by their last layers.
    """

    spec: ModelSpec
    ctx_len: int
    modules: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    ends: dict[int, str] = field(default_factory=dict)

    def write(self, worded: bool) -> None:
        """All layers, in words where they reach; or none in words."""
        layers = list(self.spec.blocks)
        read_by_others = {i + 1 for layer in layers for i in layer.sources.values()}
        ends = sorted({*read_by_others, len(layers)})
        i = 0
        while i < len(layers):
            end = next(j for j in ends if j > i)
            n = self._next(layers[i:end]) if worded else 0
            if not n:
                run = list(takewhile(lambda one: one == layers[i], layers[i:end]))  # noqa: B023
                self._stage(_custom(run))
                n = len(run)
            i += n
            self.ends[i - 1] = self.stages[-1]["name"]

    def forms(self, norm: str) -> Iterator[dict[str, Any]]:
        """Ways to put it into `arch`, whose norm this is: as one stack if it is one."""
        only = next(iter(self.modules.values()))
        alone = len(self.stages) == 1 and self.stages[0].keys() == {"name"}
        if alone and only["kind"] == "transformer" and only["norm"] == norm:
            yield {name: value for name, value in only.items() if name != "kind"}
        yield {"modules": self.modules, "pipeline": self.stages}

    def _next(self, layers: list[Any]) -> int:
        """Write as many of these layers as one stage can; how many they were."""
        first = layers[0]
        if first.sources:
            run = list(takewhile(lambda one: one == first, layers))
            ((what, source),) = first.sources.items()
            own = [replace(one, mixer=replace(one.mixer, **{f"{what}_from": None})) for one in run]
            words = None if source not in self.ends else self._words(own)
            if words is not None:
                self._stage(words, **{FROM[what]: [self.ends[source]]})
            return 0 if words is None else len(run)
        for n in range(len(layers), 0, -1):
            words = self._words(layers[:n])
            if words is not None:
                self._stage(words)
                return n
        if first.kind == "latent":
            return int(self._latent(first))
        if first.kind == "loop" and first == type(first)(first.body, first.n_loops):
            body = list(first.body)
            self._stage(self._words(body) or _custom(body), repeat=first.n_loops)
            return 1
        return 0

    def _latent(self, layer: Any) -> bool:
        """An encoder and a sampler beside the line, and what reads them in it; whether words do."""
        causal = [_causal(one) for one in layer.encoder]
        words = None if None in causal else self._words(causal)
        if words is None or encoder_of(causal, "", Findings()) != list(layer.encoder):
            return False
        mode = {"mode": "train_prefill"}
        encoder = self._stage(words, **mode)
        sampler = {"kind": "latent_sampler", "cond": latent_words(layer)}
        sampler = self._stage(sampler, inputs=[encoder], **mode)
        body = list(layer.body)
        self._stage(self._words(body) or _custom(body), kv_from=[sampler])
        return True

    def _stage(self, module: dict[str, Any], **more: Any) -> str:
        """A stage with this module, and its name; equal modules are written once."""
        i = len(self.stages)
        own = f"{'bits' if module['kind'] == 'latent_sampler' else 'layers'}_{i}"
        name = next((name for name, known in self.modules.items() if known == module), own)
        self.modules.setdefault(name, module)
        stage = own if name == own else f"stage_{i}"
        self.stages.append({"name": stage, **({} if stage == name else {"module": name}), **more})
        return stage

    def _words(self, layers: list[Any]) -> dict[str, Any] | None:
        """A module in words that compiles to these layers; None if there is none."""
        found = folded(layers)
        if found is None:
            return None
        blocks, around = found
        counted = {"kind": "transformer", "n_layers": len(blocks)}
        for words in block_words(blocks[0], self.spec.d_model):
            module = {**counted, **words, **around}
            if self._layers(module) == layers:
                return module
        return None

    def _layers(self, module: Mapping[str, Any]) -> list[LayerSpec] | None:
        """What a module compiles to; None if it does not fit."""
        findings = Findings()
        arch = {"d_model": self.spec.d_model, **{k: v for k, v in module.items() if k in STACK}}
        document = read({"arch": arch, "train": {"ctx_len": self.ctx_len}}, findings)
        if document is None or findings:
            return None
        frame = Frame("arch", document.arch, self.ctx_len)
        layers = layers_of(document.arch, frame, findings)
        return None if findings else layers


def _custom(layers: list[Any]) -> dict[str, Any]:
    return {"kind": "custom", "params": {"layers": [said(layer) for layer in layers]}}


def _causal(layer: Any) -> Any:
    """A layer of an encoder as it would stand in the line; None if it is none of attention."""
    mixer: Any = getattr(layer, "mixer", None)
    attends = isinstance(layer, BlockSpec) and mixer.kind == "attention"
    return replace(layer, mixer=replace(mixer, causal=True)) if attends else None
