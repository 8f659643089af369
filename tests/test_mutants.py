"""scripts/mutants.py plants faults in a copy, and tells those that the tests notice."""

import json
from pathlib import Path

import mutants
import mutations
import pytest

SOURCE = '''"""1 + 1: texts stay."""
from typing import Protocol


class Stub(Protocol):
    def __call__(self, n: int = 3) -> int: ...


def loud(n: int) -> int:
    if n > 4:
        raise ValueError("more than " + str(4 + 4))
    return n + 2


def deaf(n: int) -> int:
    return n * 5


def endless() -> None:
    while not True:
        pass
'''
TESTS = """
from pack import loud
from pack.inner import deaf, endless


def test_loud():
    assert loud(1) == 3 and loud(4) == 6


def test_deaf():
    deaf(2)
    endless()
"""


@pytest.fixture
def tree(tmp_path):
    for name, text in {
        "pack/__init__.py": "from pack.inner import loud",
        "pack/inner.py": SOURCE,
        "pack/alone.py": "def unseen():\n    return 1",
        "tests/test_pack.py": TESTS,
        "tests/test_other.py": "def test_nothing(): pass",
        "pyproject.toml": "[tool.pytest.ini_options]\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_is_changed_and_what_stays():
    found = [(line, old, new) for _, line, _, old, new in mutations.mutants_of("a.py", SOURCE)]
    assert found == [
        (10, "n > 4", "(n >= 4)"),
        (10, "4", "5"),
        (12, "return n + 2", "return None"),
        (12, "n + 2", "(n - 2)"),
        (12, "2", "3"),
        (16, "return n * 5", "return None"),
        (16, "n * 5", "(n / 5)"),
        (16, "5", "6"),
        (20, "not True", "(True)"),
        (20, "True", "False"),
    ]
    more = "def f(a, b=.5, *, c=1):\n for x in zip(a, b, strict=True):\n  if a and b is c: break\n"
    assert [new for *_, new in mutations.mutants_of("a.py", more)] == [
        *("2", "0.4", "(a or b is c)", "(b is not c)", "continue")
    ]


def test_planted_mutants_are_told_apart(tree, capsys):
    every = mutations.mutants_of("pack/inner.py", SOURCE)
    bench = mutants.Bench(tree, tree.parent / f"{tree.name}-bench", seconds=1)
    verdicts = {m[3:]: bench.judge(m) for m in (every[3], every[7], every[8])}
    assert [(row["verdict"], row["test"]) for row in verdicts.values()] == [
        ("killed", "tests/test_pack.py::test_loud"),
        ("survived", ""),
        ("timed out", "tests/test_pack.py::test_deaf"),
    ]
    assert (tree / "pack/inner.py").read_text() == SOURCE
    assert (bench.root / "pack/inner.py").read_text() == SOURCE


def test_a_test_that_fails_by_itself_kills_nothing(tree):
    (tree / "tests/test_pack.py").write_text(TESTS.replace("== 3", "== 4"))
    bench = mutants.Bench(tree, tree.parent / f"{tree.name}-bench", seconds=1)
    row = bench.judge(mutations.mutants_of("pack/inner.py", SOURCE)[7])
    assert row["verdict"] == "survived"


def test_the_journal_goes_on(tree, tmp_path, capsys):
    call = ["--root", str(tree), "--folders", "pack", "--n", "3", "--seconds", "1"]
    call += ["--seed", "3", "--journal", str(tmp_path / "journal"), "--json"]
    chosen = mutations.sample(tree, ["pack"], 3, 3)
    assert len(set(chosen)) == 3
    old = [{"mutant": m, "verdict": "survived", "test": "", "seconds": 0} for m in chosen[:2]]
    (tmp_path / "journal").write_text("".join(json.dumps(row) + "\n" for row in old))
    mutants.main(call)
    found = json.loads(capsys.readouterr().out)
    assert [tuple(row["mutant"]) for row in found["mutants"]] == chosen
    assert found["mutants"][:2] == json.loads(json.dumps(old))
    assert len((tmp_path / "journal").read_text().splitlines()) == 3


def test_the_nearest_tests_come_first(tree):
    (tree / "tests/test_far.py").write_text("from test_pack import TESTS")
    (tree / "tests/test_near.py").write_text("import pack.inner\n# deaf deaf deaf deaf")
    tests = mutations.Tests(tree)
    assert [t.name for t in tests.nearest(Path("pack/inner.py"), 16)] == [
        *("test_near.py", "test_pack.py", "test_far.py")
    ]
    assert tests.nearest(Path("pack/alone.py"), 2) == []
