"""scripts/reproduce.py trains, chooses, tests and prints every row of a table."""

import csv
import gzip
import io
import json
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import free_transformer  # pyright: ignore[reportMissingImports]
import reproduce  # pyright: ignore[reportMissingImports]
from reproductions import TABLES, data  # pyright: ignore[reportMissingImports]
from reproductions.printed import printed, published  # pyright: ignore[reportMissingImports]
from reproductions.synthetic import asked  # pyright: ignore[reportMissingImports]

from kizzasi.errors import DataError
from kizzasi.train import load_corpus
from kizzasi.train.synthetic import Parity

SYNTHETIC = [name for name, table in TABLES.items() if table.published]


def small_parity(names=("mamba2", "slstm"), **options):
    rows = tuple(row for row in TABLES["parity"].rows if row.name in names)
    sizes = {"d_model": 16, "n_layers": 1, "rates": (2e-2,), **options}
    return asked("a paper", Parity(4), {"5": Parity(5, 5)}, rows, **sizes)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_every_synthetic_table_can_be_built_small_and_as_published(name):
    for table in (TABLES[name], published(TABLES[name])):
        task = table.problem(None).task
        for row in table.rows:
            table.spec(row, task).check()
        assert str(table.d_model) in table.setting()


def test_a_table_tells_who_solves_the_task(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(TABLES, "parity", small_parity())
    files = [str(tmp_path / name) for name in ("x.json", "x.svg")]
    reproduce.main(
        ["parity", "--seeds", "1", "--steps", "120", "--json", files[0], "--plot", files[1]]
    )
    found = {row["name"]: row for row in json.loads(Path(files[0]).read_text())["rows"]}
    assert list(found) == ["mamba2", "slstm"]
    assert found["mamba2"]["scores"][0][0] > 0.95
    assert len(found["slstm"]["scores"][0]) == 2
    text = capsys.readouterr().out
    assert text.count("\n| ") == 4
    assert "120 steps of 32" in text
    drawn = ElementTree.parse(files[1]).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert len(list(drawn.iter(f"{space}path"))) > 4
    assert "slstm: 5" in "".join(drawn.itertext())


def test_seed_0_chooses_the_rate_and_a_solved_task_tries_no_more(monkeypatch):
    tried = []

    def stand_in(table, problem, row, rate, seed, advance):
        tried.append((row.name, rate, seed))
        score = {"mamba2": {1.0: 0.4, 2.0: 0.6, 3.0: 0.5}, "slstm": {1.0: 0.9995}}
        return reproduce.run.__globals__["Outcome"](score[row.name][rate], [0.1, None])

    monkeypatch.setitem(reproduce.run.__globals__, "train", stand_in)
    table = small_parity(rates=(1.0, 2.0, 3.0))
    problem = table.problem(None)
    rows = reproduce.run(table, problem, 2, print)
    assert tried[:4] == [("mamba2", rate, 0) for rate in (1.0, 2.0, 3.0)] + [("mamba2", 2.0, 1)]
    assert tried[4:] == [("slstm", 1.0, 0), ("slstm", 1.0, 1)]
    assert [row["rate"] for row in rows] == [2.0, 1.0]
    text = printed(table, problem, rows)
    assert "| diverged 2 of 2 times | 2 |" in text
    assert "| 10.0 (10.0 to 10.0) |" in text

    tried.clear()
    rows = reproduce.run(replace(table, by_rate=True), problem, 2, print)
    assert tried[:2] == [("mamba2", 1.0, 0), ("mamba2", 1.0, 1)]
    text = printed(replace(table, by_rate=True), problem, rows)
    assert "| rate 1 | rate 2 | rate 3 | lr |" in text
    assert "| not tried | not tried | 1 |" in text


def test_the_rows_of_mup_are_scaled_and_their_base_is_not():
    table, task = TABLES["mup"], load_corpus(test_fraction=0.1)
    specs = {row.name: table.spec(row, task) for row in table.rows}
    scales = {name: spec.logit_scale for name, spec in specs.items()}
    assert scales == {
        "width 32": 1, "width 64": 1, "width 64, muP": 0.5, "width 128": 1, "width 128, muP": 0.25,
    }  # fmt: skip
    assert {specs[n].blocks[0].channel.hidden for n in ("width 128", "width 128, muP")} == {256}
    assert table.base(table.rows[2], task) == specs["width 32"]
    assert [row.optimizer for row in TABLES["bytes"].rows[:2]] == ["adamw", "muon"]


def made_up_folder(folder):
    """Every file that the tables read, a few lines each."""
    random = np.random.default_rng(0)

    def put(name, content):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    text = io.StringIO()
    rows = np.concatenate([random.integers(0, 17, (20, 64)), np.arange(20)[:, None] % 10], 1)
    csv.writer(text).writerows(rows.tolist())
    put(data.DIGITS, text.getvalue().encode())
    for split, n in (("train", 60), ("t10k", 10)):
        pixels = np.full((n, 28, 28), 255, np.uint8)
        pixels[:, :2] = 51  # a fifth, in the upper two lines
        put(data.FASHION.format(f"{split}-images", 3), bytes(16) + pixels.tobytes())
        put(data.FASHION.format(f"{split}-labels", 1), bytes(8) + bytes(range(10)) * (n // 10))
    for split in ("TRAIN", "TEST"):
        frames = ":".join(",".join(f"{0.1 * c + t:.1f}" for t in range(1, 4)) for c in range(12))
        lines = [f"{frames}:{speaker}" for speaker in range(1, 10)] * 8
        put(data.VOWELS.format(split), "\n".join(["#", "@data", *lines]).encode())
    signal = "\n".join(f"1970-01-01,{','.join([str(t)] * 9)},0" for t in range(1000))
    put(data.WALKING, f"time,{'a,' * 9}anomaly\n{signal}".encode())
    put(data.GENOME, b">E. coli\n" + b"ACGTTGCA\n" * 900)
    return folder


def test_recorded_data_is_read_as_it_stands(tmp_path, monkeypatch):
    folder = made_up_folder(tmp_path)
    digits = data.digits(folder)
    assert digits.inputs.shape == (20, 64, 1)
    assert digits.inputs.max() <= 1
    assert digits.facts()["n_test"] == 4

    monkeypatch.setattr(data, "VALID", 12)
    fashion = data.fashion(folder)
    assert fashion.inputs.shape == (70, 196, 1)
    assert torch.allclose(fashion.inputs[:, :14], torch.tensor(0.2))
    assert torch.allclose(fashion.inputs[:, 14:], torch.tensor(1.0))
    assert fashion.classes[-10:].tolist() == list(range(10)), "test is the package's own"
    assert [fashion.facts()[f"n_{s}"] for s in ("train", "valid", "test")] == [48, 12, 10]
    mixed = data.permuted(digits)
    assert mixed.digest != digits.digest
    assert torch.equal(mixed.inputs.sort(1).values, digits.inputs.sort(1).values)
    assert not torch.equal(mixed.inputs, digits.inputs)

    vowels = data.vowels(folder)
    assert vowels.inputs.shape == (144, 29, 12)
    assert not vowels.inputs[:, :26].any()
    assert torch.allclose(vowels.inputs[0, 26:, 1], torch.tensor([1.1, 2.1, 3.1]))
    assert vowels.classes[-72:].tolist() == [*range(9)] * 8
    walking = data.walking(folder)
    assert walking.values.shape == (1000, 9)
    assert walking.horizon == 16
    dna = data.dna(folder, 7000)
    assert (len(dna.train), len(dna.valid), len(dna.test)) == (6300, 350, 350)
    assert bytes(dna.train[:8].tolist()) == b"ACGTTGCA"


def test_a_wheel_is_as_good_as_a_folder(tmp_path):
    folder, wheel = made_up_folder(tmp_path / "made"), tmp_path / "aeon.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(folder / data.WALKING, data.WALKING)
    assert data.walking(wheel).digest == data.walking(folder).digest
    with pytest.raises(DataError, match=r"JapaneseVowels_TRAIN.ts: not found in .*aeon.whl"):
        data.vowels(wheel)


def test_data_that_is_missing_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match=r"NC_008253.fna.gz: not found .*apt-get download bowtie"):
        reproduce.main(["dna", "--data", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(DataError, match=r"not found in the system; .* scikit-learn"):
        data.digits(None)
    broken = tmp_path / "x.whl"
    broken.write_bytes(b"no archive")
    with pytest.raises(DataError, match="unreadable"):
        data.digits(broken)


@pytest.mark.parametrize(
    "name", ["digits", "digits_permuted", "fashion", "fashion_permuted", "s4d_init", "vowels",
             "forecasting", "dna"]
)  # fmt: skip
def test_a_table_of_recorded_data_is_trained(tmp_path, monkeypatch, capsys, name):
    folder = made_up_folder(tmp_path)
    monkeypatch.setattr(data, "VALID", 12)
    table = TABLES[name]
    rates = {"rates": table.rates[:1], "d_model": 16, "n_layers": 1, "batch_size": 2}
    monkeypatch.setitem(TABLES, name, replace(table, rows=table.rows[:2], **rates))
    reproduce.main([name, "--seeds", "1", "--steps", "1", "--data", str(folder)])
    text = capsys.readouterr().out
    assert "| model | parameters | valid | test | lr | published |" in text
    assert text.count("\n| ") == 4


@pytest.mark.skipif(find_spec("sklearn") is None, reason="needs scikit-learn, for its digits")
def test_scikit_learn_has_the_digits():
    assert data.digits(None).facts()["n_train"] == 1258


@pytest.mark.skipif(find_spec("aeon") is None, reason="needs aeon, for its recordings")
def test_aeon_has_vowels_and_a_walker():
    assert data.vowels(None).facts()["n_test"] == 370
    assert data.walking(None).values.shape == (7040, 9)


@pytest.mark.skipif(
    not Path("/", data.FASHION.format("train-images", 3)).exists(),
    reason="needs Debian's dataset-fashion-mnist",
)
def test_debian_has_fashion_mnist():
    assert data.fashion(None).facts()["n_test"] == 10_000


@pytest.mark.skipif(not Path("/", data.GENOME).exists(), reason="needs Debian's bowtie-examples")
def test_debian_has_a_genome():
    assert set(bytes(data.dna(None).valid.tolist())) <= set(b"ACGT")


@pytest.mark.parametrize("args", [["places", "--steps", "2"], ["text", "--tokens", "600"]])
def test_a_free_transformer_is_weighed(monkeypatch, capsys, tmp_path, args):
    monkeypatch.setattr(free_transformer, "N_TEXTS", 3)
    monkeypatch.setattr(free_transformer, "N_ALIKE", 2)
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(97, 123)) * 100)
    data = ["--data", str(path), "--seq-len", "16"] if args[0] == "text" else []
    sizes = ["--d-model", "16", "--n-layers", "2", "--batch-size", "2", "--n-bits", "2"]
    free_transformer.main([*args, *data, *sizes, "--kappas", "1/8"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.count("|") for row in rows] == [rows[0].count("|")] * len(rows)
    if args[0] == "text":
        plain, free = (int(row.split("|")[2].replace(",", "")) for row in rows[2:])
        assert abs(plain / free - 1) < 0.005
        assert float(rows[2].split("|")[4]) == 0 < float(rows[3].split("|")[4])


def test_what_lines_have_in_common_is_found(monkeypatch):
    monkeypatch.setattr(free_transformer, "N_ALIKE", 2)
    of = torch.tensor([[3, 3], [5, 5], [5, 5]])
    equal = lambda a, b: (a == b).double()  # noqa: E731
    assert free_transformer.pairs(equal, of) == (1, pytest.approx(1 / 3))


def test_unknown_table_is_refused(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["nothing"])
    assert "parity" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reproduce.main(["parity", "--seeds", "0"])
    assert "give at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reproduce.main(["vowels", "--published"])
    assert "vowels has none" in capsys.readouterr().err
