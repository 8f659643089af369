"""Would the tests notice? A seeded sample of small faults, each planted in a copy and tried.

A mutant is one change of one place: a number nudged, True and False, `and` and `or`, a comparison,
an operator of arithmetic, `break` and `continue` swapped, `not` or a minus left out, a returned
value become None. Never in docstrings, texts, annotations, decorators, raised errors, bodies of
protocols, or `strict` of a zip. It is tried against the tests that import its module, directly
first, then through others, and stops at the first that fails; the same test must pass without the
mutant. A test that does not end kills it. What no test fails on within the time has survived.

The tree itself is never changed. The journal has a line for each mutant judged; the same call goes
on from there, and --again tries once more what survived.

examples:
  python scripts/mutants.py --journal mutants.jsonl
  python scripts/mutants.py --folders kizzasi/train --n 20 --seed 7 --seconds 30 --json
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

SURVIVED, KILLED, TIMED_OUT = "survived", "killed", "timed out"
NEAREST = 3  # test files that are tried first; three times as many follow
OUT_OF_TIME = 77  # pytest's exit status when no test failed within the time
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "node_modules", "build")
SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult},
}
Mutant = tuple[str, int, int, str, str]  # file, line, column (bytes), the text there, its successor


def mutants_of(path: str, source: str) -> list[Mutant]:
    return [
        (path, node.lineno, node.col_offset, old, new)
        for node, new in _changes(ast.parse(source), source)
        if (old := ast.get_source_segment(source, node)) is not None
    ]


def _changes(node: ast.AST, source: str) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    match node:
        case ast.JoinedStr() | ast.Raise():
            return
        case ast.Call(func=ast.Name(id=name)) if name.endswith(("Error", "Warning")):
            return
        case ast.FunctionDef(body=body) if all(_says_nothing(line) for line in body):
            return
        case ast.Constant(value=bool() as value):
            yield node, str(not value)
        case ast.Constant(value=int() as value):
            yield node, str(value + 1)
        case ast.Constant(value=float() as value):
            yield node, str(0.8 * value or 1.0)
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                changed = copy.deepcopy(node)
                changed.ops[place] = SWAPS[type(operator)]()
                yield node, f"({ast.unparse(changed)})"
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in SWAPS:
            changed = copy.copy(node)
            changed.op = SWAPS[type(node.op)]()
            text = ast.unparse(changed)
            yield node, text if isinstance(node, ast.AugAssign) else f"({text})"
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node, f"({ast.unparse(node.operand)})"
        case ast.Break():
            yield node, "continue"
        case ast.Continue():
            yield node, "break"
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield node, "return None"
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in field if isinstance(field, list) else [field]:
            strict = isinstance(child, ast.keyword) and child.arg == "strict"
            if isinstance(child, ast.AST) and not strict:
                yield from _changes(child, source)


def _says_nothing(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def sample(root: Path, folders: Sequence[str], n: int, seed: int) -> list[Mutant]:
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    every = [m for p in files for m in mutants_of(str(p.relative_to(root)), p.read_text())]
    return random.Random(seed).sample(every, min(n, len(every)))


class Tests:
    """Which tests reach a module: by what they import, through what that imports."""

    def __init__(self, root: Path) -> None:
        files = [p.relative_to(root) for p in root.rglob("*.py") if "/." not in str(p)]
        self.tests = [p for p in files if p.name.startswith("test_")]
        self.source = {p: (root / p).read_text() for p in files}
        self.names = {_module(p): p for p in files}

    @cache  # noqa: B019 (one object a run)
    def imported(self, path: Path) -> set[Path]:
        found = set()
        for node in ast.walk(ast.parse(self.source[path])):
            if isinstance(node, ast.Import):
                found |= {self.names.get(name.name) for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {self._home(node.module, name.name) for name in node.names}
        return {path for path in found if path is not None}

    @cache  # noqa: B019
    def _home(self, module: str, name: str) -> Path | None:
        """The file that a name comes from, through the packages that only hand it on."""
        if f"{module}.{name}" in self.names:
            return self.names[f"{module}.{name}"]
        here = self.names.get(module)
        for node in ast.parse(self.source[here]).body if here and here.stem == "__init__" else ():
            if isinstance(node, ast.ImportFrom) and any(name == n.name for n in node.names):
                return self._home(node.module or module, name)
        return here

    def nearest(self, path: Path, line: int) -> list[Path]:
        """Those that reach it: the fewest imports between, then who names the mutant's place."""
        around = [
            node.name
            for node in ast.walk(ast.parse(self.source[path]))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.lineno <= line <= (node.end_lineno or line)
        ]
        words = re.compile(rf"\b({'|'.join([*around, re.escape(_module(path))])})\b")
        steps, found = {path: 0}, [path]
        for reached in found:  # breadth first: the list grows
            for other in self.source.keys() - steps.keys():
                if reached in self.imported(other):
                    steps[other] = steps[reached] + 1
                    found.append(other)

        def order(test: Path) -> tuple[int, int, int, str]:
            source = self.source[test]
            return steps[test], -len(words.findall(source)), len(source), str(test)

        return sorted(set(self.tests) & steps.keys(), key=order)


def _module(path: Path) -> str:
    """Its name in an import; what tests share lies beside them."""
    parts = path.parent.parts if path.stem == "__init__" else (*path.parent.parts, path.stem)
    return path.stem if parts[0] in ("tests", "scripts") else ".".join(parts)


