"""Generations of pipelines: the best few breed, immigrants come, children may be far from all.

P = population, k = top_k. Lineage and every child's file are written before it is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kizzasi.nas.pipelines.printing import to_pipeline
from kizzasi.nas.pipelines.space.genes import distance
from kizzasi.nas.pipelines.space.space import Variant
from kizzasi.nas.searchers.ask_tell import Proposals, fresh, require_at_least, require_chance
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space

MACRO = (2, 3, 4)  # mutations in a row
CHANGES = 16  # tries of a mutation that draws no change


@dataclass(frozen=True)
class PipelineEvolution:
    """Breed generation after generation from the k best so far.

    A generation has `immigrants` new samples; each other child has two parents with
    `crossover_prob` and is then changed once, or with `macro_prob` a few times in a row. Of
    `novelty_draws` children the one whose genes are farthest from the population's is taken.
    The P best of all so far are the population.

    Args:
        population: P, at least 1; the first generation is samples, which begin with the seeds.
        generations: after the first, at least 0.
        top_k: k, at least 1.
        crossover_prob, macro_prob: chances, 0 .. 1.
        immigrants: of each generation, fewer than P.
        novelty_draws: children that one is chosen from; 1 takes every child as it comes.
        mutation_prob: chance per layer of each change.
        seed: 0 .. 2^64 - 1.
        folder: where gen_N/variant_K.yaml and lineage.jsonl go; None writes nothing.
        first: members of the first generation.

    The space is a `PipelineSpace`, or one around it.
    """

    population: int
    generations: int
    top_k: int
    crossover_prob: float = 0.5
    macro_prob: float = 0.2
    immigrants: int = 1
    novelty_draws: int = 1
    mutation_prob: float = 0.3
    seed: int = 0
    folder: Path | None = field(default=None, repr=False, compare=False)
    first: tuple[Variant, ...] = field(default=(), repr=False)

    def proposals(self, space: Space[Any]) -> Proposals[Any]:
        """Yield one batch for each generation."""
        require_at_least(1, population=self.population, top_k=self.top_k)
        require_at_least(0, generations=self.generations, immigrants=self.immigrants)
        require_at_least(1, novelty_draws=self.novelty_draws)
        require_chance(crossover_prob=self.crossover_prob, macro_prob=self.macro_prob)
        rng, known = Xorshift64(self.seed), set[Variant]()
        births: dict[Variant, _Birth] = {}
        waiting = list(reversed(self.first))
        batch = fresh(
            lambda: waiting.pop() if waiting else space.sample(rng), known, self.population
        )
        ranked: list[tuple[float, int, Variant]] = []
        for generation in range(self.generations + 1):
            if not batch:
                return
            self._write(generation, batch, births)
            scores = yield batch
            order = range(len(ranked), len(ranked) + len(batch))
            ranked += zip((-s for s in scores), order, batch, strict=True)
            ranked = sorted(ranked)[: self.population]
            members = [member for _, _, member in ranked]
            n = min(self.immigrants, self.population - 1) if generation else 0
            if generation == self.generations:
                return
            batch = fresh(lambda: space.sample(rng), known, n)
            bred = self._bred(space, rng, members, births)
            batch += fresh(bred, known, self.population - len(batch))

    def _bred(
        self,
        space: Space[Variant],
        rng: Xorshift64,
        members: Sequence[Variant],
        births: dict[Variant, _Birth],
    ) -> Callable[[], Variant]:
        parents = list(members[: self.top_k])

        def one() -> Variant:
            mother, ops = rng.choice(parents), []
            child, both = mother, [mother]
            if len(parents) > 1 and rng.next_f64() < self.crossover_prob:
                father = rng.choice([parent for parent in parents if parent != mother])
                child, both, ops = space.crossover(mother, father, rng), [mother, father], ["x"]
            times = rng.choice(MACRO) if rng.next_f64() < self.macro_prob else 1
            ops.append("macro" if times > 1 else "mutation")
            for _ in range(times):
                child = self._changed(space, rng, child)
            births[child] = _Birth(tuple(ops), tuple(both))
            return child

        def draw() -> Variant:
            children = [one() for _ in range(self.novelty_draws)]
            return max(children, key=lambda child: _novelty(child, members))

        return draw

    def _changed(self, space: Space[Variant], rng: Xorshift64, child: Variant) -> Variant:
        for _ in range(CHANGES):
            other = space.mutate(child, rng, self.mutation_prob)
            if other != child:
                return other
        return child

    def _write(
        self, generation: int, batch: Sequence[Variant], births: dict[Variant, _Birth]
    ) -> None:
        """Files of a generation, the same again on a resumed run."""
        if self.folder is None:
            return
        here = self.folder / f"gen_{generation}"
        here.mkdir(parents=True, exist_ok=True)
        lines = []
        for k, child in enumerate(batch):
            birth = births.get(child, _Birth(("sample",) if child.moves else ("seed",), ()))
            (here / f"variant_{k}.yaml").write_text(to_pipeline(child.spec).to_yaml(), "utf-8")
            moves = list(child.moves)
            lines.append(
                {
                    "generation": generation,
                    "child": f"gen_{generation}/variant_{k}.yaml",
                    "id": child.spec.digest[:12],
                    "op": [*birth.ops, *moves],
                    "parents": [parent.spec.digest[:12] for parent in birth.parents],
                }
            )
        file = self.folder / "lineage.jsonl"
        before = file.read_text("utf-8").splitlines() if generation and file.exists() else []
        kept = [line for line in before if json.loads(line)["generation"] < generation]
        text = [*kept, *map(json.dumps, lines)]
        file.write_text("\n".join(text) + "\n", "utf-8")


@dataclass(frozen=True)
class _Birth:
    ops: tuple[str, ...]
    parents: tuple[Variant, ...]


def _novelty(child: Variant, others: Sequence[Variant], nearest: int = 3) -> float:
    gaps = sorted(distance(child.spec, other.spec) for other in others)[:nearest]
    return sum(gaps) / len(gaps) if gaps else 1.0
