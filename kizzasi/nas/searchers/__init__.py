"""Searchers, written once over any space and any evaluator."""

from kizzasi.nas.searchers.evolution import Evolution
from kizzasi.nas.searchers.grid import Grid
from kizzasi.nas.searchers.random import Random
from kizzasi.nas.searchers.search import History, Proposals, Search, Searcher, one_by_one, run

__all__ = [
    "Evolution",
    "Grid",
    "History",
    "Proposals",
    "Random",
    "Search",
    "Searcher",
    "one_by_one",
    "run",
]
