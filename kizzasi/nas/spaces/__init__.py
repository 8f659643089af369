"""Spaces of architectures, and the constraints that their candidates keep."""

from kizzasi.nas.spaces.constraints import Constraints, Feasible
from kizzasi.nas.spaces.families import ArchCandidate, ArchSearchSpace
from kizzasi.nas.spaces.model_space import Candidate, ModelSpace
from kizzasi.nas.spaces.ready_made import (
    SMALL_SPACE,
    hybrid,
    mamba_rwkv,
    moe,
    read_space,
    tiny,
)
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.spaces.template.parse import choice, pattern, repeat

__all__ = [
    "SMALL_SPACE",
    "ArchCandidate",
    "ArchSearchSpace",
    "Candidate",
    "Constraints",
    "Feasible",
    "ModelSpace",
    "Space",
    "Xorshift64",
    "choice",
    "hybrid",
    "mamba_rwkv",
    "moe",
    "pattern",
    "read_space",
    "repeat",
    "tiny",
]
