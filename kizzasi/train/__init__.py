"""Training: tasks and their data, recipes, the trainer, and the gate against leaks."""

from kizzasi.train.byte_baselines import baselines
from kizzasi.train.bytes import ByteText, load_corpus
from kizzasi.train.distributed import Ranks
from kizzasi.train.frames import Frames
from kizzasi.train.labels import Labels
from kizzasi.train.leak import find_leak
from kizzasi.train.muon import Muon
from kizzasi.train.open import open_task
from kizzasi.train.recipe import Recipe
from kizzasi.train.seeds import derive_seed
from kizzasi.train.synthetic import SyntheticTask
from kizzasi.train.task import Batch, Metric, Scores, Shape, Task
from kizzasi.train.token_ids import TokenIds
from kizzasi.train.trainer import Training

__all__ = [
    "Batch",
    "ByteText",
    "Frames",
    "Labels",
    "Metric",
    "Muon",
    "Ranks",
    "Recipe",
    "Scores",
    "Shape",
    "SyntheticTask",
    "Task",
    "TokenIds",
    "Training",
    "baselines",
    "derive_seed",
    "find_leak",
    "load_corpus",
    "open_task",
]
