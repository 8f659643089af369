"""Synthetic tasks that ask a mixer one question each: can it select, recall, look up, keep count?

Every task is a seeded generator of `TaskBatch`; `SyntheticTask` trains and scores on one. Of
`HiddenPlace` no prefix tells the answers, so it stands apart from `TASKS`. `Compression`, which
reads many answers from one position, is a task by itself.
"""

from kizzasi.train.synthetic.compression import Compression
from kizzasi.train.synthetic.copying import Reverse, SelectiveCopying
from kizzasi.train.synthetic.examples import Examples, TaskBatch
from kizzasi.train.synthetic.hidden_place import HiddenPlace
from kizzasi.train.synthetic.recall import MQAR, InContextRecall, InductionHeads, Memorization
from kizzasi.train.synthetic.task import SyntheticTask
from kizzasi.train.synthetic.tracking import GroupProducts, ModularArithmetic, Parity

TASKS: dict[str, type[Examples]] = {
    "selective_copying": SelectiveCopying,
    "reverse": Reverse,
    "induction_heads": InductionHeads,
    "mqar": MQAR,
    "in_context_recall": InContextRecall,
    "memorization": Memorization,
    "parity": Parity,
    "modular_arithmetic": ModularArithmetic,
    "group_products": GroupProducts,
}

__all__ = [
    "MQAR",
    "TASKS",
    "Compression",
    "Examples",
    "GroupProducts",
    "HiddenPlace",
    "InContextRecall",
    "InductionHeads",
    "Memorization",
    "ModularArithmetic",
    "Parity",
    "Reverse",
    "SelectiveCopying",
    "SyntheticTask",
    "TaskBatch",
]
