"""States as values: a tree of NamedTuples whose leaves are tensors with the batch first.

A state is never written into, so holding on to one is a fork and going back to one is a roll-back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kizzasi.errors import CheckpointError, ShapeError, StateError
from kizzasi.models.ops.devices import eager
from kizzasi.models.ops.precision import LOW_PRECISION


def map_state(fn: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    """Apply fn leaf by leaf to one or more trees of the same shape."""
    if isinstance(tree, Tensor):
        return fn(tree, *others)
    if isinstance(tree, str):
        return tree
    parts = [map_state(fn, *branch) for branch in zip(tree, *others, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def named_leaves(tree: Any, name: str = "state") -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its path, for example "state.blocks.0.mixer.ssm"."""
    if isinstance(tree, Tensor):
        yield name, tree
        return
    if isinstance(tree, str):
        return
    for key, part in zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True):
        yield from named_leaves(part, f"{name}.{key}")


@runtime_checkable
class Cache(Protocol):
    """A part of a state that holds a slot per token, so that rows of unequal age differ in shape.

    Slots may stand in any order, and dead ones among them: what is joined need not be aligned.
    """

    def n_alive(self) -> int:
        """The live slots of the row that has most."""
        ...

    def packed(self, slots: int) -> Cache:
        """The same rows with so many slots, at least `n_alive()`, dead ones last."""
        ...


