"""Ready-made tasks: windows, splits, scores and baselines by hand; what does not fit is refused."""

import math
import wave

import numpy as np
import pytest
import torch

from kizzasi.errors import DataError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model
from kizzasi.models.mixers import MambaSpec
from kizzasi.models.model import ModelOutput
from kizzasi.testing import check_task
from kizzasi.train import Frames, Labels, SyntheticTask, TokenIds, load_corpus, open_task
from kizzasi.train.synthetic import Compression, Parity
from kizzasi.train.task import Shape

SHAPE = Shape(16, 4)


def waves(n: int = 600, c: int = 2) -> np.ndarray:
    t = np.arange(n)[:, None]
    noise = np.random.default_rng(0).normal(0, 0.1, (n, c))
    return 5 + 3 * np.sin(2 * np.pi * t / (12 + 8 * np.arange(c))) + noise


def ids_file(folder, n: int = 4000, high: int = 700, name: str = "ids.npy"):
    ids = np.random.default_rng(1).integers(0, high, n).astype(np.uint16)
    np.save(folder / name, ids)
    return folder / name, ids


def labelled(n: int = 120):
    rng = np.random.default_rng(2)
    y = rng.integers(0, 3, n)
    x = rng.integers(0, 9, (n, 12))
    x[:, 10] = y  # the last id but one is the class
    return x, y


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "text").write_bytes(b"".join(b"%d " % (i * i) for i in range(2000)))
    return [
        load_corpus(tmp_path / "text", test_fraction=0.1),
        TokenIds.open(ids_file(tmp_path)[0]),
        Frames.of("waves", waves(), horizon=3),
        Labels.of("labels", *labelled()),
    ]


def test_every_ready_made_task_passes_the_exam(tasks):
    for task in tasks:
        check_task(task, SHAPE)
    check_task(SyntheticTask(Parity(seq_len=16), n_held_out=32), SHAPE)
    check_task(Compression(4, SHAPE.seq_len - 1, n_held_out=32), SHAPE)


def said(logits):
    """A model that always says the same."""
    return lambda inputs: ModelOutput(logits(inputs), None, {})


