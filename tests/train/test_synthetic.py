"""Synthetic tasks: a solver that sees only the prefix answers all, and nothing else leaks."""

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kizzasi.errors import SpecError
from kizzasi.models import ModelOutput, Tokens
from kizzasi.train.synthetic import (
    MQAR,
    TASKS,
    Compression,
    Examples,
    GroupProducts,
    HiddenPlace,
    InContextRecall,
    InductionHeads,
    Memorization,
    ModularArithmetic,
    Parity,
    Reverse,
    SelectiveCopying,
)
from kizzasi.train.synthetic.tracking import multiplication
from kizzasi.train.task import IGNORE, Shape


def solve_selective_copying(task: SelectiveCopying, prefix: list[int]) -> int:
    marker = task.vocab_size - 1
    data = [token for token in prefix if token not in (0, marker)]
    return data[prefix.count(marker) - 1]


def solve_induction_heads(_task: InductionHeads, prefix: list[int]) -> int:
    return prefix[prefix.index(prefix[-1]) + 1]


def solve_mqar(task: MQAR, prefix: list[int]) -> int:
    pairs = prefix[: 2 * task.n_kv_pairs]
    return dict(zip(pairs[::2], pairs[1::2], strict=True))[prefix[-1]]


def solve_parity(_task: Parity, prefix: list[int]) -> int:
    return sum(prefix) % 2


def solve_reverse(_task: Reverse, prefix: list[int]) -> int:
    comma = prefix.index(10)
    number, written = prefix[:comma], prefix[comma + 1 :]
    return [*reversed(number), 11][len(written)]


def solve_in_context_recall(task: InContextRecall, prefix: list[int]) -> int:
    m = task.motif
    tokens = [token for token in prefix if token < 2 * task.n_keys]
    pairs = [tuple(tokens[i : i + 2 * m]) for i in range(0, len(tokens), 2 * m)]
    *before, last = pairs
    value = next(pair[m:] for pair in before if pair[:m] == last[:m])
    return value[len(last) - m]


def solve_memorization(task: Memorization, prefix: list[int]) -> int:
    order = torch.randperm(task.n_keys, generator=torch.Generator().manual_seed(task.dictionary))
    return task.n_keys + int(order[prefix[-2]])


def solve_modular_arithmetic(task: ModularArithmetic, prefix: list[int]) -> int:
    text = f"{'(' * len(prefix)}{prefix[0]})"
    for sign, digit in zip(prefix[1::2], prefix[2::2], strict=True):
        text += f"{'+-*'[sign - task.modulus]}{digit})"
    return eval(text + ")" * (text.count("(") - text.count(")"))) % task.modulus


def solve_group_products(task: GroupProducts, prefix: list[int]) -> int:
    if task.group == "Z60":
        return sum(prefix) % 60
    things = {"S3": 3, "A4": 4, "A5": 5, "S5": 5}[task.group]
    even = [
        p
        for p in permutations(range(things))
        if task.group[0] == "S" or round(float(torch.linalg.det(torch.eye(things)[list(p)]))) == 1
    ]
    product = torch.eye(things)
    for element in prefix:  # as matrices, first the first
        product = product @ torch.eye(things)[list(even[element])]
    return even.index(tuple(product.argmax(1).tolist()))


SOLVERS = {
    "reverse": solve_reverse,
    "in_context_recall": solve_in_context_recall,
    "memorization": solve_memorization,
    "modular_arithmetic": solve_modular_arithmetic,
    "group_products": solve_group_products,
    "selective_copying": solve_selective_copying,
    "induction_heads": solve_induction_heads,
    "mqar": solve_mqar,
    "parity": solve_parity,
}
N_SCORED = {
    "selective_copying": 16,
    "induction_heads": 1,
    "mqar": 4,
    "parity": 38,
    "memorization": 16,
    "modular_arithmetic": 20,
    "group_products": 19,
}
# The most frequent answer, where it is more frequent than chance: products are often 0.
MOST_FREQUENT = {"modular_arithmetic": 3 / 11}


