"""From a model back to the genes that make it, where a template can make it at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kizzasi.models import BlockSpec, LayerSpec, ModelSpec
from kizzasi.nas.spaces.template.nodes import (
    Block,
    Choice,
    List,
    Model,
    Node,
    Part,
    Pattern,
    Repeat,
    Walk,
    every,
)
from kizzasi.strict import join

Genes = dict[str, int]
Blocks = Sequence[LayerSpec]


def genes_of(root: Node, spec: ModelSpec, path: str = "") -> Iterator[Genes]:
    """Every way in which a template of a model makes exactly this one."""
    if isinstance(root, Choice):
        for gene, own in _options(root, path):
            for genes in genes_of(root.nodes[gene], spec, f"{path}:{gene}"):
                yield {**own, **genes}
    elif isinstance(root, Model):
        bare = spec.replace(blocks=()).to_dict()
        for values, frame in _fillings(root.frame, path, spec.d_model):
            if ModelSpec.from_dict({**values, "blocks": []}, path).to_dict() == bare:
                where = join(path, "blocks")
                for genes, n in _prefixes(root.blocks, spec.blocks, where, spec.d_model):
                    if n == len(spec.blocks):
                        yield {**frame, **genes}


def _prefixes(node: Node, blocks: Blocks, path: str, d_model: int) -> Iterator[tuple[Genes, int]]:
    """Genes with which `node` makes the first n of these blocks, and n."""
    if isinstance(node, Choice):
        for gene, own in _options(node, path):
            for genes, n in _prefixes(node.nodes[gene], blocks, f"{path}:{gene}", d_model):
                yield {**own, **genes}, n
    elif isinstance(node, List):
        yield from _chain([(n, f"{path}[{i}]") for i, n in enumerate(node.nodes)], blocks, d_model)
    elif isinstance(node, Repeat):
        for copies in range(node.low, node.high + 1):
            own = {path: copies - node.low} if node.high > node.low else {}
            links = [(node.node, f"{path}[{i}]") for i in range(copies)]
            for genes, n in _chain(links, blocks, d_model):
                yield {**own, **genes}, n
    elif isinstance(node, Pattern):
        for i, text in enumerate(node.texts):
            own = {path: i} if len(node.texts) > 1 else {}
            links = [(node.letters[c], f"{path}.{c}") for c in text]
            for genes, n in _chain(links, blocks, d_model):
                yield {**own, **genes}, n
    elif isinstance(node, Block) and blocks and isinstance(blocks[0], BlockSpec):
        for genes in _block(node, blocks[0], path, d_model):
            yield genes, 1


def _chain(
    links: Sequence[tuple[Node, str]], blocks: Blocks, d_model: int
) -> Iterator[tuple[Genes, int]]:
    """One node behind the other; nodes of one path have the same genes."""
    if not links:
        yield {}, 0
        return
    (node, path), *rest = links
    for genes, n in _prefixes(node, blocks, path, d_model):
        for more, m in _chain(rest, blocks[n:], d_model):
            if all(more.get(where, gene) == gene for where, gene in genes.items()):
                yield {**genes, **more}, n + m


def _block(node: Block, block: BlockSpec, path: str, d_model: int) -> Iterator[Genes]:
    parts = node.parts.nodes
    if BlockSpec(**{key: getattr(block, key) for key in parts}) != block:
        return  # what the template leaves out has its default
    ways: list[Genes] = [{}]
    for key, part in parts.items():
        wanted, where = getattr(block, key), join(path, key)
        if isinstance(part, Part):
            fitting = part.ways(wanted, where, d_model)
        else:
            fitting = [g for value, g in _fillings(part, where, d_model) if value == wanted]
        ways = [{**way, **genes} for way in ways for genes in fitting]
    yield from ways


def _options(node: Choice, path: str) -> Iterator[tuple[int, Genes]]:
    for gene in range(len(node.nodes)):
        yield gene, {path: gene} if len(node.nodes) > 1 else {}


def _fillings(node: Node, path: str, d_model: int) -> Iterator[tuple[Any, Genes]]:
    def fill(decide: Any) -> tuple[Any, Genes]:
        walk = Walk(decide, d_model=d_model)
        return node.fill(path, walk), walk.genes

    return every(fill)
