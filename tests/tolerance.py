"""The one tolerance table: what 'equal' means per dtype, for outputs, gradients and states.

Of a whole model in low precision no figure can be asked: how much rounding does is the model's
condition. What its rounding may do is a multiple of what random errors of that size in the weights
do to the exact model.
"""

import torch

from kizzasi.testing.tolerance import TOLERANCE, assert_close

__all__ = ["TOLERANCE", "assert_close", "assert_close_in"]
TIMES_THE_NOISE = {torch.bfloat16: 3.0, torch.float16: 3.0}


def assert_close_in(dtype, actual, exact, noisy, msg=""):
    """Tensors (or dictionaries of them, as one vector each) of a low-precision run, of the float64
    one, and of a float64 run whose weights have errors of the dtype's size."""

    def distance(a):
        pairs = [(a[k], exact[k]) for k in exact] if isinstance(exact, dict) else [(a, exact)]
        return sum((x.double() - y).square().sum() for x, y in pairs).sqrt()

    far, allowed = distance(actual), TIMES_THE_NOISE[dtype] * distance(noisy)
    assert far <= allowed, f"{msg}: {far:.3g} away, {allowed:.3g} allowed"
