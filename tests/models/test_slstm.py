"""sLSTM against the unstabilised equations of its paper."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import SLSTMSpec
from kizzasi.models.ops.slstm import slstm_ref


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_papers_recurrence():
    """Equations 8 to 14, head by head, for one document after another."""
    x, R = draw(1, 14, 4, 2, 3), 0.5 * draw(4, 2, 3, 3, seed=2)
    starts = torch.zeros(1, 14, dtype=torch.bool)
    starts[0, 6] = True
    y, _ = slstm_ref(x, R, None, starts)
    for head in range(2):
        for begin, end in ((0, 6), (6, 14)):
            h, c, n = (torch.zeros(3, dtype=torch.float64) for _ in range(3))
            for t in range(begin, end):
                z, i, f, o = (x[0, t, g, head] + h @ R[g, head] for g in range(4))
                c = f.sigmoid() * c + i.exp() * z.tanh()
                n = f.sigmoid() * n + i.exp()
                h = o.sigmoid() * c / n
                assert_close(y[0, t, head], h)


@pytest.mark.parametrize("gate", [-200.0, 200.0])
def test_extreme_input_gates_give_finite_numbers_and_gradients(gate):
    x = draw(1, 9, 4, 1, 3).float()
    x[:, ::2, 1] = gate
    x.requires_grad_()
    y, _ = slstm_ref(x, torch.zeros(4, 1, 3, 3))
    assert y.isfinite().all()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_gates_see_the_last_output():
    module = SLSTMSpec(n_heads=2).build(LayerContext(8)).double()
    x = draw(1, 6, 8)
    before = module(x).y
    with torch.no_grad():
        module.R.add_(0.5 * draw(*module.R.shape))
    after = module(x).y
    assert torch.equal(before[:, 0], after[:, 0])
    assert (before[:, 1:] != after[:, 1:]).any(-1).all()


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(SpecError, match=r"m\.n_heads: 3 does not divide d_model 8"):
        SLSTMSpec(n_heads=3).check(8, "m")