def join_states(states: Sequence[Any]) -> Any:
    """The rows of several states of one model as one batch, however many tokens each has seen.

    A row goes on exactly as it would have alone. `ModelState.gather` takes rows apart again.

    Args:
        states: at least one; all on one device.

    Raises:
        StateError: they are of different models.
    """
    first = states[0]
    if len(states) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if isinstance(first, str):
        if len({*states}) > 1:
            digests = " and ".join(sorted(digest[:12] for digest in {*states}))
            raise StateError(f"states: of models {digests}; join those of one model only")
        return first
    if isinstance(first, Cache):
        shapes = {tuple(leaf.shape[1:] for _, leaf in named_leaves(state)) for state in states}
        if len(shapes) > 1:
            slots = max(state.n_alive() for state in states)
            states = [state.packed(slots) for state in states]
        return type(first)(*(torch.cat(leaves) for leaves in zip(*states, strict=True)))
    parts = [join_states(branch) for branch in zip(*states, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def chosen(first: Tensor, a: Any, b: Any) -> Any:
    """Of two states of the same rows, those of `a` where first (b,) is True, else those of `b`.

    Equals taking them apart and `join_states`, but asks for no number, so that a graph can hold it.
    """
    if isinstance(a, Tensor):
        return torch.where(first.view(-1, *(1,) * (a.ndim - 1)), a, b)
    pair = a, b
    if isinstance(a, Cache):
        shapes = [[leaf.shape for _, leaf in named_leaves(state)] for state in pair]
        if shapes[0] != shapes[1]:
            slots = max(leaves[0][2] for leaves in shapes)  # of the keys, the first of any cache
            pair = a.packed(slots), b.packed(slots)
    parts = [chosen(first, *branch) for branch in zip(*pair, strict=True)]  # pyright: ignore
    return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)


class BlockState(NamedTuple):
    mixer: Any
    channel: Any


class ModelState(NamedTuple):
    """What a model remembers of the tokens so far.

    blocks    one state per layer: a BlockState of a plain block; others nest such.
    position  (b,) int64, place of each row's next token in its open document: 0 until a real token
              is seen, and never again after that.
    segment   (b,) int64, the last segment id seen; 0 if none was given.
    model     digest of the spec whose models take this state.
    """

    blocks: tuple[Any, ...]
    position: Tensor
    segment: Tensor
    model: str = ""

    def gather(self, rows: Tensor) -> ModelState:
        """Rows of the batch by index, repeated or reordered at will: beams, forks, selections."""
        return map_state(lambda leaf: leaf.index_select(0, rows), self)

    def detach(self) -> ModelState:
        """The same values without history: the cut of truncated back-propagation."""
        return map_state(Tensor.detach, self)

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState:
        """Move to a device, a dtype, or both: state.to("cuda"), state.to(torch.float64).

        Memories are never rounded below float32: bfloat16 and float16 stand for it here. Complex
        leaves take the precision of dtype; integers stay.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return map_state(lambda leaf: _moved(leaf, device, dtype), self)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for _, leaf in named_leaves(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, which `load_state` reads, and read it back before it gets its
        name. Raises CheckpointError."""
        from kizzasi.models.checkpoints.storage.files import write_safetensors

        leaves = {name: leaf.detach() for name, leaf in named_leaves(self)}
        write_safetensors(Path(path), leaves, {"model": self.model})


def _moved(leaf: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf.to(device)
    wide = torch.promote_types(dtype, torch.float32)
    if dtype in LOW_PRECISION and leaf.dtype in LOW_PRECISION:
        wide = leaf.dtype
    return leaf.to(device, wide.to_complex() if leaf.is_complex() else wide)


def load_state(path: str | os.PathLike[str], like: ModelState) -> ModelState:
    """Read a state that `ModelState.save` wrote.

    Args:
        path: the file.
        like: any state of the same model, for the structure (`model.init_state(1)`).

    Raises:
        CheckpointError: unreadable.
        StateError: of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model = (file.metadata() or {}).get("model", "")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read the state: {error}") from error
    refuse_foreign(model, like.model, str(path))
    wanted = dict(named_leaves(like))
    if wanted.keys() != leaves.keys():
        wrong = sorted(wanted.keys() ^ leaves.keys())
        raise StateError(f"{path}: a state of another model; names that differ: {wrong[:5]}")
    order = iter(wanted)
    return map_state(lambda _: leaves[next(order)], like)


def refuse_foreign(given: str, wanted: str, what: str) -> None:
    """Raise StateError if both digests are known and differ."""
    if given and wanted and given != wanted:
        raise StateError(
            f"{what}: a state of another model, of digest {given[:12]}; this one has "
            f"{wanted[:12]}: run the tokens through it, or load the other"
        )


def require_own(state: ModelState, model: str, batch: int, start: Callable[[], ModelState]) -> None:
    """Raise unless a state is one of a model, and has so many rows.

    Args:
        model: digest of the model.
        start: its state before any input, for the shapes.

    Raises:
        StateError: no state, or of another model.
        ShapeError: of another number of rows.
    """
    if not isinstance(state, ModelState):
        given = f"{state!r:.60} of type {type(state).__name__}"
        raise StateError(f"state: expected what a call returned as .state, got {given}")
    if state.model != model:
        refuse_foreign(state.model, model, "state")
        refuse_misshapen(state.blocks, start().blocks, model)
    if state.position.shape != (batch,):
        rows = state.position.shape[0]
        raise ShapeError(f"state: made for a batch of {rows}, the inputs have {batch} rows")


def refuse_misshapen(given: Any, wanted: Any, model: str, name: str = "state.blocks") -> None:
    """Raise StateError unless two states differ in rows, and in slots of a cache, alone.

    For states that do not say which model they are of: made by hand, or by an older release.
    """
    fits = type(given) is type(wanted)
    if isinstance(wanted, Tensor):
        fits = fits and given.shape[1:] == wanted.shape[1:]
    elif fits:
        fits = len(given) == len(wanted)
    if not fits:
        raise StateError(
            f"{name}: expected {_sketch(wanted)}, got {_sketch(given)}; it is of another model "
            f"than this one, of digest {model[:12]}"
        )
    if not isinstance(wanted, (Tensor, Cache)):
        keys = getattr(wanted, "_fields", range(len(wanted)))
        for key, one, other in zip(keys, given, wanted, strict=True):
            refuse_misshapen(one, other, model, f"{name}.{key}")


def _sketch(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"(b, {', '.join(map(str, part.shape[1:]))})"
    size = f" of {len(part)}" if isinstance(part, tuple) else ""
    return type(part).__name__ + size


def loadable(namespace: Mapping[str, object]) -> None:
    """Let `torch.load(..., weights_only=True)` make the NamedTuples of a namespace."""
    tuples = [
        v
        for v in namespace.values()
        if isinstance(v, type) and issubclass(v, tuple) and "_fields" in vars(v)
    ]
    torch.serialization.add_safe_globals(tuples)  # pyright: ignore[reportArgumentType]


loadable(globals())


def canonical_segments(
    shape: tuple[int, int],
    state: ModelState | None,
    segment_ids: Tensor | None,
    mask: Tensor | None,
) -> Tensor | None:
    """Turn the user's segment ids and padding mask into the form that mixers read.

    Returns:
        None if every token continues its row's state, else (b, t) int64: 0 continues, each change
        starts a document, -1 is padding. See `Mixer.forward`.

    Raises:
        ShapeError: wrong shapes, or padding after a real token: in this call, or, where rows cannot
            go by themselves (`through.by_length`), in an earlier one.
    """
    for name, given in (("segment_ids", segment_ids), ("mask", mask)):
        if given is not None and given.shape != shape:
            raise ShapeError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")
    if segment_ids is None and mask is None:
        return None
    segments = None
    if segment_ids is not None:
        if segment_ids.is_floating_point():
            raise ShapeError(f"segment_ids: expected integers, got {segment_ids.dtype}")
        first = segment_ids[:, :1]
        if state is not None:
            fresh = (state.position == 0)[:, None]
            first = torch.where(fresh, first, state.segment[:, None])
        change = segment_ids != torch.cat([first, segment_ids[:, :-1]], dim=1)
        segments = change.cumsum(1)
    if mask is not None:
        real = mask.bool()
        late = (~real[:, 1:] & real[:, :-1]).any(1)
        if state is not None:
            late = late | (~real[:, 0] & (state.position > 0))
        if torch.compiler.is_compiling():
            message = "mask: a row has padding after a real token; pad on the left"
            torch._assert_async(~late.any(), message)  # pyright: ignore[reportPrivateImportUsage]
        elif eager() and late.any():
            raise ShapeError(
                f"mask: row {int(late.nonzero()[0])} has padding after a real token; "
                "pad on the left, before the first token of a sequence"
            )
        if segments is None:
            segments = torch.zeros(shape, dtype=torch.int64, device=real.device)
        segments = segments.masked_fill(~real, -1)
    return segments
