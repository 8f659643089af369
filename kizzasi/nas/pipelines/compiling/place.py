"""What mixers are compiled from beside themselves, and what several of them ask.

Glossary
    place   where a unit stands: its path, the width, and what its stack says about positions and
            caches, each with the path where that is written
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kizzasi.nas.pipelines.misfits import Findings
from kizzasi.nas.pipelines.parts import KVPolicy, Mixer, Pos

DEFAULT_HEAD = 64


@dataclass(frozen=True)
class Place:
    """See the glossary.

    Args:
        path: of the mix unit.
        d_model: width.
        ctx_len: window of training.
        pos, pos_path, kv, kv_path: of the stack.
        kv_inherited: a module has it from the model, and may have no use for it.
        reach: positions that the unit's attention sees at most.
    """

    path: str
    d_model: int
    ctx_len: int
    pos: Pos | None = None
    pos_path: str = ""
    kv: KVPolicy | None = None
    kv_path: str = ""
    kv_inherited: bool = False
    reach: float = math.inf


def heads_of(m: Mixer, d_model: int, even: int, path: str, findings: Findings) -> int:
    """Heads that divide the width, into `even` entries or a multiple of them."""
    if m.heads is None:
        near = nearest_divisor(d_model // even, max(1, d_model // DEFAULT_HEAD))
        return findings.set(f"{path}.heads", f"{m.kind} needs heads", near)
    if m.head_dim is not None and m.kind == "Attention":
        return m.heads
    if d_model % (m.heads * even):
        width = "a whole, even width" if even == 2 else "a whole width"
        rule = f"{m.heads} heads of d_model {d_model} have not {width}"
        near = nearest_divisor(d_model // even, m.heads) if d_model % even == 0 else 1
        return findings.set(f"{path}.heads", rule, near)
    return m.heads


def nearest_divisor(n: int, wanted: int) -> int:
    divisors = [k for k in range(1, n + 1) if n % k == 0]
    return min(divisors, key=lambda k: (abs(k - wanted), k))


def only(value: Any, names: tuple[str, ...], who: str, path: str, findings: Findings) -> None:
    """Find the fields that are given beside those of `names` and the kind."""
    for name in type(value).__dataclass_fields__:
        if name not in ("kind", "type", *names) and getattr(value, name) is not None:
            findings.drop(f"{path}.{name}", f"{who} does not read it")
