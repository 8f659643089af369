"""The tables of scripts/reproduce.py: what is trained, on what, and what a source reports of it."""

from reproductions.real import REAL
from reproductions.synthetic import SYNTHETIC
from reproductions.table import Table
from reproductions.trainings import TRAININGS

TABLES: dict[str, Table] = {**SYNTHETIC, **REAL, **TRAININGS}
