"""From a `Document` to a `ModelSpec` and the settings of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.pipelines.compiling.channels import NORMS
from kizzasi.nas.pipelines.compiling.stack import Frame, layers_of
from kizzasi.nas.pipelines.compiling.stages import Line
from kizzasi.nas.pipelines.compiling.training import check_budgets, recipe_of
from kizzasi.nas.pipelines.document import Document
from kizzasi.nas.pipelines.misfits import Findings
from kizzasi.nas.pipelines.parts import Mixer
from kizzasi.strict import field_types, unknown_name

BYTES = 256


@dataclass(frozen=True)
class Compiled:
    """What a document stands for.

    Args:
        spec: the model.
        recipe: fields of a `Recipe` that the document sets, and `steps` if it says how many.
    """

    spec: ModelSpec
    recipe: dict[str, Any] = field(default_factory=dict)


def compiled(document: Document, findings: Findings) -> Compiled | None:
    """The model of a document; what does not fit is found, and taken as its remedy says. None if
    no model could be made."""
    arch, train = document.arch, document.train
    if arch.d_model is None:
        findings.add("arch.d_model", "it is needed", "give the width of the stream")
        return None
    if arch.norm is None:
        findings.set("arch.norm", "it is needed, for the last norm at least", "RMSNorm")
    vocab_size = train.vocab_size or BYTES
    recipe = recipe_of(train, findings)
    if arch.pipeline:
        line = Line(arch, train.ctx_len, vocab_size, findings)
        for i, stage in enumerate(arch.pipeline):
            line.take(stage, i)
        line.tokens(train.ctx_len * recipe.get("batch_size", 1))
        line.unread()
        layers = line.layers if line.whole else None
        if line.whole and not layers:
            findings.add("arch.pipeline", "it has no layers", "give a transformer module a stage")
            return None
    else:
        for name in arch.modules:
            findings.drop(f"arch.modules.{name}", "there is no pipeline")
        layers = layers_of(arch, Frame("arch", arch, train.ctx_len), findings)
    if layers is None:
        return None
    spec = _model(document, layers, vocab_size, findings)
    if spec is None:
        return None
    check_budgets(spec, train, document.budget, findings)
    return Compiled(spec, recipe)


def _model(
    document: Document, layers: list[Any], vocab_size: int, findings: Findings
) -> ModelSpec | None:
    arch = document.arch
    own = dict(arch.model)
    said_elsewhere = ("d_model", "blocks")
    for name in list(own):
        if name in said_elsewhere or name not in field_types(ModelSpec):
            known = field_types(ModelSpec).keys() - {*said_elsewhere}
            findings.drop(f"arch.model.{name}", unknown_name(name, known), "")
            del own[name]
    stem = {"kind": "tokens", "vocab_size": vocab_size}
    if _learned(document):
        stem["max_positions"] = document.train.ctx_len
    data = {
        "d_model": arch.d_model,
        "stem": stem,
        "norm": NORMS[arch.norm or "RMSNorm"],
        **own,
        "blocks": [layer.to_dict() for layer in layers],
    }
    try:
        spec = ModelSpec.from_dict(data)
        spec.check()
    except SpecError as error:
        path, _, rule = str(error).partition(": ")
        findings.add(f"arch ({path})", rule, "")
        return None
    return spec


def _learned(document: Document) -> bool:
    """Whether positions have embeddings of their own."""
    stacks = [document.arch, *document.arch.modules.values()]
    units = [stack.mix_unit for stack in stacks if stack.mix_unit is not None]
    mixers = [mixer for unit in units for mixer in (unit.mixer, *unit.choices)]
    named = {mixer.pos for mixer in mixers if isinstance(mixer, Mixer)}
    return "learned" in {*named, *(stack.pos.kind for stack in stacks if stack.pos is not None)}
