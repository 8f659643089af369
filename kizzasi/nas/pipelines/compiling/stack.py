"""A stack of layers: of the whole model, or of one module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kizzasi.models import BlockSpec
from kizzasi.nas.pipelines.compiling.channels import channel_of, norm_of, residual_of
from kizzasi.nas.pipelines.compiling.mixers import mixer_of
from kizzasi.nas.pipelines.compiling.place import Place
from kizzasi.nas.pipelines.compiling.topology import arranged
from kizzasi.nas.pipelines.document import Stack
from kizzasi.nas.pipelines.misfits import Findings
from kizzasi.strict import join

INHERITED = ("d_model", "norm", "pos", "kv_policy", "residual")


@dataclass(frozen=True)
class Frame:
    """Where a stack stands.

    Args:
        path: of the stack.
        model: the whole model's stack, whose path is `arch`; it gives what a module leaves out.
        ctx_len: window of training.
    """

    path: str
    model: Stack
    ctx_len: int

    def of(self, stack: Stack, name: str) -> tuple[Any, str]:
        """A field of the stack, or the model's, with the path where it is written."""
        own = getattr(stack, name)
        if own is not None or self.path == "arch" or name not in INHERITED:
            return own, join(self.path, name)
        return getattr(self.model, name), f"arch.{name}"


def layers_of(stack: Stack, frame: Frame, findings: Findings) -> list[Any] | None:
    """The layers of a stack; None if something is missing that only its author knows."""
    block = block_of(stack, frame, findings)
    n, path = stack.n_layers, frame.path
    if n is None:
        n = findings.set(f"{path}.n_layers", "it is needed", 1)
    if block is None:
        return None
    d_model = frame.model.d_model or stack.d_model
    assert d_model is not None, "a block has a width"
    return arranged([block] * n, stack, d_model, path, findings)


def block_of(stack: Stack, frame: Frame, findings: Findings) -> BlockSpec | None:
    """The layer that a stack repeats."""
    path = frame.path
    d_model, where = frame.of(stack, "d_model")
    whole = frame.model.d_model
    if d_model is None:
        findings.add(where, "it is needed", "give the width of the stream")
        return None
    if d_model != whole and whole is not None:
        rule = f"{d_model}, but the stream is {whole} wide in all modules"
        d_model = findings.set(where, rule, whole)
    pos, pos_path = frame.of(stack, "pos")
    kv, kv_path = frame.of(stack, "kv_policy")
    residual, residual_path = frame.of(stack, "residual")
    norm = norm_of(*frame.of(stack, "norm"), findings)
    if stack.mix_unit is None:
        findings.add(f"{path}.mix_unit", "it is needed", "give a mixer")
        return None
    inherited = kv_path != f"{path}.kv_policy"
    place = Place(f"{path}.mix_unit", d_model, frame.ctx_len, pos, pos_path, kv, kv_path, inherited)
    mixer = mixer_of(stack.mix_unit, place, findings)
    channel = None
    if stack.ffn is not None:
        channel = channel_of(stack.ffn, d_model, f"{path}.ffn", findings)
    if mixer is None:
        return None
    more = residual_of(residual, residual_path, findings)
    return BlockSpec(mixer=mixer, channel=channel, norm=norm, **more)
