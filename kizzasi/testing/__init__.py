"""Exams: a part of your own sits the same ones as ours. A fault is an AssertionError."""

from kizzasi.testing.layer import check_layer
from kizzasi.testing.mixer import check_mixer
from kizzasi.testing.model import check_model
from kizzasi.testing.search import check_scheduler, check_searcher, check_space
from kizzasi.testing.task import check_task

__all__ = [
    "check_layer",
    "check_mixer",
    "check_model",
    "check_scheduler",
    "check_searcher",
    "check_space",
    "check_task",
]
