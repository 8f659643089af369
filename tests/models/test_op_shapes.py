"""Shapes said by letter, and sequences cut into chunks."""

import pytest
import torch

from kizzasi.errors import ShapeError
from kizzasi.models.ops.chunks import by_head, chunk_size, chunks, joined
from kizzasi.models.ops.shapes import Shapes

SHAPES = Shapes(x="b t c", weight="c k", w="b|1 t|1 c|1", state="b c k-1")


def test_sizes_come_in_the_order_of_their_letters():
    x, weight, state = torch.zeros(2, 5, 3), torch.zeros(3, 4), torch.zeros(2, 3, 3)
    for w in (torch.zeros(2, 5, 3), torch.zeros(1, 5, 1), None):
        assert SHAPES(x, weight, w, state) == (2, 5, 3, 4)


@pytest.mark.parametrize(
    ("which", "shape", "message"),
    [
        (0, (2, 0, 3), r"x is \(2, 0, 3\); expected \(b, t, c\) with t >= 1$"),
        (0, (2, 5), r"x is \(2, 5\); expected \(b, t, c\) with t >= 1$"),
        (1, (2, 4), r"weight is \(2, 4\); expected \(c, k\) with t >= 1, b = 2, t = 5, c = 3$"),
        (2, (2, 5, 2), r"w is \(2, 5, 2\); expected \(b\|1, t\|1, c\|1\) .*c = 3"),
        (2, (5, 3), r"w is \(5, 3\)"),
        (3, (2, 3, 4), r"state is \(2, 3, 4\); expected \(b, c, k-1\) .*k = 4"),
    ],
)
def test_what_does_not_fit_is_named_with_what_it_was_held_against(which, shape, message):
    given = [torch.zeros(2, 5, 3), torch.zeros(3, 4), None, torch.zeros(2, 3, 3)]
    given[which] = torch.zeros(shape)
    with pytest.raises(ShapeError, match=message):
        SHAPES(*given)


@pytest.mark.parametrize("t", [1, 2, 7, 8, 9])
def test_chunks_are_filled_and_joined_again(t):
    c = chunk_size(t, 4)
    assert c == min(4, {1: 1, 2: 2}.get(t, 8))
    x = torch.randn(2, t, 3, 5)
    cut = chunks(x, c, fill=-torch.inf)
    assert torch.equal(cut.flatten(1, 2)[:, :t], x)
    assert (cut.flatten(1, 2)[:, t:] == -torch.inf).all()
    assert torch.equal(joined(by_head(x, c), 2, t, 3), x)
    assert torch.equal(
        by_head(x, c).view(-1, 2, 3, c, 5)[0, 1, 2], cut.nan_to_num(neginf=0)[1, 0, :, 2]
    )
