"""Searchers, written once over any space and any evaluator."""

from kizzasi.nas.searchers.ask_tell import (
    AskTell,
    History,
    Proposals,
    Score,
    Searcher,
    one_by_one,
    run,
)
from kizzasi.nas.searchers.evolution import Evolution
from kizzasi.nas.searchers.grid import Grid
from kizzasi.nas.searchers.local import LocalSearch
from kizzasi.nas.searchers.nsga2 import NSGA2, pareto_front
from kizzasi.nas.searchers.random import Random
from kizzasi.nas.searchers.regularized import RegularizedEvolution
from kizzasi.nas.searchers.stream import Flowing, News, Stream, Streaming
from kizzasi.nas.searchers.tpe import TPE

__all__ = [
    "NSGA2",
    "TPE",
    "AskTell",
    "Evolution",
    "Flowing",
    "Grid",
    "History",
    "LocalSearch",
    "News",
    "Proposals",
    "Random",
    "RegularizedEvolution",
    "Score",
    "Searcher",
    "Stream",
    "Streaming",
    "one_by_one",
    "pareto_front",
    "run",
]