def test_ids_are_cut_in_order_and_scored_by_hand(tmp_path):
    path, ids = ids_file(tmp_path)
    task = TokenIds.open(path, vocab_size=1000, valid_fraction=0.2, test_fraction=0.1)
    assert task.stem == Tokens(1000)
    assert task.facts()["n_train"] == 2800
    batch = next(iter(task.batches("train", 0, 5, SHAPE)))
    text, rows = ids[:2800].tobytes(), batch.inputs.numpy().astype(np.uint16)
    assert all(row.tobytes() in text for row in rows)
    assert batch.targets[:, :-1].equal(batch.inputs[:, 1:])
    uniform = said(lambda x: torch.zeros(*x.shape, 1000))
    assert task.score(uniform, "valid", SHAPE).mean(task.metric) == pytest.approx(math.log2(1000))
    counts = np.bincount(ids[:2800], minlength=1000)
    p = (counts + 0.5) / (2800 + 500)
    assert task.baselines()["unigram"] == pytest.approx(-np.log2(p[ids[2800:3600]]).mean())
    ids.astype("<u4").tofile(tmp_path / "ids.bin")
    plain = TokenIds.open(tmp_path / "ids.bin", dtype="uint32", vocab_size=1000)
    assert next(iter(plain.batches("test", 1, 2, SHAPE))).inputs.max() < 1000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: TokenIds.open(ids_file(f)[0], vocab_size=9), "vocabulary has 9; give"),
        (lambda f: TokenIds.open(f / "none.npy"), "not a file of ids"),
        (lambda f: TokenIds.open(ids_file(f)[0], valid_fraction=0), "leave nothing"),
        (lambda f: Frames.of("x", np.full((50, 2), np.nan)), "expected finite numbers"),
        (lambda f: Frames.of("x", waves(), horizon=0), "horizon 0 must be above 0"),
        (lambda f: Labels.of("x", np.zeros((20, 3)), np.zeros(20, int)), r"expected ids \(n, t\)"),
        (lambda f: Labels.of("x", *(a[:5] for a in labelled())), "give at least 10"),
        (lambda f: Frames.open(f / "none.csv"), "cannot read frames"),
        (lambda f: open_task(f / "picture.png"), "a .png file is no text"),
    ],
)
def test_data_that_make_no_sense_are_refused(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        make(tmp_path)


def test_too_short_or_another_stem_is_refused(tasks):
    for task in tasks[1:]:
        with pytest.raises(SpecError, match="stem: "):
            task.check(SHAPE, Signal(7, 7))
    for task in tasks[1:3]:
        with pytest.raises(DataError, match=r"needs? "):
            task.check(Shape(5000, 1), task.stem)


def test_a_signal_is_normalised_on_train_only_and_forecast_h_ahead():
    raw = waves(1000)
    raw[900:] += 100.0  # test
    task = Frames.of("x", raw, horizon=3)
    assert task.values[:800].mean(0).abs().max() < 1e-5
    assert task.values[:800].std(0, correction=0).sub(1).abs().max() < 1e-4
    assert Frames.of("x", waves(1000), horizon=3).values[:900].equal(task.values[:900])
    batch = next(iter(task.batches("valid", 0, 0, SHAPE)))
    assert batch.targets[:, :-3].equal(batch.inputs[:, 3:])
    zeros = said(lambda x: torch.zeros(len(x), x.shape[1], 2))
    first = range(800, 900 - 16 - 3 + 1, 16)
    truth = torch.stack([task.values[i + 3 : i + 19] for i in first])
    assert task.score(zeros, "valid", SHAPE).mean(task.metric) == pytest.approx(
        truth.square().mean().item()
    )


def test_baselines_of_a_signal_by_hand():
    t = np.arange(1000)
    task = Frames.of("sine", np.sin(2 * np.pi * t / 25), horizon=2, error="MAE")
    found = task.baselines()
    x = task.values[:, 0].double().numpy()
    assert found["persistence"] == pytest.approx(np.abs(x[800:898] - x[802:900]).mean())
    assert found["seasonal"] < 1e-5  # the period is found
    assert found["linear AR"] < 1e-5  # a sine follows from two frames
    root = Frames.of("sine", np.sin(t), error="NRMSE")
    squared = Frames.of("sine", np.sin(t))
    assert root.baselines()["persistence"] == pytest.approx(
        math.sqrt(squared.baselines()["persistence"])
    )


def test_the_linear_baseline_is_least_squares_on_train_alone():
    rng = np.random.default_rng(0)
    raw, h = rng.normal(size=(200, 2)).cumsum(0), 3
    task = Frames.of("walks", raw, horizon=h)
    x = task.values.double().numpy()
    rows = [(*(x[t - k] for k in range(8)), [1.0]) for t in range(199)]  # 8 frames and a constant
    seen = np.stack([np.concatenate(row) for row in rows])
    inside = np.arange(7, 160 - h)  # what is seen and what is to be said are both in train
    weights = np.linalg.lstsq(seen[inside], x[inside + h], rcond=None)[0]
    now = np.arange(160, 180 - h)
    off = seen[now] @ weights - x[now + h]
    assert task.baselines()["linear AR"] == pytest.approx(np.square(off).mean(), rel=1e-6)


def test_the_period_is_no_shorter_than_two_frames_and_a_third_of_train_at_most():
    def wave(period, n=100):
        return Frames.of("w", np.sin(2 * np.pi * np.arange(n) / period), error="MAE")

    for period in (2.5, 5, 26):  # 80 frames of train; a period of 2.5 comes back every 5
        assert wave(period).baselines()["seasonal"] < (1e-5 if period != 26 else 2e-2), period
    assert wave(40).baselines()["seasonal"] > 0.1  # as long as half of it


def test_files_of_frames(tmp_path):
    rows = waves(50)
    head = "time,a,b\n" + "".join(f"day {i},{a},{b}\n" for i, (a, b) in enumerate(rows))
    (tmp_path / "x.csv").write_text(head)
    task = open_task(tmp_path / "x.csv")
    assert task.columns == ("a", "b")
    assert task.facts()["left_out"] == ["time: no numbers"]
    np.save(tmp_path / "x.npy", rows)
    assert torch.allclose(open_task(tmp_path / "x.npy").values, task.values, atol=1e-5)
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((rows * 1000).astype("<i2").tobytes())
    assert torch.allclose(open_task(tmp_path / "x.wav").values, task.values, atol=1e-2)
    (tmp_path / "gap.csv").write_text("1,2\n3,\n5,6\n")
    assert open_task(tmp_path / "gap.csv").columns == ("column 0",)


def test_what_a_file_is(tmp_path):
    assert isinstance(open_task(ids_file(tmp_path)[0]), TokenIds)
    x, y = labelled()
    np.savez(tmp_path / "x.npz", x=x, y=y)
    assert isinstance(open_task(tmp_path / "x.npz"), Labels)
    np.savez(tmp_path / "y.npz", x=x)
    with pytest.raises(DataError, match="with arrays x and y"):
        open_task(tmp_path / "y.npz")


def test_labels_are_scored_by_hand_and_must_be_read_from_the_sequence():
    x, y = labelled(300)
    task = Labels.of("labels", x, y)
    assert task.stem == Tokens(9)
    right = said(lambda inputs: torch.nn.functional.one_hot(inputs[:, 10:11], 9) * 9.0)
    assert task.score(right, "valid", SHAPE).mean(task.metric) == 1.0
    share = np.bincount(y).max() / len(y)
    assert task.baselines()["majority"] == pytest.approx(share, abs=0.2)
    nats = Labels.of("labels", x, y, measure="NLL")
    guess = said(lambda inputs: torch.zeros(len(inputs), 12, 9))
    assert nats.score(guess, "test", SHAPE).mean(nats.metric) == pytest.approx(math.log(3))
    assert 0.5 < nats.baselines()["logistic on bags"] < math.log(3) + 0.1
    frames = np.random.default_rng(0).normal(size=(40, 6, 2))
    assert Labels.of("f", frames, np.arange(40) % 4).stem == Signal(2, 4)


def test_the_regression_on_bags_is_the_one_that_is_described():
    """Fitted anew by Newton's steps: cross entropy, 1e-4 of all squares, one bias a class."""
    nats = Labels.of("labels", *labelled(200), measure="NLL")  # which shuffles them
    counts = torch.nn.functional.one_hot(nats.inputs, 9).double().mean(1)
    n, d, truth = 160, 10, nats.classes
    bags = torch.cat([counts, torch.ones(len(counts), 1, dtype=torch.float64)], 1)
    bags_in, right = bags[:n], torch.nn.functional.one_hot(truth[:n], 3).double()
    w = torch.zeros(d, 3, dtype=torch.float64)
    for _ in range(30):
        p = (bags_in @ w).softmax(-1)
        gradient = bags_in.T @ (p - right) / n + 2e-4 * w
        each = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        curvature = torch.einsum("nd,ne,nij->diej", bags_in, bags_in, each) / n
        curvature = curvature.reshape(3 * d, 3 * d) + 2e-4 * torch.eye(3 * d)
        w = w - torch.linalg.solve(curvature, gradient.flatten()).view(d, 3)
    valid = slice(n, n + 20)
    expected = torch.nn.functional.cross_entropy(bags[valid] @ w, truth[valid]).item()
    assert nats.baselines()["logistic on bags"] == pytest.approx(expected, abs=2e-5)


def test_a_model_learns_every_task(tasks):
    from kizzasi.train import Recipe, Training

    for task in tasks[2:]:
        spec = ModelSpec(16, (BlockSpec(MambaSpec(d_state=8)),) * 2, task.stem)
        training = Training(build_model(spec), task, Recipe(60 * 12 * 16, 16, 12, lr=1e-2))
        before = training.score()
        assert training.run(60 * 12 * 16) is None
        assert task.metric.sign * (training.score() - before) < -0.1, task.name


def test_a_stem_with_more_ids_than_the_data_has_not_diverged_before_it_began(tmp_path):
    """The loss of a fresh model is about log(ids of its stem), not of the data."""
    from kizzasi.train import Recipe, Training

    task = TokenIds.open(ids_file(tmp_path, high=4)[0])
    spec = ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Tokens(5000))
    training = Training(build_model(spec), task, Recipe(640, 16, 4, lr=1e-6))
    assert task.ceiling < math.log(5000) - 1
    assert training.run(640) is None
    assert task.ceiling < training.curve[0][1] * math.log(2)
