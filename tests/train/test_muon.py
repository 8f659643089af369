"""Muon: the iteration, parts and stacks, and equality with torch's own where torch has it."""

import copy

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.train.muon import Muon, orthogonalise


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(parameters, optimizer, steps=3):
    """Run some steps with made-up gradients; returns the parameters."""
    for step in range(steps):
        for number, p in enumerate(parameters):
            p.grad = randn(*p.shape, seed=100 * step + number, dtype=p.dtype)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 4, 9), (2, 9, 4), (1, 1, 5)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    M = randn(*shape)
    X = orthogonalise(M)
    singular = torch.linalg.svdvals(X)
    assert singular.min() > 0.6
    assert singular.max() < 1.25
    U, _, V = torch.linalg.svd(M, full_matrices=False)
    diagonal = torch.einsum("nri,nrc,nic->ni", U, X, V)
    assert_close(diagonal.sort(-1).values, singular.sort(-1).values)


def test_a_zero_matrix_stays_zero():
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_equals_torchs_muon(shape, monkeypatch):
    """Both in bfloat16, in which torch's iterates whatever the dtype of the gradient."""
    from kizzasi.train import muon

    whole = muon.orthogonalise
    monkeypatch.setattr(muon, "orthogonalise", lambda M: whole(M.bfloat16()).to(M.dtype))
    ours, theirs = (torch.nn.Parameter(randn(*shape, dtype=torch.float32)) for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    trained([ours], Muon([{"params": [ours], "rows": ()}], **settings))
    peer = torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")
    trained([theirs], peer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # of updates of about 0.01 each
    assert (ours - randn(*shape, dtype=torch.float32)).abs().mean() > 0.005


def test_the_rest_is_adamw_to_the_digit():
    ours, theirs = (
        [torch.nn.Parameter(randn(4, 3)), torch.nn.Parameter(randn(7))] for _ in range(2)
    )
    settings = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    trained(ours, Muon(ours, **settings))
    trained(theirs, torch.optim.AdamW(theirs, **settings))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_parts_of_a_fused_matrix_and_of_a_stack_are_matrices_of_their_own():
    fused = torch.nn.Parameter(randn(10, 4))
    parts = [torch.nn.Parameter(p.clone()) for p in fused.detach().split([3, 7])]
    stack = torch.nn.Parameter(randn(2, 3, 4, seed=1))
    alone = [torch.nn.Parameter(p.clone()) for p in stack.detach()]
    together = Muon([{"params": [fused], "rows": (3, 7)}, {"params": [stack], "rows": ()}])
    apart = Muon([{"params": [*parts, *alone], "rows": ()}])
    for step in range(3):
        fused.grad, stack.grad = randn(10, 4, seed=step), randn(2, 3, 4, seed=50 + step)
        for p, g in zip(parts, fused.grad.split([3, 7]), strict=True):
            p.grad = g.clone()
        for p, g in zip(alone, stack.grad, strict=True):
            p.grad = g.clone()
        together.step()
        apart.step()
    assert_close(fused, torch.cat(parts))
    assert_close(stack, torch.stack(alone))


def test_gradients_are_left_as_they_were():
    p = torch.nn.Parameter(randn(3, 4))
    p.grad = randn(3, 4, seed=1)
    Muon([{"params": [p], "rows": (1, 2)}]).step()
    assert torch.equal(p.grad, randn(3, 4, seed=1))


def test_goes_on_from_its_state_to_the_last_digit():
    def fresh():
        p, q = torch.nn.Parameter(randn(6, 4)), torch.nn.Parameter(randn(5))
        return [p, q], Muon([{"params": [p], "rows": ()}, {"params": [q]}])

    whole, optimizer = fresh()
    trained(whole, optimizer, 2)
    saved = copy.deepcopy(([p.detach() for p in whole], optimizer.state_dict()))
    again, other = fresh()
    with torch.no_grad():
        for p, value in zip(again, saved[0], strict=True):
            p.copy_(value)
    other.load_state_dict(saved[1])
    for a, b in zip(trained(whole, optimizer), trained(again, other), strict=True):
        assert torch.equal(a, b)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(SpecError, match=r"rows: .* shape \(3,\)"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(3))], "rows": ()}])
    with pytest.raises(SpecError, match=r"rows: \(1, 1\) do not add up to the 3"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(3, 2))], "rows": (1, 1)}])
