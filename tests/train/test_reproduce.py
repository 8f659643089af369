"""scripts/reproduce.py trains, chooses, tests and prints every row of a table."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import reproduce

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


def test_unknown_table_is_refused(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["nothing"])
    assert "parity" in capsys.readouterr().err
