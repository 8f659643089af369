"""Templates once read: how their holes are filled, how often, and in which ways.

See `kizzasi.nas.spaces.template.parse` for the templates, for genes and for their paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Protocol, TypeVar

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ChannelSpec, MixerSpec, ModelSpec
from kizzasi.strict import join

TRIES = 50  # draws before a part, and before a whole model, is given up
HERE = "@"  # stands for the path of a part
MOST_KEPT = 2**12  # parts and blocks of a kind that are kept once made
K = TypeVar("K")
T = TypeVar("T")

Decide = Callable[[str, int], int]  # (path of a hole, its number of options) -> an option's number


class MisfitError(SpecError):
    """Genes that are options of their holes and do not fit each other."""


@dataclass
class Walk:
    """One filling of a template: who decides, and what was decided."""

    decide: Decide
    again: Decide | None = None  # decides after a misfit; None: give up
    genes: dict[str, int] = field(default_factory=dict)
    d_model: int = 0
    exhaustive: bool = False  # one of all fillings: give up early where none can fit

    def pick(self, path: str, n: int) -> int:
        if n == 1:
            return 0
        gene = self.decide(path, n)
        self.genes[path] = gene
        return gene

    def since(self, n: int) -> tuple[int, ...]:
        """The options taken behind the first n: all that what was filled there depends on."""
        return tuple(islice(self.genes.values(), n, None))


class Node(Protocol):
    """A parsed template."""

    def fill(self, path: str, walk: Walk) -> Any:
        """What stands there without holes: plain data, or the spec of a part, block or model."""
        ...

    def count(self, d_model: int) -> int:
        """How many ways there are to fill it that fit this width."""
        ...


@dataclass
class Leaf:
    """A value without holes."""

    value: Any

    def fill(self, path: str, walk: Walk) -> Any:
        return self.value

    def count(self, d_model: int) -> int:
        return 1


@dataclass
class Record:
    """A mapping."""

    nodes: dict[str, Node]

    def fill(self, path: str, walk: Walk) -> dict[str, Any]:
        return {key: node.fill(join(path, key), walk) for key, node in self.nodes.items()}

    def count(self, d_model: int) -> int:
        return math.prod(node.count(d_model) for node in self.nodes.values())


@dataclass
class Block:
    """A `BlockSpec` of parts."""

    parts: Record
    made: dict[tuple[int, ...], BlockSpec] = field(default_factory=dict)  # by their genes
    read: dict[tuple[int, BlockSpec], list[dict[str, int]]] = field(default_factory=dict)

    def fill(self, path: str, walk: Walk) -> BlockSpec:
        before = len(walk.genes)
        parts = self.parts.fill(path, walk)
        return kept(self.made, walk.since(before), lambda: BlockSpec(**parts))

    def ways(self, block: BlockSpec, path: str, d_model: int) -> list[dict[str, int]]:
        """All genes with which this is `block` at this width."""
        found = kept(self.read, (d_model, block), lambda: self._ways(block, d_model))
        return [{path + where: gene for where, gene in genes.items()} for genes in found]

    def _ways(self, block: BlockSpec, d_model: int) -> list[dict[str, int]]:
        parts = self.parts.nodes
        if BlockSpec(**{key: getattr(block, key) for key in parts}) != block:
            return []  # what the template leaves out has its default
        ways: list[dict[str, int]] = [{}]
        for key, part in parts.items():
            wanted, where = getattr(block, key), f".{key}"
            if isinstance(part, Part):
                fitting = part.ways(wanted, where, d_model)
            else:
                fitting = [g for value, g in assignments(part, where, d_model) if value == wanted]
            ways = [{**way, **genes} for way in ways for genes in fitting]
        return ways

    def count(self, d_model: int) -> int:
        return self.parts.count(d_model)


@dataclass
class List:
    """A list; lists inside it are spliced."""

    nodes: list[Node]

    def fill(self, path: str, walk: Walk) -> list[Any]:
        if walk.exhaustive and not self.count(walk.d_model):
            raise MisfitError(f"{path}: no filling fits d_model {walk.d_model}")
        return _spliced(node.fill(f"{path}[{i}]", walk) for i, node in enumerate(self.nodes))

    def count(self, d_model: int) -> int:
        return math.prod(node.count(d_model) for node in self.nodes)


@dataclass
class Choice:
    """One of several."""

    nodes: list[Node]

    def fill(self, path: str, walk: Walk) -> Any:
        gene = walk.pick(path, len(self.nodes))
        return self.nodes[gene].fill(f"{path}:{gene}", walk)

    def count(self, d_model: int) -> int:
        return sum(node.count(d_model) for node in self.nodes)


@dataclass
class Repeat:
    """A list of low to high copies, each filled on its own."""

    node: Node
    low: int
    high: int

    def fill(self, path: str, walk: Walk) -> list[Any]:
        n = self.low + walk.pick(path, self.high - self.low + 1)
        return _spliced(self.node.fill(f"{path}[{i}]", walk) for i in range(n))

    def count(self, d_model: int) -> int:
        ways = self.node.count(d_model)
        return sum(ways**n for n in range(self.low, self.high + 1))


@dataclass
class Pattern:
    """Blocks by letters; equal letters are equal blocks."""

    texts: list[str]  # distinct, tiled over the depth
    letters: dict[str, Node]

    def fill(self, path: str, walk: Walk) -> list[Any]:
        text = self.texts[walk.pick(path, len(self.texts))]
        blocks = {c: self.letters[c].fill(f"{path}.{c}", walk) for c in dict.fromkeys(text)}
        return _spliced(blocks[letter] for letter in text)

    def count(self, d_model: int) -> int:
        ways = {letter: node.count(d_model) for letter, node in self.letters.items()}
        return sum(math.prod(ways[letter] for letter in set(text)) for text in self.texts)


class Part:
    """A mixer or a channel: it fits the width, or not, on its own."""

    def __init__(self, family: type[MixerSpec] | type[ChannelSpec], node: Node) -> None:
        self.family, self.node = family, node
        self._counts: dict[int, int] = {}
        self._made: dict[tuple[int, ...], Any] = {}
        self._ways: dict[int, dict[Any, list[dict[str, int]]]] = {}

    def fill(self, path: str, walk: Walk) -> Any:
        decide, before = walk.decide, len(walk.genes)
        try:
            for attempt in range(TRIES):
                value = self.node.fill(path, walk)
                if value is None:
                    return None
                make = partial(self._checked, value, path, walk.d_model)
                try:
                    return kept(self._made, (walk.d_model, *walk.since(before)), make)
                except SpecError as error:
                    if walk.again is None or attempt == TRIES - 1:
                        raise MisfitError(str(error)) from error
                walk.decide = walk.again
                while len(walk.genes) > before:
                    walk.genes.popitem()
        finally:
            walk.decide = decide

    def _checked(self, value: Any, path: str, d_model: int) -> Any:
        part = self.family.from_dict(value, path)
        part.check(d_model, path)
        return part

    def ways(self, value: Any, path: str, d_model: int) -> list[dict[str, int]]:
        """All genes with which this part is `value` at this width."""
        if d_model not in self._ways:
            table = self._ways[d_model] = {}
            for filled, genes in every(lambda decide: self._filled(decide, d_model)):
                table.setdefault(filled, []).append(genes)
        found = self._ways[d_model].get(value, [])
        return [{path + where: gene for where, gene in genes.items()} for genes in found]

    def _filled(self, decide: Decide, d_model: int) -> tuple[Any, dict[str, int]]:
        walk = Walk(decide, d_model=d_model)
        value = self.fill(HERE, walk)
        return value, {where.removeprefix(HERE): gene for where, gene in walk.genes.items()}

    def count(self, d_model: int) -> int:
        if d_model not in self._counts:
            fillings = every(lambda decide: self.fill("", Walk(decide, d_model=d_model)))
            self._counts[d_model] = sum(1 for _ in fillings)
        return self._counts[d_model]


class Model:
    """A whole model: its blocks are filled last, at the width that was chosen."""

    def __init__(self, frame: Record, blocks: Node) -> None:
        self.frame, self.blocks = frame, blocks
        self._ways: dict[ModelSpec, int] = {}
        self._frames: dict[str, dict[ModelSpec, list[dict[str, int]]]] = {}

    def frames(self, path: str) -> dict[ModelSpec, list[dict[str, int]]]:
        """Every model without its blocks, and all genes that make it."""
        if path not in self._frames:
            table = self._frames[path] = {}
            for values, genes in assignments(self.frame, path):
                table.setdefault(self._read(values, path), []).append(genes)
        return self._frames[path]

    def fill(self, path: str, walk: Walk) -> ModelSpec:
        frame = self._read(self.frame.fill(path, walk), path)
        if walk.exhaustive and not self._count(frame):
            raise MisfitError(f"{join(path, 'blocks')}: none fit {frame}")
        walk.d_model = frame.d_model
        spec = _with_blocks(frame, self.blocks.fill(join(path, "blocks"), walk))
        try:
            spec.check()
        except SpecError as error:
            raise MisfitError(str(error)) from error
        return spec

    def count(self, d_model: int) -> int:
        frames = every(lambda decide: self.frame.fill("", Walk(decide)))
        return sum(self._count(self._read(values, "")) for values in frames)

    def _read(self, values: dict[str, Any], path: str) -> ModelSpec:
        return ModelSpec.from_dict({**values, "blocks": []}, path)

    def _count(self, frame: ModelSpec) -> int:
        """The ways to fill the blocks in this frame; 0 if they are valid and the frame is not."""

        def some(decide: Decide) -> Any:
            return self.blocks.fill("", Walk(decide, d_model=frame.d_model, exhaustive=True))

        if frame not in self._ways:
            self._ways[frame] = 0
            for blocks in islice(every(some), 1):
                with suppress(SpecError):
                    _with_blocks(frame, blocks).check()
                    self._ways[frame] = self.blocks.count(frame.d_model)
        return self._ways[frame]


def widths(root: Node, genes: Mapping[str, int]) -> tuple[str, dict[int, int]]:
    """The path of the hole that sets d_model of the model with these genes, and its options by
    width; the only one where it is no hole."""
    path = ""
    while isinstance(root, Choice):
        gene = genes.get(path, 0)
        root, path = root.nodes[gene], f"{path}:{gene}"
    assert isinstance(root, Model)
    hole = root.frame.nodes["d_model"]
    nodes = hole.nodes if isinstance(hole, Choice) else [hole]
    options = {node.value: i for i, node in enumerate(nodes) if isinstance(node, Leaf)}
    return join(path, "d_model"), options


def _with_blocks(frame: ModelSpec, blocks: Any) -> ModelSpec:
    return frame.replace(blocks=tuple(map(shared, _spliced([blocks]))))


@lru_cache(maxsize=2**14)
def shared(value: T) -> T:
    """An equal value that others hold already: the many candidates of a search are made of few
    different layers and genes."""
    return value


def kept(made: dict[K, T], key: K, make: Callable[[], T]) -> T:
    """What was made for this key before, or else is made now; of too many the oldest goes."""
    found = made.get(key)
    if found is None:
        found = make()
        if len(made) >= MOST_KEPT:
            del made[next(iter(made))]
        made[key] = found
    return found


def _spliced(values: Iterable[Any]) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def every(fill: Callable[[Decide], T]) -> Iterator[T]:
    """What `fill` makes of every sequence of decisions, the last one turning fastest.

    A misfit is left out, with all sequences that begin like it.
    """
    genes: list[int] = []
    while True:
        sizes: list[int] = []

        def decide(path: str, n: int, sizes: list[int] = sizes) -> int:
            sizes.append(n)
            if len(sizes) > len(genes):
                genes.append(0)
            return genes[len(sizes) - 1]

        try:
            filled = fill(decide)
        except MisfitError:
            pass
        else:
            yield filled
        while genes and genes[-1] + 1 == sizes[len(genes) - 1]:
            genes.pop()
        if not genes:
            return
        genes[-1] += 1


def assignments(node: Node, path: str, d_model: int = 0) -> Iterator[tuple[Any, dict[str, int]]]:
    """Everything that a node can be at this width, with the genes that make it."""

    def fill(decide: Decide) -> tuple[Any, dict[str, int]]:
        walk = Walk(decide, d_model=d_model)
        return node.fill(path, walk), walk.genes

    return every(fill)


def cover(node: Node) -> Iterator[Any]:
    """A few fillings in which every option occurs."""
    seen: set[tuple[str, int]] = set()
    todo: list[dict[str, int]] = [{}]
    while todo:
        forced = todo.pop()
        sizes: dict[str, int] = {}

        def decide(path: str, n: int, sizes: dict[str, int] = sizes, forced: Any = forced) -> int:
            sizes[path] = n
            return forced.get(path, 0)

        walk = Walk(decide)
        yield node.fill("", walk)
        seen |= set(walk.genes.items())
        for path, n in sizes.items():
            fresh = [option for option in range(n) if (path, option) not in seen]
            seen |= {(path, option) for option in fresh}
            todo += [{**walk.genes, path: option} for option in fresh]
