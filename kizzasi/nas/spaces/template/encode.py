"""From a model back to the genes that make it, where a template can make it at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
    fillings,
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
        bare, where = spec.replace(blocks=()), join(path, "blocks")
        for frame in root.frames(path).get(bare, ()):
            for genes, n in _Reading(spec.d_model).prefixes(root.blocks, spec.blocks, where):
                if n == len(spec.blocks):
                    yield {**frame, **genes}


@dataclass
class _Reading:
    """Blocks of one model, read as a template of them.

    Args:
        d_model: of the model.
        known: by the path of a template's block and the block read: the ways to make it.
    """

    d_model: int
    known: dict[tuple[str, int], list[Genes]] = field(default_factory=dict)

    def prefixes(self, node: Node, blocks: Blocks, path: str) -> Iterator[tuple[Genes, int]]:
        """Genes with which `node` makes the first n of these blocks, and n."""
        if isinstance(node, Choice):
            for gene, own in _options(node, path):
                for genes, n in self.prefixes(node.nodes[gene], blocks, f"{path}:{gene}"):
                    yield {**own, **genes}, n
        elif isinstance(node, List):
            yield from self._chain([(n, f"{path}[{i}]") for i, n in enumerate(node.nodes)], blocks)
        elif isinstance(node, Repeat):
            for copies in range(node.low, node.high + 1):
                own = {path: copies - node.low} if node.high > node.low else {}
                links = [(node.node, f"{path}[{i}]") for i in range(copies)]
                for genes, n in self._chain(links, blocks):
                    yield {**own, **genes}, n
        elif isinstance(node, Pattern):
            for i, text in enumerate(node.texts):
                own = {path: i} if len(node.texts) > 1 else {}
                links = [(node.letters[c], f"{path}.{c}") for c in text]
                for genes, n in self._chain(links, blocks):
                    yield {**own, **genes}, n
        elif isinstance(node, Block) and blocks and isinstance(blocks[0], BlockSpec):
            for genes in self._block(node, blocks[0], path):
                yield genes, 1

    def _chain(
        self, links: Sequence[tuple[Node, str]], blocks: Blocks
    ) -> Iterator[tuple[Genes, int]]:
        """One node behind the other; nodes of one path have the same genes."""
        if not links:
            yield {}, 0
            return
        (node, path), *rest = links
        for genes, n in self.prefixes(node, blocks, path):
            for more, m in self._chain(rest, blocks[n:]):
                if all(more.get(where, gene) == gene for where, gene in genes.items()):
                    yield {**genes, **more}, n + m

    def _block(self, node: Block, block: BlockSpec, path: str) -> list[Genes]:
        key = path, id(block)
        if key not in self.known:
            self.known[key] = list(self._ways(node, block, path))
        return self.known[key]

    def _ways(self, node: Block, block: BlockSpec, path: str) -> Iterator[Genes]:
        parts = node.parts.nodes
        if BlockSpec(**{key: getattr(block, key) for key in parts}) != block:
            return  # what the template leaves out has its default
        ways: list[Genes] = [{}]
        for key, part in parts.items():
            wanted, where = getattr(block, key), join(path, key)
            if isinstance(part, Part):
                fitting = part.ways(wanted, where, self.d_model)
            else:
                fitting = [g for value, g in fillings(part, where, self.d_model) if value == wanted]
            ways = [{**way, **genes} for way in ways for genes in fitting]
        yield from ways


def _options(node: Choice, path: str) -> Iterator[tuple[int, Genes]]:
    for gene in range(len(node.nodes)):
        yield gene, {path: gene} if len(node.nodes) > 1 else {}
