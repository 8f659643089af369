"""EML attention: attention made of eml(x, y) = exp(x) - ln(y), trained without gradients.

eml-core's models and benchmark (`ToyEmlAttention`, `EmlModel`, `run_benchmark`) reproduce its
figures under rng="seed" and really learn under the default rng="fixed".
"""

from kizzasi.eml.attention import EmlAttention, EmlAttentionSpec
from kizzasi.eml.core.attention import (
    MAX_TOY_D_MODEL,
    MAX_TOY_SEQ_LEN,
    BaselineAttention,
    ToyEmlAttention,
)
from kizzasi.eml.core.benchmark import (
    AttentionBenchmark,
    AttentionComparison,
    ScalingPoint,
    compare_eml_vs_baseline,
    run_benchmark,
    run_benchmark_with_trials,
)
from kizzasi.eml.core.descent import EndToEndTrainConfig
from kizzasi.eml.core.events import (
    Drift,
    EmlEvent,
    EmlEventLog,
    Event,
    Loaded,
    Prediction,
    Reset,
    Saved,
    Trained,
)
from kizzasi.eml.core.flat import numerical_softmax
from kizzasi.eml.core.model import EmlModel
from kizzasi.eml.core.tree import SafeTree
from kizzasi.eml.exact.anneal import MasterFormula, train_master_formula
from kizzasi.eml.exact.compiler import compile_expression, verify
from kizzasi.eml.exact.enumerate import TreeSearch, search_tree
from kizzasi.eml.exact.tree import evaluate, formula
from kizzasi.eml.operator import eml, eml_safe, eml_soft, softmax3
from kizzasi.eml.search.coordinate import BlockDescent, CoordinateDescent
from kizzasi.eml.search.evolution import AntitheticES, SeparableCma, Spsa
from kizzasi.eml.search.gauss_newton import GaussNewton
from kizzasi.eml.search.minimize import Minimum, minimize
from kizzasi.eml.search.objective import ModuleObjective
from kizzasi.eml.search.pattern import PatternSearch
from kizzasi.eml.search.rows import OutputRows, output_rows

__all__ = [
    "MAX_TOY_D_MODEL",
    "MAX_TOY_SEQ_LEN",
    "AntitheticES",
    "AttentionBenchmark",
    "AttentionComparison",
    "BaselineAttention",
    "BlockDescent",
    "CoordinateDescent",
    "Drift",
    "EmlAttention",
    "EmlAttentionSpec",
    "EmlEvent",
    "EmlEventLog",
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
    "ScalingPoint",
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
    "numerical_softmax",
    "output_rows",
    "run_benchmark",
    "run_benchmark_with_trials",
    "search_tree",
    "softmax3",
    "train_master_formula",
    "verify",
]
