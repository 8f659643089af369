"""scripts/reproduce.py trains, chooses, tests and prints every row of a table."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import free_transformer  # pyright: ignore[reportMissingImports]
import reproduce  # pyright: ignore[reportMissingImports]

from kizzasi.train.synthetic import Parity


def test_every_table_can_be_built():
    for table in reproduce.TABLES.values():
        for row in table.rows:
            table.spec(row).check()


def test_a_table_tells_who_solves_the_task(monkeypatch, capsys):
    table = reproduce.TABLES["parity"]
    rows = tuple(row for row in table.rows if row.name in ("slstm", "mamba2"))
    small = replace(
        table, rows=rows, examples=Parity(4), tests={"5": Parity(5, 5)}, d_model=16, rates=(2e-2,)
    )
    monkeypatch.setitem(reproduce.TABLES, "parity", small)
    reproduce.main(["parity", "--seeds", "1", "--steps", "120", "--json"])
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(found) == ["mamba2", "slstm"]
    assert found["mamba2"]["scores"][0][0] > 0.95
    assert len(found["slstm"]["scores"][0]) == 2
    printed = reproduce.printed(small, list(found.values()))
    assert printed.count("\n") == 5


def test_a_training_that_diverged_is_said_to_have(monkeypatch):
    table = reproduce.TABLES["parity"]
    row = {"name": "x", "published": "-", "params": 1, "rate": 1.0}
    text = reproduce.printed(table, [{**row, "scores": [[None] * 3, [0.5] * 3]}])
    assert "diverged 1 times" in text


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
