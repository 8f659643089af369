"""What every parameter is, and so how an optimiser and an adapter treat it: one table for all.

| role | which | AdamW | Muon |
|---|---|---|---|
| matrix | weights of Linear layers, what a mixer lists as `matrices` | decays | made orthogonal |
| conv | filters of convolutions | decays | AdamW |
| embedding | tables, the way into a signal model | decays | AdamW |
| head | the way out | decays | AdamW |
| gain | scales of norms | no decay | AdamW |
| vector | biases, decays, mixes, routers, all else | decays if it has two dimensions | AdamW |

A mixer's own `param_rules` go before the table.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from kizzasi.errors import SpecError
from kizzasi.models.heads import Head
from kizzasi.models.mixer import Mixer, ParamRule
from kizzasi.models.norm import HeadNorm, Norm, original_name
from kizzasi.models.stems import Stem

Role = Literal["matrix", "conv", "embedding", "head", "gain", "vector"]
NORMS = (Norm, HeadNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class Treatment(NamedTuple):
    """rule: of the optimiser. rows: of the parts of a fused matrix, () if it is one. fan_in: the
    dimension that is summed over, None for what multiplies each channel by itself."""

    role: Role
    rule: ParamRule
    rows: tuple[int, ...] = ()
    fan_in: int | None = None


def parameter_groups(
    module: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    matrix_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Optimiser groups by the table above; the mixers anywhere in `module` keep their own rules.

    Args:
        module: any network.
        lr: base learning rate; a rule may scale or cap it.
        weight_decay: for the parameters that decay.
        optimizer: "muon" sets the matrices apart, with the rows of their parts, for
            `kizzasi.train.Muon`; "adamw" gives groups for any torch optimiser.
        matrix_lr: of the matrices under Muon; None means lr.

    Returns:
        Groups with every parameter once.
    """
    if optimizer not in ("adamw", "muon"):
        raise SpecError(f"optimizer: {optimizer!r} unknown; choose adamw or muon")
    if matrix_lr is not None and optimizer != "muon":
        raise SpecError("matrix_lr: only Muon treats matrices apart; set optimizer='muon'")
    groups: dict[tuple[ParamRule, tuple[int, ...] | None], list[nn.Parameter]] = {}
    parameters = dict(module.named_parameters())
    for name, (role, rule, rows, _) in treatments(module).items():
        apart = rows if optimizer == "muon" and role == "matrix" else None
        groups.setdefault((rule, apart), []).append(parameters[name])
    made = []
    for (rule, rows), members in groups.items():
        base = lr if rows is None or matrix_lr is None else matrix_lr
        group = {
            "params": members,
            "lr": min(base * rule.lr_scale, rule.lr_max),
            "weight_decay": weight_decay if rule.decay else 0.0,
        }
        made.append(group if rows is None else {**group, "rows": rows})
    return made


def parameter_roles(module: nn.Module) -> dict[str, Role]:
    """What every parameter is, by its name in `module`; see the table above."""
    return {name: treatment.role for name, treatment in treatments(module).items()}


def lora_targets(module: nn.Module) -> tuple[list[str], float]:
    """The Linear layers whose weights are matrices, and the share of all parameters in them.

    Returns:
        Names for `target_modules` of PEFT's `LoraConfig`, and the share in [0, 1].
    """
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    roles, total = parameter_roles(module), sum(p.numel() for p in module.parameters())
    names = [name for name in layers if roles.get(f"{name}.weight") == "matrix"]
    return names, sum(layers[name].weight.numel() for name in names) / max(1, total)


def treatments(module: nn.Module) -> dict[str, Treatment]:
    """Every parameter once, under the first of its names, in the order of `named_parameters`."""
    found: dict[int, Treatment] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            role = _role(part, name)
            decays = parameter.ndim >= 2 and role != "gain"
            fan_in = -1 if role == "matrix" else None
            plain = Treatment(role, ParamRule(decay=decays), fan_in=fan_in)
            found.setdefault(id(parameter), plain)
    for part in module.modules():  # those of outer modules first: inner ones have the last word
        if isinstance(part, (Stem, Head)):
            for name, parameter in part.named_parameters():
                role = part.roles.get(name)
                if role is not None:
                    found[id(parameter)] = found[id(parameter)]._replace(role=role)
        if isinstance(part, Mixer):
            fused = part.fused()
            for name, parameter in part.named_parameters():
                plain, name = found[id(parameter)], original_name(name)
                if name in part.matrices:
                    plain = plain._replace(role="matrix", fan_in=-1)
                found[id(parameter)] = plain._replace(
                    rule=part.param_rules.get(name, plain.rule),
                    rows=fused.get(name, plain.rows),
                    fan_in=part.fan_in.get(name, plain.fan_in),
                )
    return {name: found[id(parameter)] for name, parameter in module.named_parameters()}


def _role(owner: nn.Module, name: str) -> Role:
    """Of a parameter that a module owns itself."""
    if isinstance(owner, NORMS):
        return "gain" if name == "weight" else "vector"
    if name != "weight":
        return "vector"
    if isinstance(owner, nn.Linear):
        return "matrix"
    if isinstance(owner, _ConvNd):
        return "conv"
    return "embedding" if isinstance(owner, nn.Embedding) else "vector"
