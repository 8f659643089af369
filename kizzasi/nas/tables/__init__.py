"""Tables of trained models: every model of a small space, trained, to judge searches in seconds.

table = hybrid216()
table.space                               # every mixer of six in each of three layers
table.row(spec).test                      # bits a byte on test data, by seed
Search(table.space, table, ...)           # answers a search's jobs without training
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from kizzasi.nas.tables.table import Row, TrainedTable

__all__ = ["Row", "TrainedTable", "hybrid216"]


@cache
def hybrid216() -> TrainedTable:
    """Attention, Mamba, Mamba-2, gated DeltaNet, RWKV-7 or a short convolution in each of three
    layers: 216 models of 111,152 to 114,560 parameters, trained on CPython's standard library.

    `hybrid216().about` says how: data and digest, recipe, versions, and the command that made it.
    """
    return TrainedTable.from_json((files(__name__) / "hybrid216.json").read_text("utf-8"))