def assert_solvable_from_the_prefix(name: str, task: Examples, batch_size: int, seed: int) -> None:
    inputs, targets, loss_mask = task.sample(batch_size, seed)
    assert inputs.dtype == targets.dtype == torch.long
    assert loss_mask.dtype == torch.bool
    assert inputs.shape == targets.shape == loss_mask.shape
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < task.vocab_size
    for row, column in loss_mask.nonzero().tolist():
        prefix = inputs[row, : column + 1].tolist()
        assert SOLVERS[name](task, prefix) == targets[row, column]  # type: ignore[operator]
    assert (targets[~loss_mask] == IGNORE).all()


def test_the_usual_settings_are_those_of_the_pages():
    """Their places, too: what is not given is exactly this."""
    usual = {
        SelectiveCopying: (16, 256, 16),
        Reverse: (20,),
        HiddenPlace: (26, 64, 8, 1 / 16),
        InductionHeads: (16, 256),
        MQAR: (256, 64, 4, 0.01, False),
        InContextRecall: (8, 128, 0.0, 16, 1),
        Memorization: (128, 32, 0),
        Parity: (40, 3),
        ModularArithmetic: (41, 5),
        GroupProducts: ("A5", 20),
    }
    for kind, settings_ in usual.items():
        assert kind() == kind(*settings_), kind


@pytest.mark.parametrize("name", TASKS)
def test_solver_that_sees_the_prefix_is_always_right(name):
    task = TASKS[name]()
    assert_solvable_from_the_prefix(name, task, batch_size=32, seed=5)
    if name in N_SCORED:
        assert task.sample(32, 5).loss_mask.sum(1).tolist() == [N_SCORED[name]] * 32


@given(data=st.data(), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=80, deadline=None)
def test_every_valid_setting_is_solvable(data, seed):
    n = data.draw(st.integers(1, 5))
    more = data.draw(st.integers(0, 9))
    tasks = {
        "selective_copying": SelectiveCopying(3 + more, 2 * n + more, n),
        "induction_heads": InductionHeads(3 + n, 3 + more),
        "mqar": MQAR(2 * n + 2 + 2 * more, 4 * n + 2 * more, n, random_non_queries=more > 4),
        "parity": Parity(n + more, n),
        "reverse": Reverse(n),
        "in_context_recall": InContextRecall(
            2 + more, (4 + more) * n, noise=0.3 * (more % 3), n_noise=n, motif=n
        ),
        "memorization": Memorization(2 + more, 2 * n, dictionary=more),
        "modular_arithmetic": ModularArithmetic(2 * n + 1, 2 + more),
        "group_products": GroupProducts(("S3", "A4", "A5", "S5", "Z60")[n - 1], 2 + more),
    }
    for name, task in tasks.items():
        assert_solvable_from_the_prefix(name, task, batch_size=3, seed=seed)


