"""The faults of scripts/mutants.py, as changes of a source, and the tests that reach a module."""

from __future__ import annotations

import ast
import copy
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

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
