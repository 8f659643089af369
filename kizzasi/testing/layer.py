"""The exam of a layer: of a topology in a model, or of a mixer by itself in anyone's network."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from kizzasi.models import BlockSpec, ChannelSpec, LayerSpec, MixerSpec, ModelSpec, Tokens
from kizzasi.models.channels import MLPSpec
from kizzasi.models.mixers import AttentionSpec
from kizzasi.testing import mixer as questions
from kizzasi.testing.mixer import Exam, ask
from kizzasi.testing.tolerance import assert_close


def check_layer(*layers: LayerSpec | MixerSpec | ChannelSpec, d_model: int = 16) -> None:
    """Ask a layer everything, alone in a model and among others; some seconds on a CPU.

    Args:
        layers: one, or several that belong together in this order (shared weights, lent keys); or
            one mixer or channel, of which `spec.layer(d_model)` is asked.
        d_model: they must fit it, and be small.

    Raises:
        AssertionError: an answer is wrong; the message begins with the question.
        SpecError: they do not fit d_model.
    """
    if isinstance(layers[0], (MixerSpec, ChannelSpec)):
        (part,) = layers
        return _check_by_itself(part, d_model)  # pyright: ignore[reportArgumentType]
    return _check_in_a_model(exam_of(layers, d_model))  # pyright: ignore[reportArgumentType]


def exam_of(layers: tuple[LayerSpec, ...], d_model: int = 16, device: str = "cpu") -> Exam:
    """The exam of a stack: alone, and with a plain block behind it."""
    block = BlockSpec(AttentionSpec(n_heads=2), MLPSpec())
    plain = ModelSpec(d_model, layers, Tokens(23))
    return Exam(plain, plain.replace(blocks=(*layers, block)), device, {})


def _check_in_a_model(exam: Exam) -> None:
    spec = exam.spec()
    spec.check()
    assert ModelSpec.from_dict(spec.to_dict()) == spec, "its spec loses something"
    ask(questions.the_seed_sets_everything, exam)
    ask(questions.float64_stays_float64, exam)
    ask(questions.rows_are_independent, exam)
    ask(questions.cost_is_measured, exam, 2, 13)
    ask(questions.packed_equals_separate, exam, 9 if spec.causal else None)
    ask(questions.padded_equals_unpadded, exam, (4, 1, 7) if spec.causal else (12,))
    with tempfile.TemporaryDirectory() as folder:
        ask(questions.comes_back_from_files, exam, Path(folder))
    if not spec.causal:
        return ask(questions.reads_later_tokens, exam)
    for question in (questions.is_causal, questions.state_is_a_value):
        ask(question, exam)
    for length in (1, 13):
        ask(questions.steps_equal_one_call, exam, length)
    return ask(questions.splits_equal_one_call, exam, (1, 12, 8))


def _check_by_itself(spec: MixerSpec | ChannelSpec, d_model: int) -> None:
    """Ask `spec.layer(d_model)` what it does in anyone's network: a stream equals the whole,
    padding may be NaN, documents are apart, seeds decide. Raises AssertionError."""
    layer = spec.layer(d_model, seed=1, dtype=torch.float64)
    twin = spec.layer(d_model, seed=1, dtype=torch.float64)
    pairs = zip(layer.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs), "layer: one seed, two initialisations"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, d_model, generator=generator, dtype=torch.float64)
    y = layer(x)
    assert_close(layer.stateful(x).y, y, msg="layer: stateful")
    padded = torch.cat([torch.full_like(x[:, :3], torch.nan), x], 1)
    mask = (torch.arange(12) >= 3).expand(2, -1)
    assert_close(layer.stateful(padded, mask=mask).y[:, 3:], y, msg="layer: padding")
    ids = torch.tensor([[4] * 5 + [6] * 4] * 2)
    apart = torch.cat([layer(x[:, :5]), layer(x[:, 5:])], 1)
    assert_close(layer.stateful(x, segment_ids=ids).y, apart, msg="layer: documents")
    if not spec.causal:
        return
    out = layer.stateful(x[:, :4])
    rows, state = [out.y], out.state
    for t in range(4, 9):
        out = layer.stateful(x[:, t], state)
        rows, state = [*rows, out.y[:, None]], out.state
    assert_close(torch.cat(rows, 1), y, msg="layer: a stream")