@pytest.mark.parametrize("name", TASKS)
def test_seed_decides_the_examples(name):
    task = TASKS[name]()
    first, again, other = task.sample(8, 1), task.sample(8, 1), task.sample(8, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.inputs, other.inputs)
    state = torch.get_rng_state()
    task.sample(2, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_what_an_even_guess_scores(name):
    task = TASKS[name]()
    _, targets, loss_mask = task.sample(4000, 0)
    answers = targets[loss_mask]
    counts = torch.bincount(answers, minlength=task.vocab_size) / len(answers)
    assert int((counts > 0).sum()) == round(1 / task.chance)
    most = MOST_FREQUENT.get(name, task.chance)
    assert abs(float(counts.max()) - most) < 0.2 * task.chance + 0.01


def test_selective_copying_scatters_the_data():
    inputs, _, _ = SelectiveCopying().sample(2000, 0)
    filled = ((inputs > 0) & (inputs < 15)).double().mean(0)
    assert (filled[:240] - 16 / 240).abs().max() < 0.03
    assert (inputs[:, 240:] == 15).all()


def test_induction_trigger_stands_anywhere_but_where_the_answer_would_be_cut():
    inputs, _, _ = InductionHeads(vocab_size=4, seq_len=8).sample(3000, 0)
    triggers = inputs == 3
    assert (triggers.sum(1) == 2).all()
    frequency = triggers.double().mean(0)
    assert (frequency[:6] - 1 / 6).abs().max() < 0.03
    assert frequency[6:].tolist() == [0, 1]


@pytest.mark.parametrize(("power_a", "mean_place"), [(0.01, None), (1.0, 27.0)])
def test_mqar_queries_follow_the_power_law(power_a, mean_place):
    """Mean place of a query: even when power_a is 1, close to the pairs when it is small."""
    task = MQAR(power_a=power_a)
    mask = task.sample(4000, 0).loss_mask
    places = (mask.nonzero()[:, 1] - 8).double()
    assert (places % 2 == 0).all()
    if mean_place is None:
        assert places.mean() < 20
    else:
        assert abs(places.mean() - mean_place) < 0.5


def test_mqar_first_query_place_has_its_exact_probability():
    task = MQAR(n_kv_pairs=1, seq_len=8, vocab_size=8, power_a=0.5)
    mask = task.sample(20_000, 0).loss_mask
    weights = torch.tensor([1.0, 2.0, 3.0]).double() ** -0.5
    assert (mask[:, 2::2].double().mean(0) - weights / weights.sum()).abs().max() < 0.015


def test_mqar_keys_and_values_are_distinct_and_come_from_their_halves():
    inputs, _, _ = MQAR(vocab_size=18, seq_len=32, n_kv_pairs=8).sample(50, 0)
    keys, values = inputs[:, 0:16:2], inputs[:, 1:16:2]
    assert keys.sort(1).values.tolist() == [list(range(1, 9))] * 50
    assert all(len(set(row)) == 8 and min(row) >= 9 for row in values.tolist())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelectiveCopying(vocab_size=2), "vocab_size=2 must be at least 3"),
        (lambda: SelectiveCopying(seq_len=31), "seq_len=31 must be at least 32"),
        (lambda: SelectiveCopying(n_tokens=0), "n_tokens=0"),
        (lambda: InductionHeads(vocab_size=2), "vocab_size=2"),
        (lambda: InductionHeads(seq_len=2), "seq_len=2 must be at least 3"),
        (lambda: MQAR(n_kv_pairs=0), "n_kv_pairs=0"),
        (lambda: MQAR(seq_len=14), "seq_len=14 must be at least 16"),
        (lambda: MQAR(vocab_size=8), "vocab_size=8 must be at least 10"),
        (lambda: MQAR(seq_len=65), "must be even"),
        (lambda: MQAR(power_a=0.0), "power_a=0.0"),
        (lambda: Parity(min_len=0), "min_len=0"),
        (lambda: InContextRecall(noise=1.0), "noise=1.0 must lie"),
        (lambda: Parity(seq_len=2), "seq_len=2 must be at least 3"),
        (lambda: Parity().sample(0, 0), "batch_size=0"),
    ],
)
def test_impossible_settings_say_what_to_change(build, message):
    with pytest.raises(SpecError, match=message):
        build()


def test_groups_are_groups():
    for group, size in {"S3": 6, "A4": 12, "A5": 60, "S5": 120, "Z60": 60}.items():
        table = multiplication(group)
        assert table.shape == (size, size)
        everything = torch.arange(size)
        assert torch.equal(table[0], everything)  # 0 is neutral
        assert torch.equal(table[:, 0], everything)
        for side in (table, table.T):  # every element has an inverse, and nothing is lost
            assert torch.equal(side.sort(1).values, everything.expand(size, size))
        assert torch.equal(table[table], table[:, table])  # (a b) c = a (b c)
        assert torch.equal(table, table.T) == (group == "Z60")


