"""Models that step in place, for `Decoder` and `generate`.

A layer has a way of its own here, or is run by its recurrent form (`IN_PLACE` says which). A layer
in which a hook, an adapter, sharding or the like is at work is called as a module, and so is a
model: what acts in training acts in decoding.
"""

from kizzasi.models.decoding.inplace.base import COPIED, Products
from kizzasi.models.decoding.inplace.line import CalledLine, Line, begin

__all__ = ["COPIED", "CalledLine", "Line", "Products", "begin"]
