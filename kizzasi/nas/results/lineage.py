"""Who descends from whom: the family tree of a search, as plain data and as a Mermaid diagram.

A candidate event may name its `parents` (ids of earlier candidates) and say which share of its
tensors it `inherited`. A search without parents has a tree of single nodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kizzasi.nas.results.summary import Summary
from kizzasi.train.task import Metric

MERMAID_NODES = 40  # more of them no longer fit a screen; the nearest ancestors are kept


@dataclass(frozen=True)
class Node:
    """A candidate in the tree.

    Args:
        id, name, group, params: of the candidate.
        parents: ids of earlier candidates.
        generation: 0 without parents, else one more than the latest parent's.
        inherited: share of its tensors that a parent gave, 0 to 1; None if trained from scratch.
        score: on the first rung, where all had one budget; None if it failed or waits.
        winner: whether the search chose it.
    """

    id: str
    name: str
    group: str
    params: int
    parents: tuple[str, ...]
    generation: int
    inherited: float | None
    score: float | None
    winner: bool = False


def lineage(summary: Summary) -> dict[str, Node]:
    """Every candidate by id, parents before children.

    Parents that the journal does not know, or knows only later, are left out: they would make no
    tree.
    """
    shares = {t["candidate"]: t["inherited"]["share"] for t in summary.trials if t.get("inherited")}
    standings = {s.entry["id"]: s for s in summary.standings}
    won = summary.winner.entry["id"] if summary.winner else None
    nodes: dict[str, Node] = {}
    for entry in summary.entries:
        own = entry["id"]
        parents = tuple(p for p in entry.get("parents") or () if p in nodes)
        nodes[own] = Node(
            id=own,
            name=entry["name"],
            group=entry["group"],
            params=entry["params"],
            parents=parents,
            generation=max((nodes[p].generation + 1 for p in parents), default=0),
            inherited=entry.get("inherited", shares.get(own)),
            score=standings[own].score("0"),
            winner=own == won,
        )
    return nodes


def ancestry(nodes: dict[str, Node], ids: Iterable[str]) -> dict[str, Node]:
    """The candidates `ids` and all that they descend from, parents before children."""
    wanted = set(ids)
    for node in reversed(nodes.values()):
        if node.id in wanted:
            wanted.update(node.parents)
    return {own: node for own, node in nodes.items() if own in wanted}


def to_json(nodes: Iterable[Node]) -> str:
    """The nodes as a JSON list."""
    plain: list[dict[str, Any]] = [asdict(node) for node in nodes]
    return json.dumps(plain, indent=1)


def mermaid(nodes: Sequence[Node], metric: Metric) -> str:
    """The tree as a Mermaid flowchart, parents above children; at most the last 40 nodes."""
    shown = nodes[-MERMAID_NODES:]
    number = {node.id: i for i, node in enumerate(shown)}
    lines = ["flowchart TD"]
    for node in shown:
        score = "no score" if node.score is None else f"{metric.show(node.score)} {metric.label}"
        text = re.sub(r"[^\w .,+:()/-]", "_", node.name)
        mark = "([{}])" if node.winner else "[{}]"
        label = f'"{text}<br/>{score}"'
        lines.append(f"  n{number[node.id]}{mark.format(label)}")
        share = "" if node.inherited is None else f"|inherits {node.inherited:.0%}|"
        lines += [
            f"  n{number[parent]} -->{share} n{number[node.id]}"
            for parent in node.parents
            if parent in number
        ]
    return "\n".join(lines)
