"""muP: learning rates found on a narrow model hold for a wide one of the same layout.

Let r be the ratio of a dimension of a parameter to the same dimension in the narrow model.

| parameter | AdamW's rate | Muon's rate |
|---|---|---|
| matrices, and what else sums over channels | lr / r_in | matrix_lr sqrt(r_out / (r_in r_long)) |
| embeddings, norms, biases, filters, decays | lr | |
| the stem's head, its logits times 1 / r of d_model | lr | |

with r_in and r_out of its fan-in and fan-out, and r_long of the longer of the two, which Muon's own
scale grows with. What decay takes from a parameter in a step stays what it was. Initial values
already shrink with the fan-in.

Widen a model by its number of heads, at one head_dim: scores divide by sqrt(head_dim), not by
head_dim.

Source: Yang et al. 2022, arXiv:2203.03466, table 8; Muon: the spectral condition of Yang et al.
2023, arXiv:2310.17813, section 3.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, Literal

from torch import nn

from kizzasi.errors import SpecError
from kizzasi.models.build import build_model
from kizzasi.models.groups import Treatment, parameter_groups, treatments
from kizzasi.models.model import SequenceModel
from kizzasi.models.spec import ModelSpec
from kizzasi.strict import require


def mup_spec(spec: ModelSpec, base: ModelSpec) -> ModelSpec:
    """The spec of a wide model with its logits scaled as muP asks.

    Args:
        spec: the wide model, with the logit scale that it would have by itself.
        base: the narrow model that rates are found on.
    """
    return spec.replace(logit_scale=spec.logit_scale * base.d_model / spec.d_model)


def mup_groups(
    model: SequenceModel,
    base: ModelSpec,
    lr: float,
    weight_decay: float = 0.0,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    matrix_lr: float | None = None,
) -> list[dict[str, Any]]:
    """`parameter_groups` of a wide model, at the rates that were best for a narrow one.

    Args:
        model: of `mup_spec(spec, base)`.
        base: the narrow model; as many layers of the same kinds, so that parameters have the same
            names.
        lr, weight_decay, optimizer, matrix_lr: as for `parameter_groups`, for the narrow model.

    Raises:
        SpecError: the models are of different layouts, or the logits are not scaled.
    """
    wanted = base.logit_scale * base.d_model / model.spec.d_model
    rule = f"{model.spec.logit_scale} is not the base's over the ratio of widths, {wanted}"
    require(
        abs(model.spec.logit_scale - wanted) <= 1e-9 * abs(wanted),
        "logit_scale",
        f"{rule}; build the model of mup_spec(spec, base)",
    )
    narrow = dict(build_model(base, device="meta").named_parameters())
    wide = dict(model.named_parameters())
    if narrow.keys() != wide.keys():
        name = min(narrow.keys() ^ wide.keys())
        raise SpecError(f"base: {name} is in one model only; give a narrower one of equal layers")
    rates = {}
    for name, treatment in treatments(model).items():
        muon = optimizer == "muon" and treatment.role == "matrix"
        own = name.startswith("stem.")  # the head's part is played by the logit scale
        rates[id(wide[name])] = 1.0 if own else _rate(treatment, wide[name], narrow[name], muon)
    groups = parameter_groups(model, lr, weight_decay, optimizer=optimizer, matrix_lr=matrix_lr)
    return [part for group in groups for part in _split(group, rates)]


def _rate(treatment: Treatment, wide: nn.Parameter, narrow: nn.Parameter, muon: bool) -> float:
    """Factor of a parameter's rate."""
    fan_in = treatment.fan_in
    if fan_in is None:
        return 1.0
    r_in = wide.shape[fan_in] / narrow.shape[fan_in]
    if not muon:
        return 1 / r_in
    r_out = wide.shape[-3 - fan_in] / narrow.shape[-3 - fan_in]
    longer = max(wide.shape[-2:]) / max(narrow.shape[-2:])
    return sqrt(r_out / r_in / longer)


def _split(group: dict[str, Any], rates: dict[int, float]) -> list[dict[str, Any]]:
    """The group's parameters by their rates."""
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(rates[id(parameter)], []).append(parameter)
    return [
        {
            **group,
            "params": members,
            "lr": group["lr"] * rate,
            "weight_decay": group["weight_decay"] / rate,
        }
        for rate, members in parts.items()
    ]
