"""transformers as a peer: the one place that knows what its versions call a cache.

Before 5.24 a cache is `cache_params` in the Mamba families and `past_key_values` elsewhere, in
arguments and in outputs; from 5.24 on it is `cache` everywhere, and the old names only warn or are
ignored. Tests and benchmarks hand caches over through `cached`, `decode` and `cache_argument`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

KEEPS_ITS_OWN = ("recurrent_gemma",)  # the state in its modules, the rest in a cache it is given
OLDEST, NEWEST = (5, 23), (5, 24)  # of transformers: the versions that these tests were run with


@functools.cache
def version() -> tuple[int, int]:
    text = importlib.metadata.version("transformers")
    return tuple(map(int, re.findall(r"\d+", text)[:2]))  # pyright: ignore[reportReturnType]


def complaint() -> str | None:
    """A sentence if the installed transformers is not one that these tests were run with."""
    try:
        found = version()
    except importlib.metadata.PackageNotFoundError:
        return None
    if OLDEST <= found <= NEWEST:
        return None
    known = " to ".join(".".join(map(str, v)) for v in (OLDEST, NEWEST))
    age = "newer" if found > NEWEST else "older"
    return (
        f"transformers {'.'.join(map(str, found))} is {age} than the versions that the parity "
        f"tests know ({known}): a failure in them may be the peer's; see tests/peers.py"
    )


def cache_argument(peer: nn.Module) -> str:
    """The name under which a model or layer of transformers takes its cache."""
    names = inspect.signature(inspect.unwrap(type(peer).forward)).parameters
    known = ("cache",) if version() >= (5, 24) else ("cache_params", "past_key_values")
    for name in known:
        if name in names:
            return name
    raise AssertionError(
        f"{type(peer).__name__} takes no cache by the names {known}. {complaint() or ''}"
    )


def cached(peer: nn.Module, ids: Tensor, cache: object = None, **more: object):
    """Run a model from a cache (None: an empty one). Returns logits (b, t, v) and the cache."""
    name = cache_argument(peer)
    config: Any = peer.config
    if cache is None and config.model_type in KEEPS_ITS_OWN:
        from transformers import DynamicCache

        cache = DynamicCache(config=config)
    given = {} if cache is None else {name: cache}
    out = peer(ids, use_cache=True, **given, **more)
    return out.logits, getattr(out, name, cache)


def decode(peer: nn.Module, ids: Tensor, prefix: int) -> Tensor:
    """A model's logits (b, t, v): `prefix` tokens at once, then token by token from its cache."""
    places = "position_ids" in inspect.signature(inspect.unwrap(type(peer).forward)).parameters
    logits, cache = cached(peer, ids[:, :prefix])
    rows = [logits]
    for t in range(prefix, ids.shape[1]):
        place = {"position_ids": torch.tensor([[t]])} if places else {}
        logits, cache = cached(peer, ids[:, t : t + 1], cache, **place)
        rows.append(logits)
    return torch.cat(rows, dim=1)
