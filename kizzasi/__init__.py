"""kizzasi: sequence models in PyTorch, with architecture search."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kizzasi import eml, models, nas, train
    from kizzasi.models import (
        BlockSpec,
        ModelSpec,
        SequenceModel,
        Signal,
        Tokens,
        build_model,
        load,
        mixers,
        presets,
    )

__version__ = "0.1.0"
__all__ = [
    "BlockSpec",
    "ModelSpec",
    "SequenceModel",
    "Signal",
    "Tokens",
    "build_model",
    "eml",
    "load",
    "mixers",
    "models",
    "nas",
    "presets",
    "train",
]
ROOMS = ("eml", "models", "nas", "train")


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when it is first asked for: `import kizzasi` costs nothing."""
    if name in ROOMS:
        return importlib.import_module(f"kizzasi.{name}")
    if name in __all__:
        return getattr(importlib.import_module("kizzasi.models"), name)
    raise AttributeError(f"module 'kizzasi' has no attribute {name!r}; it has {__all__}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
