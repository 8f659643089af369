"""mLSTM: the op against its loop and the unstabilised formula, the layer against transformers'."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import MLSTMSpec
from kizzasi.models.ops.mlstm import MLSTMMemory, mlstm, mlstm_ref

LENGTHS = (1, 2, 7, 63, 64, 65, 130)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(b, t, h, n, p, gates=3.0):
    q, k, v = draw(b, t, h, n, seed=1), draw(b, t, h, n, seed=2), draw(b, t, h, p, seed=3)
    log_i, log_f = gates * draw(b, t, h, seed=4), F.logsigmoid(gates * draw(b, t, h, seed=5))
    memory = draw(b, h, n, p, seed=6), draw(b, h, n, seed=7), draw(b, h, seed=8)
    return (q, k, v, log_i, log_f), memory


def run(function, streams, memory, starts):
    leaves = [x.clone().requires_grad_() for x in (*streams, *memory)]
    y, after = function(*leaves[:5], MLSTMMemory(*leaves[5:]), starts)
    sum(x.sin().sum() for x in (y, *after)).backward()
    return [y, *after, *(x.grad for x in leaves)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_equal_the_loop(length, packed):
    streams, memory = inputs(2, length, 3, 4, 5)
    starts = draw(2, length) > 1 if packed else None
    fast, slow = (run(f, streams, memory, starts) for f in (mlstm, mlstm_ref))
    for a, b in zip(fast, slow, strict=True):
        assert_close(a, b)


def test_the_loop_is_the_formula_without_the_stabiliser():
    """Equations 19 to 27 of the paper as they stand; the 1e-6 of the layer apart."""
    (q, k, v, log_i, log_f), _ = inputs(1, 12, 1, 3, 4, gates=1.0)
    y, _ = mlstm_ref(q, k, v, log_i, log_f)
    C, n = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(12):
        i, f = log_i[0, t, 0].exp(), log_f[0, t, 0].exp()
        C = f * C + i * torch.outer(k[0, t, 0], v[0, t, 0])
        n = f * n + i * k[0, t, 0]
        expected = q[0, t, 0] @ C / (n @ q[0, t, 0]).abs().clamp(min=1)
        torch.testing.assert_close(y[0, t, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", [-200.0, 200.0])
def test_extreme_gates_give_finite_numbers_and_gradients(gate):
    streams, _ = inputs(1, 70, 1, 3, 4)
    streams = [x.float().requires_grad_() for x in streams[:3]]
    log_i = torch.full((1, 70, 1), gate, requires_grad=True)
    log_f = torch.full((1, 70, 1), -5.0, requires_grad=True)
    for function in (mlstm, mlstm_ref):
        y, _ = function(*streams, log_i, log_f)
        assert y.isfinite().all()
        for g in torch.autograd.grad(y.sum(), [*streams, log_i, log_f]):
            assert g.isfinite().all()


def test_parity_with_transformers_xlstm():
    """Outputs in one call of whole chunks, in float32, with the peer's own weights."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

    config = transformers.xLSTMConfig(
        hidden_size=16, num_heads=2, num_hidden_layers=1, chunk_size=8, mode="train"
    )
    theirs = xLSTMLayer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    ours = MLSTMSpec(n_heads=2).build(LayerContext(16))
    names = {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "ogate_preact": "o_gate",
        "igate_preact": "i_gate",
        "fgate_preact": "f_gate",
        "multihead_norm": "head_norm",
        "out_proj": "out_proj",
    }
    weights = {}
    for name, value in theirs.state_dict().items():
        module, _, leaf = name.rpartition(".")
        weights[f"{names[module]}.{leaf}"] = value
    ours.load_state_dict(weights)
    x = torch.randn(2, 24, 16, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).y, theirs(x)[0], rtol=1e-4, atol=1e-4)


def test_widths_that_are_no_whole_numbers_are_refused():
    with pytest.raises(SpecError, match=r"m\.expand_k: 0\.5 times d_model 12 over 4 heads is 1\.5"):
        MLSTMSpec(n_heads=4).check(12, "m")
