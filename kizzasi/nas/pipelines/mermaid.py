"""A Mermaid sketch of any spec: layers from top to bottom, equal ones once, what stands inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

from kizzasi.models import BlockSpec, MixerSpec, ModelSpec
from kizzasi.nas.pipelines.writing import said

TOLD = (
    "n_heads", "n_kv_heads", "window", "block", "n_global", "kv_quant", "position", "d_state",
    "max_len", "top_k", "temperature", "n_experts", "hidden", "n_loops", "adapter", "factor",
    "capacity", "op", "at", "rank", "layer", "combine", "n_bits", "free_bits", "query",
)  # fields that a sketch has room for, where they are not as usual  # fmt: skip


def sketch(spec: ModelSpec) -> str:
    """The model as a Mermaid flowchart."""
    drawing = _Drawing()
    stem = drawing.node(f"{spec.stem.kind}<br/>d_model {spec.d_model}", "([{}])")
    last = drawing.stack(spec.blocks, stem)
    out = drawing.node(f"{spec.norm} norm<br/>head", "([{}])")
    drawing.lines.append(f"  {last} --> {out}")
    for reader, source, what in drawing.reads:
        drawing.lines.append(f"  {source} -. {what} .-> {reader}")
    return "\n".join(["flowchart TD", *drawing.lines])


class _Drawing:
    """Lines of a flowchart so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reads: list[tuple[str, str, str]] = []
        self.n = 0

    def node(self, text: str, form: str = "[{}]") -> str:
        name = f"n{self.n}"
        self.n += 1
        label = form.format(f'"{text}"')
        self.lines.append(f"  {name}{label}")
        return name

    def stack(self, layers: Sequence[Any], before: str) -> str:
        """Layers after a node; returns the last node."""
        places: list[str] = []
        for one, run in groupby(layers):
            n = len(list(run))
            inside = [(name, v) for name, v in one.inside() if isinstance(v, tuple)]
            times = f"{n} x " if n > 1 else ""
            if inside:
                before = self._nested(one, inside, times, before)
            else:
                now = self.node(times + "<br/>".join(_words(one)))
                self.lines.append(f"  {before} --> {now}")
                before = now
            self.reads += [(before, places[i], what) for what, i in one.sources.items()]
            places += [before] * n
        return before

    def _nested(self, one: Any, inside: list[tuple[str, Any]], times: str, before: str) -> str:
        name, self.n = f"s{self.n}", self.n + 1
        own = {f.name: getattr(one, f.name) for f in fields(one)}
        for field, _ in inside:
            own.pop(field)
        title = " ".join([one.kind, *_settings(said(one), own)])
        enter = self.node(f"{times}{title}", "{{{{{}}}}}")
        self.lines += [f"  {before} --> {enter}", f'  subgraph {name}[" "]']
        (_, body), *beside = inside
        told = [(self.stack(layers, enter), field) for field, layers in beside]
        n = len(self.lines)
        last = self.stack(body, enter)
        into = next(line for line in self.lines[n:] if line.startswith(f"  {enter} --> "))
        first = into.rpartition(" ")[2]
        self.lines += [f"  {end} -. {field} .-> {first}" for end, field in told]
        self.lines.append("  end")
        return last


def _words(one: Any) -> Iterator[str]:
    """A plain layer, a branch a line; of others the kind."""
    if not isinstance(one, BlockSpec):
        yield " ".join([one.kind, *_settings(said(one), said(one))])
        return
    yield _part(one.mixer)
    if one.channel is not None:
        yield _part(one.channel)


def _part(part: Any) -> str:
    data = said(part)
    text = " ".join([part.kind, *_settings(data, data)])
    inside = [getattr(part, f.name) for f in fields(part)]
    mixers = [one for value in inside if isinstance(value, tuple) for one in value]
    inner = [_part(one) for one in mixers if isinstance(one, MixerSpec)]
    return "<br/>- ".join([text, *inner])


def _settings(data: dict[str, Any], named: dict[str, Any]) -> Iterator[str]:
    for name in TOLD:
        if name in named and isinstance(data.get(name), (int, float, str)):
            yield f"{name} {data[name]}"