class Bench:
    """A copy of the tree in which mutants are planted and tried."""

    def __init__(self, root: Path, folder: Path, seconds: float) -> None:
        self.root, self.seconds = folder / "tree", seconds
        shutil.copytree(root, self.root, ignore=LEFT_OUT)
        self.tests, self.stamp = Tests(self.root), time.time()
        self.passed, self.unsound = set[str](), set[str]()

    def judge(self, mutant: Mutant) -> dict[str, object]:
        name, line, column, old, new = mutant
        path = self.root / name
        source = path.read_bytes()
        at = sum(map(len, source.splitlines(True)[: line - 1])) + column
        end = at + len(old.encode())
        began, left = time.time(), self.seconds
        verdict, test = SURVIVED, ""
        nearest = [str(test) for test in self.tests.nearest(Path(name), line)]
        parts = [part for part in (nearest[:NEAREST], nearest[NEAREST : 4 * NEAREST]) if part]
        while parts and left > 0:
            try:
                self._write(path, source[:at] + new.encode() + source[end:])
                verdict, test, spent = self._run(parts[0], left)
            finally:
                self._write(path, source)
            if verdict == SURVIVED:
                parts, left = parts[1:], left - spent
            elif self._is_sound(test):
                break
        took = round(time.time() - began, 1)
        return {"mutant": mutant, "verdict": verdict, "test": test, "seconds": took}

    def _write(self, path: Path, source: bytes) -> None:
        path.write_bytes(source)
        self.stamp += 2  # compiled files are told apart by whole seconds
        os.utime(path, (self.stamp, self.stamp))

    def _is_sound(self, test: str) -> bool:
        """Whether it passes without a mutant; if not, it is left out from now on."""
        if test not in self.passed and self._run([test], self.seconds)[0] != SURVIVED:
            self.unsound.add(test)
        return test not in self.unsound

    def _run(self, tests: list[str], seconds: float) -> tuple[str, str, float]:
        """The verdict, the test that gave it, and the seconds that the tests took."""
        begun = self.root.parent / "begun"
        begun.write_text("")
        before, here = sum(os.times()[2:4]), [str(self.root), str(Path(__file__).parent)]
        given = {
            "MUTANTS": json.dumps([seconds, str(begun)]),
            "PYTHONPATH": os.pathsep.join(here),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        options = ["-x", "-p", "mutants", "-p", "no:cacheprovider"]
        options += [f"--deselect={test}" for test in sorted(self.unsound)]
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=self.root,
            env={**os.environ, **given},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = run.wait(20 * self.seconds)
        except subprocess.TimeoutExpired:
            status = -signal.SIGALRM
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        spent, names = sum(os.times()[2:4]) - before, begun.read_text().splitlines()
        survived = status in (0, 5, OUT_OF_TIME)
        self.passed.update(names if survived else names[:-1])
        if survived:
            return SURVIVED, "", spent
        if not names:
            raise RuntimeError(f"pytest ended with {status} before any test: {' '.join(tests)}")
        return TIMED_OUT if status == -signal.SIGALRM else KILLED, names[-1], spent


def _note(test: str) -> float:
    """This file is a plugin of these runs too: it names the tests, and ends what takes long."""
    seconds, begun = json.loads(os.environ["MUTANTS"])
    if test:
        with open(begun, "a") as file:
            file.write(test + "\n")
    return seconds


def pytest_runtest_setup(item) -> None:
    signal.alarm(round(4 * _note(item.nodeid)) or 1)


def pytest_collectreport(report) -> None:
    if report.failed:
        _note(report.nodeid)


def pytest_runtest_teardown() -> None:
    signal.alarm(0)


def pytest_runtest_logfinish() -> None:
    if sum(os.times()[:4]) > _note(""):
        import pytest

        pytest.exit("no test failed within the time", OUT_OF_TIME)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--folders", nargs="+", default=["kizzasi/nas", "kizzasi/train"])
    parser.add_argument("--n", type=int, default=60, help="mutants (60)")
    parser.add_argument("--seed", type=int, default=2026, help="of the sample (2026)")
    parser.add_argument("--seconds", type=float, default=60, help="of tests, for a mutant (60)")
    parser.add_argument("--journal", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--again", action="store_true", help="try once more what survived")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    lines = args.journal.read_text().splitlines() if args.journal.exists() else []
    rows = {tuple(row["mutant"]): row for row in map(json.loads, lines)}
    chosen = sample(args.root, args.folders, args.n, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.root, Path(folder), args.seconds)
        for mutant in chosen:
            if mutant not in rows or (args.again and rows[mutant]["verdict"] == SURVIVED):
                rows[mutant] = bench.judge(mutant)
                with args.journal.open("a") as journal:
                    journal.write(json.dumps(rows[mutant]) + "\n")
    rows = [rows[mutant] for mutant in chosen]
    n_killed = sum(row["verdict"] != SURVIVED for row in rows)
    if args.json:
        print(json.dumps({"killed": n_killed, "n": len(rows), "mutants": rows}, indent=1))
        return
    for row in rows:
        path, line, _, old, new = (" ".join(str(part).split()) for part in row["mutant"])
        print(f"{row['verdict']:9} {path}:{line}: {old[:60]} -> {new[:60]}  {row['test']}")
    print(f"{n_killed} of {len(rows)} killed")


if __name__ == "__main__":
    main()
