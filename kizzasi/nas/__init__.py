"""Architecture search: spaces, searchers, honest micro-training, and the study that joins them."""

from kizzasi.nas.evaluators.micro_training import Measurement, MicroTrain
from kizzasi.nas.evaluators.zero_cost import PROXIES
from kizzasi.nas.results.rank_agreement import kendall_tau_b, proxy_worth, spearman, top_k_recall
from kizzasi.nas.search import Search, SearchConfig
from kizzasi.nas.searchers.arch_search import (
    ArchSearchConfig,
    ArchSearchResult,
    EvolutionarySearcher,
    GridSearcher,
    RandomArchSearcher,
    search_best_arch,
)
from kizzasi.nas.spaces.constraints import Constraints, Feasible
from kizzasi.nas.spaces.families import ArchCandidate, ArchSearchSpace
from kizzasi.nas.spaces.model_space import Candidate, ModelSpace
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.spaces.template.parse import choice, pattern, repeat
from kizzasi.train.bytes import ByteCorpus, baselines, load_corpus
from kizzasi.train.leak import find_leak
from kizzasi.train.recipe import Recipe
from kizzasi.train.trainer import Training

__all__ = [
    "PROXIES",
    "ArchCandidate",
    "ArchSearchConfig",
    "ArchSearchResult",
    "ArchSearchSpace",
    "ByteCorpus",
    "Candidate",
    "Constraints",
    "EvolutionarySearcher",
    "Feasible",
    "GridSearcher",
    "Measurement",
    "MicroTrain",
    "ModelSpace",
    "RandomArchSearcher",
    "Recipe",
    "Search",
    "SearchConfig",
    "Space",
    "Training",
    "Xorshift64",
    "baselines",
    "choice",
    "find_leak",
    "kendall_tau_b",
    "load_corpus",
    "pattern",
    "proxy_worth",
    "repeat",
    "search_best_arch",
    "spearman",
    "top_k_recall",
]
