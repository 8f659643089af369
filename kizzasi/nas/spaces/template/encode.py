"""From a model back to the genes that make it, where a template can make it at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kizzasi.models import BlockSpec, LayerSpec, ModelSpec
from kizzasi.nas.spaces.template.nodes import (
    Block,
    Choice,
    List,
    Model,
    Node,
    Pattern,
    Repeat,
)
from kizzasi.strict import join

Genes = dict[str, int]
Prefixes = list[tuple[Genes, int]]  # genes, and how many blocks they make
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
    """

    d_model: int

    def prefixes(self, node: Node, blocks: Blocks, path: str) -> Iterator[tuple[Genes, int]]:
        """Genes with which `node` makes the first n of these blocks, and n."""
        if isinstance(node, Choice):
            for gene, own in _options(node, path):
                for genes, n in self.prefixes(node.nodes[gene], blocks, f"{path}:{gene}"):
                    yield {**own, **genes}, n
        elif isinstance(node, List):
            yield from self._chain([(n, f"{path}[{i}]") for i, n in enumerate(node.nodes)], blocks)
        elif isinstance(node, Repeat):
            found: Prefixes = [({}, 0)]
            for copies in range(1, min(node.high, len(blocks)) + 1):
                found = self._longer(found, node.node, f"{path}[{copies - 1}]", blocks)
                own = {path: copies - node.low} if node.high > node.low else {}
                if copies >= node.low:
                    yield from (({**own, **genes}, n) for genes, n in found)
        elif isinstance(node, Pattern):
            for i, text in enumerate(node.texts):
                own = {path: i} if len(node.texts) > 1 else {}
                links = [(node.letters[c], f"{path}.{c}") for c in text]
                for genes, n in self._chain(links, blocks):
                    yield {**own, **genes}, n
        elif isinstance(node, Block) and blocks and isinstance(blocks[0], BlockSpec):
            yield from ((genes, 1) for genes in node.ways(blocks[0], path, self.d_model))

    def _chain(self, links: Sequence[tuple[Node, str]], blocks: Blocks) -> Prefixes:
        """One node behind the other."""
        found: Prefixes = [({}, 0)] if len(links) <= len(blocks) else []
        for node, path in links:
            if not found:
                break
            found = self._longer(found, node, path, blocks)
        return found

    def _longer(self, found: Prefixes, node: Node, path: str, blocks: Blocks) -> Prefixes:
        """One more node behind each of these; nodes of one path have the same genes."""
        return [
            ({**before, **genes}, m + n)
            for before, m in found
            for genes, n in self.prefixes(node, blocks[m:], path)
            if all(before.get(where, gene) == gene for where, gene in genes.items())
        ]


def _options(node: Choice, path: str) -> Iterator[tuple[int, Genes]]:
    for gene in range(len(node.nodes)):
        yield gene, {path: gene} if len(node.nodes) > 1 else {}
