"""From a `ModelSpec` to the document that spells it.

Layers are written in EvoForge's words where these make the very same layers, as many of them as can
be in one stack; layers that no words reach, as a ModelSpec writes them. Every stack is compiled
before it is used, and so is the document before it is handed out: what is printed is the spec, or
an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kizzasi.models import ModelSpec, Tokens
from kizzasi.nas.pipelines.pipeline import Pipeline, examined
from kizzasi.nas.pipelines.printing.line import Line
from kizzasi.nas.pipelines.printing.parts import NAMES
from kizzasi.nas.pipelines.writing import said
from kizzasi.strict import require

OF_THE_STREAM = ("d_model", "blocks", "norm", "stem")


def to_pipeline(spec: ModelSpec, train: Mapping[str, Any] | None = None) -> Pipeline:
    """The pipeline that compiles to this very spec.

    Args:
        spec: valid, with a stem of tokens.
        train: the document's `train`, ctx_len above all; 256 tokens if there is none.

    Raises:
        SpecError: the stem is none of tokens, which a pipeline has no words for.
    """
    spec.check()
    stem = spec.stem
    rule = f"{stem.kind!r}: a pipeline reads tokens; write the spec itself (to_file)"
    require(isinstance(stem, Tokens), "stem", rule)
    assert isinstance(stem, Tokens)
    told = {**(train or {"ctx_len": 256}), "vocab_size": stem.vocab_size}
    arch = {"d_model": spec.d_model, "norm": NAMES[spec.norm], **_of_the_model(spec, stem)}
    for worded in (True, False):
        line = Line(spec, told["ctx_len"])
        line.write(worded)
        for stacks in line.forms(arch["norm"]):
            found, wrong = examined({"arch": {**arch, **stacks}, "train": told})
            if found is not None and not wrong and found.spec == spec:
                return found
    raise AssertionError("a printed pipeline compiles to its spec")


def _of_the_model(spec: ModelSpec, stem: Tokens) -> dict[str, Any]:
    """Fields of the spec that only `arch.model` can say."""
    own = {name: value for name, value in said(spec).items() if name not in OF_THE_STREAM}
    if stem.max_positions is not None:
        own["stem"] = stem.to_dict()
    return {"model": own} if own else {}
