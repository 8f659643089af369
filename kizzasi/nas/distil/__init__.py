"""Search on a trained model: other mixers in its layers, and the best hybrid under a budget.

Every candidate is trained in its layer by itself, judged by what it does to the whole model, chosen
by dynamic programming under a budget of state bytes, and the hybrid trained for a short while to
say what the model said.

Source: Bercovich et al. 2024, arXiv:2411.19146 (blockwise distillation, replace-one-block scores).
Differs: mixers alone, bytes of state as the budget, and dynamic programming where the paper has an
integer program.
"""

from kizzasi.nas.distil.candidates import ready_made
from kizzasi.nas.distil.choose import Front, Option, Plan, choose
from kizzasi.nas.distil.hybrid import assemble
from kizzasi.nas.distil.local import Local
from kizzasi.nas.distil.task import Distilled, windows
from kizzasi.nas.distil.transfer import heads_of, transfer
from kizzasi.nas.distil.trials import OWN, Trial, Trials, try_mixers
from kizzasi.nas.distil.yardstick import Distance, Yardstick, divergence

__all__ = [
    "OWN",
    "Distance",
    "Distilled",
    "Front",
    "Local",
    "Option",
    "Plan",
    "Trial",
    "Trials",
    "Yardstick",
    "assemble",
    "choose",
    "divergence",
    "heads_of",
    "ready_made",
    "transfer",
    "try_mixers",
    "windows",
]
