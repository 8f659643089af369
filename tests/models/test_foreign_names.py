"""Rules between our names and theirs, and the forms that rewrite tensors: exact inverses."""

import pytest
import torch

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints import experts, names
from kizzasi.models.checkpoints.names import Rule, apply, renamed

OURS = [
    f"blocks.{i}.e.{j}.{leaf}" for i in range(2) for j in range(11) for leaf in ("weight", "bias")
]


def test_numbers_and_last_parts_mean_the_same_on_both_sides():
    links = apply(renamed({"blocks.#.e.#.@": "x.#.@.of.#"}), ["blocks.3.e.12.bias"])
    assert links[0].theirs == ["x.3.@.of.12".replace("@", "bias")]


def test_stars_gather_in_the_order_of_numbers():
    rules = [
        Rule("blocks.#.e.*.weight", "x.#.w", names.STACKED),
        *renamed({"blocks.#.e.#.bias": "b.#.#"}),
    ]
    links = apply(rules, OURS)
    assert links[0].ours == [f"blocks.0.e.{j}.weight" for j in range(11)]
    assert [link.theirs[0] for link in links[:3]] == ["x.0.w", "x.1.w", "b.0.0"]
    assert sorted(n for link in links for n in link.ours) == sorted(OURS)


def test_names_without_a_rule_are_errors():
    with pytest.raises(CheckpointError, match=r"no name for blocks\.0\.e\.0\.bias"):
        apply(renamed({"blocks.#.e.#.weight": "x.#.#"}), OURS)


FORMS = {
    "same": (names.SAME, [(3, 4)], [(3, 4)]),
    "transposed": (names.TRANSPOSED, [(3, 4)], [(4, 3)]),
    "concatenated": (names.CONCATENATED, [(3, 4), (2, 4)], [(5, 4)]),
    "vectors": (names.CONCATENATED, [(3,), (2,), (1,)], [(6,)]),
    "fused": (names.CONCATENATED_TRANSPOSED, [(3, 4), (2, 4)], [(4, 5)]),
    "stacked": (names.STACKED, [(3, 4), (3, 4)], [(2, 3, 4)]),
    "pairs": (experts.PAIRS, [(2, 6, 4)], [(3, 4)] * 4),
    "reshaped": (names.reshaped(1, 1, -1), [(5,), (3,)], [(1, 1, 5), (1, 1, 3)]),
}


@pytest.mark.parametrize(("form", "shapes", "expected"), FORMS.values(), ids=FORMS)
def test_forms_are_undone_exactly_and_tell_shapes_without_values(form, shapes, expected):
    ours = [torch.randn(shape) for shape in shapes]
    theirs = form.write(ours)
    assert [t.shape for t in theirs] == [torch.Size(shape) for shape in expected]
    again = form.read(theirs, [t.shape for t in ours])
    assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))
    meta = form.write([torch.empty(shape, device="meta") for shape in shapes])
    assert [t.shape for t in meta] == [t.shape for t in theirs]
