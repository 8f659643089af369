"""How the optimiser treats each parameter, of a model or of anyone's network with mixers in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from kizzasi.models.mixer import NO_DECAY, Mixer, ParamRule
from kizzasi.models.norm import original_name


def parameter_groups(
    module: nn.Module, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimiser groups: each mixer's own rules, and no decay on vectors (norms, biases).

    Args:
        module: any network; the mixers anywhere in it keep their rules.
        lr: base learning rate; a rule may scale or cap it.
        weight_decay: for the parameters that decay.

    Returns:
        Groups for any torch optimiser, every parameter once.
    """
    rules: dict[int, ParamRule] = {}
    for part in module.modules():
        if isinstance(part, Mixer):
            for name, parameter in part.named_parameters():
                rule = part.param_rules.get(original_name(name))
                if rule is not None:
                    rules[id(parameter)] = rule
    groups: dict[ParamRule, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        plain = ParamRule() if parameter.ndim >= 2 else NO_DECAY
        groups.setdefault(rules.get(id(parameter), plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": min(lr * rule.lr_scale, rule.lr_max),
            "weight_decay": weight_decay if rule.decay else 0.0,
        }
        for rule, parameters in groups.items()
    ]
