"""Schedulers: which candidate trains on, and how far, decided from the scores so far."""

from kizzasi.nas.schedulers.asha import ASHA
from kizzasi.nas.schedulers.extrapolated import Extrapolated
from kizzasi.nas.schedulers.halving import Halving
from kizzasi.nas.schedulers.hyperband import Hyperband
from kizzasi.nas.schedulers.pasha import PASHA
from kizzasi.nas.schedulers.pdh import PDH
from kizzasi.nas.schedulers.schedule import (
    Instalment,
    Results,
    Schedule,
    Scheduler,
    geometric_budgets,
    run,
)
from kizzasi.nas.schedulers.stopping_asha import StoppingASHA
from kizzasi.nas.schedulers.sweep import Sweep

__all__ = [
    "ASHA",
    "PASHA",
    "PDH",
    "Extrapolated",
    "Halving",
    "Hyperband",
    "Instalment",
    "Results",
    "Schedule",
    "Scheduler",
    "StoppingASHA",
    "Sweep",
    "geometric_budgets",
    "run",
]
