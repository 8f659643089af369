"""The exam of a mixer or channel: what all of ours keep, in float64 under one tolerance.

`check_mixer(spec)` asks everything. Each question is a function of an `Exam`, for tests that want
to ask one at many lengths. A fault is an AssertionError that names the question.
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kizzasi.errors import KizzasiError, ShapeError, SpecError
from kizzasi.models import (
    BlockSpec,
    ChannelSpec,
    MixerSpec,
    ModelSpec,
    ModelState,
    SequenceModel,
    Tokens,
    build_model,
    load,
    load_state,
)
from kizzasi.models.channels import MLPSpec
from kizzasi.models.mixers import AttentionSpec
from kizzasi.models.ops.engines import Engine
from kizzasi.models.state import map_state, named_leaves
from kizzasi.testing.tolerance import assert_close

# The counter knows every attention kernel but the CPU's; it is counted like the others.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    )
}


@dataclass(frozen=True)
class Exam:
    """Small causal or other models on tokens, and where they are asked.

    plain: layers of one kind. hybrid: the same with another kind between them. kept: the models
    that were made, if questions share them; None makes each anew.
    """

    plain: ModelSpec
    hybrid: ModelSpec
    device: str = "cpu"
    kept: dict[Any, SequenceModel] | None = field(default=None, compare=False)
    training: bool | None = None

    @classmethod
    def of(cls, part: MixerSpec | ChannelSpec, d_model: int = 16, device: str = "cpu") -> Exam:
        """The exam of one part: two layers of it, and an attention layer between them."""
        attention, stem = AttentionSpec(n_heads=2), Tokens(23)
        if isinstance(part, MixerSpec):
            block = BlockSpec(part)
        else:
            block = BlockSpec(attention, part)
        between = BlockSpec(attention, MLPSpec())
        plain = ModelSpec(d_model, (block, block), stem)
        return cls(plain, ModelSpec(d_model, (block, between, block), stem), device)

    @property
    def causal(self) -> bool:
        return self.plain.causal

    @property
    def coded(self) -> bool:
        """Whether states hold codes, through which no gradient passes."""
        return any(part.coded for _, part in self.plain.parts())

    @property
    def vocab_size(self) -> int:
        assert isinstance(self.plain.stem, Tokens)
        return self.plain.stem.vocab_size

    def spec(self, *, hybrid: bool = False) -> ModelSpec:
        return self.hybrid if hybrid else self.plain

    def make(
        self,
        *,
        dtype: torch.dtype = torch.float64,
        hybrid: bool = False,
        engine: Engine = "auto",
    ) -> SequenceModel:
        """A model whose every parameter is perturbed: nothing hides behind a zero or a one; where
        `training` does not say it, in evaluation if it encodes what is to come, else in training.
        """
        if self.kept is None:
            return self._make(dtype, hybrid, engine)
        key = dtype, hybrid, engine
        if key not in self.kept:
            self.kept[key] = self._make(*key)
        return self.kept[key]

    def _make(self, dtype: torch.dtype, hybrid: bool, engine: Engine) -> SequenceModel:
        model = copy.deepcopy(_perturbed(self.spec(hybrid=hybrid), engine))
        mode = not model.spec.encodes if self.training is None else self.training
        return model.train(mode).to(device=self.device, dtype=dtype)

    def tokens(self, batch: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocab_size, (batch, length), generator=generator).to(self.device)


@functools.lru_cache(maxsize=512)  # small ones
def _perturbed(spec: ModelSpec, engine: Engine) -> SequenceModel:
    """Made once: many questions ask the same model, each a copy of its own."""
    model = build_model(spec, seed=1, dtype=torch.float64, engine=engine)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_(0.1 * noise.to(p.dtype))
    return model


def check_mixer(spec: MixerSpec | ChannelSpec, *, d_model: int = 16, device: str = "cpu") -> None:
    """Ask a mixer or channel everything; some seconds on a CPU.

    Args:
        spec: yours, registered, and small: it is built at d_model.

    Raises:
        AssertionError: an answer is wrong; the message begins with the question.
        SpecError: the spec does not fit d_model.
    """
    exam = Exam.of(spec, d_model, device)
    exam.spec().check()
    assert ModelSpec.from_dict(exam.spec().to_dict()) == exam.spec(), "its spec loses something"
    questions = [the_seed_sets_everything, rows_are_independent, padding_on_the_right_is_refused]
    questions += [float64_stays_float64]
    if spec.causal:
        questions += [is_causal, state_is_a_value, padding_after_a_state_leaves_it_alone]
    else:
        questions += [reads_later_tokens]
    for question in questions:
        ask(question, exam)
    for length in (1, 2, 7, 33) if spec.causal else ():
        ask(steps_equal_one_call, exam, length)
    for length in (1, 2, 7, 33, 64, 65):
        ask(engines_agree, exam, length)
    for splits in ((8, 8, 5), (1, 20), (20, 1)) if spec.causal else ():
        ask(splits_equal_one_call, exam, splits)
    for cut in (None, 6, 9) if spec.causal else (None,):
        ask(packed_equals_separate, exam, cut)
    for splits in ((12,), (4, 4, 4)) if spec.causal else ((12,),):
        ask(padded_equals_unpadded, exam, splits)
    for batch, length in ((1, 1), (2, 7), (3, 64)):
        ask(cost_is_measured, exam, batch, length)
    with tempfile.TemporaryDirectory() as folder:
        ask(comes_back_from_files, exam, Path(folder))


def ask(question: Callable[..., None], exam: Exam, *about: object) -> None:
    what = f"{question.__name__}{about or ''}"
    try:
        question(exam, *about)
    except (AssertionError, RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        reason = str(error) or "no"
        raise AssertionError(f"{what.replace('_', ' ')}: {reason}") from error


@contextmanager
def refuses(kind: type[KizzasiError], pattern: str) -> Iterator[None]:
    """Raise AssertionError unless the block raises an error of that kind that says so."""
    try:
        yield
    except kind as error:
        said = str(error)
    else:
        raise AssertionError(f"not refused: {pattern}")
    assert re.search(pattern, said), f"refused, but for {said}"


def fold(
    model: SequenceModel, inputs: Tensor, state: ModelState | None = None
) -> tuple[Tensor, ModelState]:
    """Logits of every position by the recurrent form alone, and the last state."""
    state = model.init_state(len(inputs)) if state is None else state
    logits = []
    for t in range(inputs.shape[1]):
        out = model.step(inputs[:, t], state)
        logits.append(out.logits)
        state = out.state
    return torch.stack(logits, 1), state


def assert_same_state(actual: ModelState, expected: ModelState) -> None:
    for (name, a), (_, b) in zip(named_leaves(actual), named_leaves(expected), strict=True):
        assert a.dtype == b.dtype, name
        assert_close(
            torch.view_as_real(a) if a.is_complex() else a.double(),
            torch.view_as_real(b) if b.is_complex() else b.double(),
            dtype=torch.float64,
            msg=name,
        )


def gradients(model: SequenceModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def steps_equal_one_call(exam: Exam, length: int) -> None:
    """The recurrent form, token by token, equals the parallel one."""
    model, x = exam.make(), exam.tokens(2, length)
    with torch.no_grad():
        out = model(x)
        logits, state = fold(model, x)
        assert_close(out.logits, logits)
        again, _ = fold(model, exam.tokens(2, 3, 5), state)
        assert_close(model(exam.tokens(2, 3, 5), out.state).logits, again)


def engines_agree(exam: Exam, length: int) -> None:
    """The fast engine equals the defining loop: outputs, states, gradients."""
    x = exam.tokens(2, length)
    fast = exam.make(engine="torch")
    slow = exam.make(engine="reference")
    a, b = fast(x), slow(x)
    assert_close(a.logits, b.logits)
    assert_same_state(a.state, b.state)
    weights = torch.linspace(-1, 1, a.logits.numel(), dtype=torch.float64, device=exam.device)
    ga = gradients(fast, (a.logits.flatten() * weights).sum() + sum(a.aux.values()))
    gb = gradients(slow, (b.logits.flatten() * weights).sum() + sum(b.aux.values()))
    assert ga.keys() == gb.keys() == dict(fast.named_parameters()).keys()
    for key in ga:
        assert_close(ga[key], gb[key], msg=key)


def splits_equal_one_call(exam: Exam, splits: Sequence[int]) -> None:
    """A sequence in pieces, the state carried, equals one call; gradients too, unless the state
    holds codes."""
    model, x = exam.make(hybrid=True), exam.tokens(2, 21)
    whole = model(x)
    weights = torch.linspace(-1, 1, whole.logits.numel(), dtype=torch.float64, device=exam.device)
    expected = gradients(model, (whole.logits.flatten() * weights).sum())
    state, parts = None, []
    for piece in x.split(list(splits), dim=1):
        out = model(piece, state)
        state = out.state
        parts.append(out.logits)
    assert state is not None
    joined = torch.cat(parts, 1)
    assert_close(joined, whole.logits)
    assert_same_state(state, whole.state)
    if exam.coded:
        return
    actual = gradients(model, (joined.flatten() * weights).sum())
    for key in expected:
        assert_close(actual[key], expected[key], msg=key)


def is_causal(exam: Exam) -> None:
    """No output depends on a later token, and each on its own."""
    model, x = exam.make(), exam.tokens(1, 20)
    before = model(x).logits
    for t in (1, 9, 19):
        other = x.clone()
        other[:, t:] = (other[:, t:] + 1) % exam.vocab_size
        after = model(other).logits
        assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


def reads_later_tokens(exam: Exam) -> None:
    """What says that it is not causal is not, and refuses a state."""
    model, x = exam.make(), exam.tokens(1, 20)
    out, other = model(x), x.clone()
    other[:, -1] = (other[:, -1] + 1) % exam.vocab_size
    moved = (model(other).logits - out.logits).abs().amax(-1)
    assert moved.gt(1e-9).all()
    for refused in (
        lambda: model(x, out.state),
        lambda: model.step(x[:, 0], model.init_state(1)),
        lambda: model.generate(x, 1),
    ):
        with refuses(SpecError, r"blocks\[0\].*depend on later tokens"):
            refused()


def rows_are_independent(exam: Exam) -> None:
    """Every row equals its single run; states can be gathered."""
    model, x = exam.make(), exam.tokens(3, 17)
    whole = model(x)
    for row in range(3):
        assert_close(model(x[row : row + 1]).logits[0], whole.logits[row])
    if not exam.causal:
        return
    order = torch.tensor([2, 0, 0], device=exam.device)
    forked = model(x[order, :4], whole.state.gather(order)).logits
    for i, row in enumerate(order.tolist()):
        alone = model(x[row : row + 1]).state
        assert_close(model(x[row : row + 1, :4], alone).logits[0], forked[i])


def packed_equals_separate(exam: Exam, cut: int | None) -> None:
    """Documents in one row equal documents by themselves; cut: where a state carries."""
    if cut is not None and not exam.causal:
        return
    model = exam.make(hybrid=True)
    documents = [exam.tokens(1, n, n) for n in (6, 1, 11, 3)]
    packed = torch.cat(documents, 1)
    ids = torch.cat([torch.full_like(d, 7 - i) for i, d in enumerate(documents)], 1)
    if cut is None:
        logits = model(packed, segment_ids=ids).logits
        state = model(packed, segment_ids=ids).state
    else:
        first = model(packed[:, :cut], segment_ids=ids[:, :cut])
        second = model(packed[:, cut:], first.state, segment_ids=ids[:, cut:])
        logits, state = torch.cat([first.logits, second.logits], 1), second.state
    separate = [model(d) for d in documents]
    assert_close(logits, torch.cat([out.logits for out in separate], 1))
    if not exam.causal:
        return
    more = exam.tokens(1, 4, 9)
    assert_close(model(more, state).logits, model(more, separate[-1].state).logits)
    assert_close(fold(model, more, state)[0], fold(model, more, separate[-1].state)[0])


def padded_equals_unpadded(exam: Exam, splits: Sequence[int]) -> None:
    """Padding on the left changes nothing, in pieces or at once."""
    if len(splits) > 1 and not exam.causal:
        return
    model = exam.make(hybrid=True)
    rows = [exam.tokens(1, n, n) for n in (12, 5, 1)]
    x = torch.cat([torch.cat([exam.tokens(1, 12 - r.shape[1], 3), r], 1) for r in rows])
    first = torch.tensor([[0], [7], [11]], device=exam.device)
    mask = torch.arange(12, device=exam.device) >= first
    state, parts, start = None, [], 0
    for n in splits:
        out = model(x[:, start : start + n], state, mask=mask[:, start : start + n])
        state, start = out.state, start + n
        parts.append(out.logits)
    logits = torch.cat(parts, 1)
    for i, row in enumerate(rows):
        assert_close(logits[i, 12 - row.shape[1] :], model(row).logits[0])
    if exam.causal:
        more = exam.tokens(1, 3, 8)
        continued, _ = fold(model, more.expand(3, -1), state)
        for i, row in enumerate(rows):
            assert_close(continued[i], model(more, model(row).state).logits[0])
    gradients(model, logits[mask].sum())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def padding_on_the_right_is_refused(exam: Exam) -> None:
    """Padding after a token has no meaning."""
    model, x = exam.make(), exam.tokens(2, 4)
    with refuses(ShapeError, "row 1 has padding after a real token"):
        model(x, mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    if not exam.causal:
        return
    with refuses(ShapeError, "row 0 has padding after a real token"):
        model(x, model(x).state, mask=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]))


def padding_after_a_state_leaves_it_alone(exam: Exam) -> None:
    """Turns of unequal length: a row goes on from its state as if nothing had been padded."""
    model, first, turn = exam.make(hybrid=True), exam.tokens(3, 5), exam.tokens(3, 4, 1)
    out = model(turn, model(first).state, mask=torch.arange(4) >= torch.tensor([[0], [3], [4]]))
    after = [model(first[i : i + 1]).state for i in range(3)]
    for i, n in enumerate((4, 1)):
        alone = model(turn[i : i + 1, 4 - n :], after[i])
        assert_close(out.logits[i : i + 1, 4 - n :], alone.logits)
        after[i] = alone.state
    more = exam.tokens(3, 2, 2)
    continued, _ = fold(model, more, out.state)
    for i in range(3):
        assert_close(continued[i : i + 1], model(more[i : i + 1], after[i]).logits)


def state_is_a_value(exam: Exam) -> None:
    """Nobody writes into a state, and gradients flow into it, unless it holds codes."""
    model, x = exam.make(), exam.tokens(2, 9)
    fixed = all(layer.fixed_work for layer in exam.spec().blocks)
    state = model(x).state.detach()
    copy = map_state(torch.clone, state)
    first = fold(model, x, state)[0]
    parallel = model(x, state).logits
    assert_same_state(state, copy)
    assert_close(fold(model, x, state)[0], first)
    if exam.coded:
        return
    live = map_state(
        lambda t: t.requires_grad_() if t.is_floating_point() or t.is_complex() else t, copy
    )
    model(x[:, :2], live).logits.sum().backward()
    from_forward = [t.grad for _, t in named_leaves(live) if t.requires_grad]
    again = map_state(lambda t: t.detach().clone().requires_grad_() if t.requires_grad else t, live)
    fold(model, x[:, :2], again)[0].sum().backward()
    for a, (leaf_name, t) in zip(
        from_forward, [(n, t) for n, t in named_leaves(again) if t.requires_grad], strict=True
    ):
        if a is None and t.grad is None and not fixed:
            continue  # neither of the two tokens was routed there
        assert a is not None, leaf_name
        assert t.grad is not None, leaf_name
        assert_close(
            torch.view_as_real(a) if a.is_complex() else a,
            torch.view_as_real(t.grad) if a.is_complex() else t.grad,
            msg=leaf_name,
        )
    assert_close(model(x, copy).logits, parallel)


def comes_back_from_files(exam: Exam, folder: Path) -> None:
    """Saved and loaded, weights and state give the same logits."""
    model, x = exam.make(dtype=torch.float32), exam.tokens(2, 9)
    out = model(x)
    model.save_pretrained(folder / "model")
    out.state.save(folder / "state.safetensors")
    again = load(folder / "model")
    assert again.spec == model.spec
    assert torch.equal(again(x).logits, out.logits)
    if not exam.causal:
        return
    state = load_state(folder / "state.safetensors", again.init_state(1))
    assert torch.equal(again(x, state).logits, model(x, out.state).logits)


def cost_is_measured(exam: Exam, batch: int, length: int) -> None:
    """Parameters, flops and bytes of state are what `cost` says; parameters alone, where the tokens
    decide how much is done.
    """
    spec = exam.spec(hybrid=True)
    cost = spec.cost(length, batch)
    meta = build_model(spec, device="meta")
    assert cost.params == sum(p.numel() for p in meta.parameters())
    if not all(layer.fixed_work for layer in spec.blocks):
        return
    model = build_model(spec).train(not spec.encodes)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        out = model(exam.tokens(batch, length))
    assert cost.flops == counter.get_total_flops()
    assert cost.state_bytes == out.state.nbytes


def the_seed_sets_everything(exam: Exam) -> None:
    """`reset_parameters` sets every parameter and buffer, from the seed alone."""
    spec = exam.spec(hybrid=True)
    before = torch.get_rng_state()
    a, b, c = (build_model(spec, seed=s).train(not spec.encodes) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for tensor in (*a.parameters(), *a.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    a.reset_parameters(0)
    for (key, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), key
    x = exam.tokens(2, 9)
    assert torch.equal(a(x).logits, b(x).logits)
    assert not torch.equal(a(x).logits, c(x).logits)
    assert a(x).logits.std() < 10


def float64_stays_float64(exam: Exam) -> None:
    """Nothing is rounded on the way."""
    model = exam.make()
    out = model(exam.tokens(2, 5))
    assert out.logits.dtype == torch.float64
    wide = (torch.float64, torch.complex128)
    for key, leaf in named_leaves(out.state):
        assert leaf.dtype in wide or not (leaf.is_floating_point() or leaf.is_complex()), key