def test_noise_takes_its_share_and_half_of_the_keys_are_asked():
    inputs, _, asked = InContextRecall(noise=0.5).sample(500, 0)
    assert abs((inputs >= 16).double().mean() - 0.5) < 0.02
    assert 0.1 < asked.double().mean() < 0.25  # 1/4 of the positions are keys, 8 of 32 new
    assert not asked[inputs >= 16].any()


def test_a_line_hides_a_place():
    task = HiddenPlace(3, 12, 4, noise=0.0)
    batch = task.sample(64, 1)
    lines, letters = batch.targets[:, 1:], batch.inputs[:, 0]
    assert torch.equal(batch.inputs[:, :2], task.prompt(letters))
    assert (batch.targets[:, 0] == IGNORE).all()
    assert torch.equal(batch.inputs[:, 2:], lines[:, :-1])
    place = task.places(lines, letters)
    assert set(place.tolist()) == set(range(9))
    assert task.bits == pytest.approx(math.log2(9))
    for line, letter, at in zip(lines.tolist(), letters.tolist(), place.tolist(), strict=True):
        assert line == [3] * at + [letter] * 4 + [3] * (8 - at)
    assert task.sound(lines, letters).all()
    lines[:, 0] = (letters + 1) % 3  # a letter that is not that of the prompt
    assert not task.sound(lines, letters).any()


def test_noise_falls_on_any_character():
    task = HiddenPlace()
    batch = task.sample(512, 3)
    lines = batch.targets[:, 1:]
    assert task.sound(lines, batch.inputs[:, 0]).double().mean() > 0.98
    rate = task.noise_of(lines).double().mean(0)
    assert rate.mean().item() == pytest.approx(1 / 16, abs=5e-3)
    assert rate.max() < 0.12
    assert task.bits == pytest.approx(math.log2(57) + 64 * 0.33729, abs=1e-3)
    wrongs: list[Any] = [{"n_equal": 65}, {"noise": 1.0}, {"n_letters": 0}]
    for wrong in wrongs:
        with pytest.raises(SpecError):
            HiddenPlace(**wrong)


def test_compression_is_read_from_the_last_position_alone():
    task, shape = Compression(3, 4, n_held_out=8), Shape(5, 8)
    batch = next(iter(task.batches("train", 1, 0, shape)))
    assert batch.inputs.shape == (8, 5)
    assert torch.equal(batch.inputs[:, :4], batch.targets)
    assert (batch.inputs[:, 4] == 3).all(), "the end"
    assert int(batch.targets.max()) == 2
    assert task.chance == 1 / 3

    def knowing(inputs: torch.Tensor) -> ModelOutput:
        """The first three answers are right, and the last one is not; earlier logits are lies."""
        said = inputs[:, :4] + torch.tensor([0, 0, 0, 1])
        last = torch.nn.functional.one_hot(said % 3, 3).float().flatten(1)
        logits = torch.cat([torch.rand(len(inputs), 4, 12) * 9, 5 * last[:, None]], 1)
        return ModelOutput(logits, (), {})  # type: ignore[arg-type]

    scores = task.score(knowing, "test", shape)
    assert scores.values.tolist() == [0.75] * 8
    loss = task.loss(knowing(batch.inputs), batch)
    right, wrong = (math.log(math.exp(5) + 2) - up for up in (5, 0))
    assert loss.item() == pytest.approx((3 * right + wrong) / 4, rel=1e-5)

    with pytest.raises(SpecError, match="seq_len: 4, but examples of Compression have 5"):
        task.check(Shape(4, 8), task.stem)
    with pytest.raises(SpecError, match="needs Tokens"):
        task.check(shape, Tokens(4))
    with pytest.raises(SpecError, match="n_tokens=1 must be at least 2"):
        Compression(n_tokens=1)
    assert (Compression().vocab_size, Compression().seq_len) == (16, 33)
