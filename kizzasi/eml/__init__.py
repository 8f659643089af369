"""EML attention: attention made of eml(x, y) = exp(x) - ln(y), trained without gradients.

eml-core's models and benchmark (`ToyEmlAttention`, `EmlModel`, `run_benchmark`) reproduce its
figures under rng="seed" and really learn under the default rng="fixed".
"""

from kizzasi.eml.attention import EmlAttention, EmlAttentionSpec
from kizzasi.eml.benchmark import (
    AttentionBenchmark,
    AttentionComparison,
    compare_eml_vs_baseline,
    run_benchmark,
    run_benchmark_with_trials,
)
from kizzasi.eml.events import Drift, Event, Loaded, Prediction, Reset, Saved, Trained
from kizzasi.eml.evolution import AntitheticES, SeparableCma, Spsa
from kizzasi.eml.exact import compile_expression, evaluate, formula, verify
from kizzasi.eml.least_squares import GaussNewton
from kizzasi.eml.model import EmlModel
from kizzasi.eml.operator import eml, eml_safe, eml_soft, softmax3
from kizzasi.eml.optimizers import BlockDescent, CoordinateDescent, PatternSearch
from kizzasi.eml.recovery import MasterFormula, train_master_formula
from kizzasi.eml.rows import OutputRows, output_rows
from kizzasi.eml.toy import BaselineAttention, ToyEmlAttention
from kizzasi.eml.trainer import Minimum, ModuleObjective, minimize
from kizzasi.eml.tree import SafeTree
from kizzasi.eml.tree_search import TreeSearch, search_tree
from kizzasi.eml.trials import EndToEndTrainConfig

__all__ = [
    "AntitheticES",
    "AttentionBenchmark",
    "AttentionComparison",
    "BaselineAttention",
    "BlockDescent",
    "CoordinateDescent",
    "Drift",
    "EmlAttention",
    "EmlAttentionSpec",
    "EmlModel",
    "EndToEndTrainConfig",
    "Event",
    "GaussNewton",
    "Loaded",
    "MasterFormula",
    "Minimum",
    "ModuleObjective",
    "OutputRows",
    "PatternSearch",
    "Prediction",
    "Reset",
    "SafeTree",
    "Saved",
    "SeparableCma",
    "Spsa",
    "ToyEmlAttention",
    "Trained",
    "TreeSearch",
    "compare_eml_vs_baseline",
    "compile_expression",
    "eml",
    "eml_safe",
    "eml_soft",
    "evaluate",
    "formula",
    "minimize",
    "output_rows",
    "run_benchmark",
    "run_benchmark_with_trials",
    "search_tree",
    "softmax3",
    "train_master_formula",
    "verify",
]
