"""State dicts of SwiGLU experts in the layouts of published checkpoints, read and written strictly.

    list     experts.3.{gate,up,down}_proj.weight: (h, d), (h, d), (d, h). Qwen3-MoE and OLMoE on
             disk, and version 0.1 of this library.
    packed   experts.gate_up_proj (e, 2h, d), gate first; experts.down_proj (e, d, h). Ours, and
             that of transformers 5 in memory.
    mixtral  experts.3.{w1,w3,w2}.weight: gate, up, down as in a list. Mixtral on disk.

Symbols: e experts, d d_model, h hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Literal

import torch
from torch import Tensor

from kizzasi.errors import CheckpointError
from kizzasi.models.channels.moe import PARTS
from kizzasi.models.checkpoints.names import SAME, Form, Link

Layout = Literal["list", "packed", "mixtral"]
MIXTRAL = dict(zip(PARTS, ("w1", "w3", "w2"), strict=True))


def _read_pairs(theirs: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
    gates, ups = theirs[: len(theirs) // 2], theirs[len(theirs) // 2 :]
    return [torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)]


def _write_pairs(ours: list[Tensor]) -> list[Tensor]:
    gates, ups = ours[0].chunk(2, dim=1)
    return [*gates.unbind(), *ups.unbind()]


PAIRS = Form(_write_pairs, _read_pairs)  # (e, 2h, d) as e gates, then e ups
EACH = Form(lambda ours: list(ours[0].unbind()), lambda theirs, shapes: [torch.stack(theirs)])
OWN = {"gate_up_proj": (PARTS[:2], PAIRS), "down_proj": (PARTS[2:], EACH)}
EXPERT = re.compile(r"experts\.(?:(\d+)\.(\w+)\.weight|(gate_up_proj|down_proj))")


def native_links(ours: Mapping[str, Tensor], given: Set[str]) -> list[Link]:
    """Every tensor of ours as our own files hold it: packed, or as version 0.1 wrote it."""
    links: list[Link] = []
    for name, tensor in ours.items():
        prefix, _, last = name.rpartition(".")
        parts, form = OWN.get(last, ((), SAME))
        theirs = [f"{prefix}.{i}.{part}.weight" for part in parts for i in range(len(tensor))]
        older = name not in given and not given.isdisjoint(theirs)
        links.append(Link([name], theirs if older else [name], form if older else SAME))
    return links


def convert_experts(state: Mapping[str, Tensor], n_experts: int, to: Layout) -> dict[str, Tensor]:
    """Rewrite the experts of one layer; the source layout is read off the names.

    Args:
        state: tensors of one mixture layer; names that do not start with "experts." pass.
        n_experts: how many there must be.
        to: the layout wanted.

    Returns:
        A new state dict. Converting back gives equal tensors.

    Raises:
        CheckpointError: an unknown name, a missing or surplus expert, shapes that do not fit, or
            two layouts at once.
    """
    weights = _read(state, n_experts)
    others = {name: t for name, t in state.items() if not name.startswith("experts.")}
    if to == "packed":
        gate, up, down = (torch.stack(weights[part]) for part in PARTS)
        packed = {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}
        return others | {f"experts.{name}": tensor for name, tensor in packed.items()}
    names = MIXTRAL if to == "mixtral" else {part: part for part in PARTS}
    return others | {
        f"experts.{i}.{names[part]}.weight": weights[part][i]
        for i in range(n_experts)
        for part in PARTS
    }


def _read(state: Mapping[str, Tensor], n_experts: int) -> dict[str, list[Tensor]]:
    """Every part as a list over experts, each tensor checked."""
    found: dict[tuple[str, int], Tensor] = {}
    layouts: set[str] = set()
    for name, tensor in state.items():
        if not name.startswith("experts."):
            continue
        match = EXPERT.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{name}: not a name of any known expert layout")
        index, part, packed = match.groups()
        if packed:
            layouts.add("packed")
            found |= _unpack(name, packed, tensor, n_experts)
        else:
            layouts.add("mixtral" if part in MIXTRAL.values() else "list")
            names = {theirs: ours for ours, theirs in MIXTRAL.items()}
            found[names.get(part, part), int(index)] = tensor
    if len(layouts) > 1:
        raise CheckpointError(f"experts: two layouts at once, {sorted(layouts)}")
    wanted = {(part, i) for part in PARTS for i in range(n_experts)}
    if wanted != found.keys():
        missing, surplus = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
        raise CheckpointError(f"experts: missing {missing[:3]}, unexpected {surplus[:3]}")
    weights = {part: [found[part, i] for i in range(n_experts)] for part in PARTS}
    _check_shapes(weights)
    return weights


def _unpack(name: str, part: str, tensor: Tensor, n_experts: int) -> dict[tuple[str, int], Tensor]:
    fits = tensor.ndim == 3 and len(tensor) == n_experts
    if not fits or (part == "gate_up_proj" and tensor.shape[1] % 2):
        wanted = f"({n_experts}, {'d, h' if part == 'down_proj' else '2h, d'})"
        raise CheckpointError(f"{name}: expected {wanted}, got {tuple(tensor.shape)}")
    if part == "down_proj":
        return {(part, i): one.contiguous() for i, one in enumerate(tensor.unbind(0))}
    halves = zip(PARTS[:2], tensor.chunk(2, dim=1), strict=True)
    return {(p, i): one.contiguous() for p, half in halves for i, one in enumerate(half.unbind(0))}


def _check_shapes(weights: Mapping[str, list[Tensor]]) -> None:
    for i, (gate, up, down) in enumerate(zip(*(weights[part] for part in PARTS), strict=True)):
        if gate.ndim != 2 or gate.shape != up.shape or gate.shape != down.mT.shape:
            shapes = [tuple(w.shape) for w in (gate, up, down)]
            raise CheckpointError(
                f"experts.{i}: gate, up and down are {shapes}, expected (h, d), (h, d), (d, h)"
            )
