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
  python scripts/mutants.py --folders kizzasi/train --n 20 --seed 7 --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutations import Mutant, Tests, sample

SURVIVED, KILLED, TIMED_OUT = "survived", "killed", "timed out"  # that kills too
NEAREST = 3  # test files that are tried first; three times as many follow
OUT_OF_TIME = 77  # pytest's exit status when no test failed within the time
QUIET: Any = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL) | {"start_new_session": True}
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "node_modules", "build")


class Bench:
    """A copy of the tree in which mutants are planted and tried."""

    def __init__(self, root: Path, folder: Path, seconds: float) -> None:
        self.root, self.seconds = folder / "tree", seconds
        shutil.copytree(root, self.root, ignore=LEFT_OUT)
        self.tests, self.stamp = Tests(self.root), time.time()
        self.passed, self.unsound = set[str](), set[str]()

    def judge(self, mutant: Mutant) -> dict[str, Any]:
        name, line, column, old, new = mutant
        source = (path := self.root / name).read_bytes()
        at = sum(map(len, source.splitlines(True)[: line - 1])) + column
        end = at + len(old.encode())
        began, left, verdict, test = time.time(), self.seconds, SURVIVED, ""
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
            **QUIET,
            cwd=self.root,
            env={**os.environ, **given},
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(20 * self.seconds)
        status = -signal.SIGALRM if run.poll() is None else run.returncode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--folders", nargs="+", default=["kizzasi/nas", "kizzasi/train"])
    parser.add_argument("--n", type=int, default=60, help="mutants (60)")
    parser.add_argument("--seed", type=int, default=2026, help="of the sample (2026)")
    parser.add_argument("--seconds", type=float, default=60, help="of tests, for a mutant (60)")
    parser.add_argument("--journal", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--again", action="store_true", help="try again what survived")
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
        return print(json.dumps({"killed": n_killed, "n": len(rows), "mutants": rows}, indent=1))
    for row in rows:
        path, line, _, old, new = (" ".join(str(part).split()) for part in row["mutant"])
        print(f"{row['verdict']:9} {path}:{line}: {old[:60]} -> {new[:60]}  {row['test']}")
    print(f"{n_killed} of {len(rows)} killed")


if __name__ == "__main__":
    main()
