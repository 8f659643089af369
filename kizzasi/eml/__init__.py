"""EML attention: attention made of eml(x, y) = exp(x) - ln(y), trained without gradients.

The seed's models and benchmark (`ToyEmlAttention`, `EmlModel`, `run_benchmark`) reproduce its
figures under rng="seed" and really learn under the default rng="fixed".
"""

from kizzasi.eml.benchmark import (
    AttentionBenchmark,
    AttentionComparison,
    compare_eml_vs_baseline,
    run_benchmark,
    run_benchmark_with_trials,
)
from kizzasi.eml.events import Drift, Event, Loaded, Prediction, Reset, Saved, Trained
from kizzasi.eml.model import EmlModel
from kizzasi.eml.operator import eml, eml_safe, eml_soft, softmax3
from kizzasi.eml.toy import BaselineAttention, ToyEmlAttention
from kizzasi.eml.tree import SafeTree
from kizzasi.eml.trials import EndToEndTrainConfig

__all__ = [
    "AttentionBenchmark",
    "AttentionComparison",
    "BaselineAttention",
    "Drift",
    "EmlModel",
    "EndToEndTrainConfig",
    "Event",
    "Loaded",
    "Prediction",
    "Reset",
    "SafeTree",
    "Saved",
    "ToyEmlAttention",
    "Trained",
    "compare_eml_vs_baseline",
    "eml",
    "eml_safe",
    "eml_soft",
    "run_benchmark",
    "run_benchmark_with_trials",
    "softmax3",
]
