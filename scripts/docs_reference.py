"""Pages of the reference, made of the public faces; a hook of mkdocs (`make docs`).

A page is a list of directives that mkdocstrings fills from the docstrings. Nothing is imported: the
faces are read as source. So a mixer that is added to `__all__` has its place in the reference.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# page -> the packages and modules whose faces it shows; what two pages have, the former shows.
PAGES: dict[str, tuple[str, ...]] = {
    "mixers": ("kizzasi.models.mixers",),
    "channels": ("kizzasi.models.channels", "kizzasi.models.moe"),
    "layers": ("kizzasi.models.layers",),
    "ops": ("kizzasi.models.ops",),
    "decoding": ("kizzasi.models.decoding",),
    "checkpoints": ("kizzasi.models.checkpoints", "kizzasi.models.checkpoints.tokenizers"),
    "models": ("kizzasi.models", "kizzasi.models.presets", "kizzasi.models.heads"),
    "train": ("kizzasi.train", "kizzasi.train.synthetic"),
    "nas": (
        "kizzasi.nas",
        "kizzasi.nas.spaces",
        "kizzasi.nas.searchers",
        "kizzasi.nas.schedulers",
        "kizzasi.nas.executors",
        "kizzasi.nas.evaluators.zero_cost",
        "kizzasi.nas.report",
        "kizzasi.nas.distil",
    ),
    "pipelines": ("kizzasi.nas.pipelines",),
    "eml": ("kizzasi.eml",),
    "testing": ("kizzasi.testing",),
}
BY_FILE = ("mixers", "channels", "layers", "ops", "decoding")
BARE = "    options:\n      members: false\n"  # a module: what it says of itself
HEAD = f"{BARE}      heading_level: 2\n      show_root_full_path: true\n"
ENGINES = re.compile(r"^[A-Z0-9_]+ = Engines\(", re.MULTILINE)


def file_of(module: str) -> Path | None:
    """The file of a module, or of a package's face; None if there is no such module."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path if path.is_file() else None


@cache
def body_of(module: str) -> list[ast.stmt]:
    path = file_of(module)
    assert path is not None, f"{module}: no such module"
    body = ast.parse(path.read_text("utf-8")).body
    return [*body, *(inner for node in body if isinstance(node, ast.If) for inner in node.body)]


def face(module: str) -> list[str]:
    """What a module's `__all__` names, or else what it defines and explains, each name once."""
    for node in body_of(module):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in body_of(module) if isinstance(node, kinds)]
    return [*dict.fromkeys(n.name for n in nodes if n.name[0] != "_" and ast.get_docstring(n))]


def origin(path: str) -> str:
    """Where what a dotted path names is defined: imports are followed."""
    module, _, name = path.rpartition(".")
    for node in body_of(module) if file_of(module) else ():
        match node:
            case ast.ImportFrom(module=str(package), names=names):
                for alias in names:
                    source = f"{package}.{alias.name}"
                    if name == (alias.asname or alias.name) and source != path:
                        return origin(source)
            case ast.Assign(targets=[ast.Name(id=given)], value=ast.Name(id=other)) if (
                given == name
            ):
                return origin(f"{module}.{other}")
    return path


def sections(page: str) -> list[tuple[str, list[str]]]:
    """The modules of a page, each with the dotted paths that are shown of it.

    Where one file is one architecture, a file is a section, and its glossary and equations head it.
    Of `ops` those files count that end with a table of engines: the others are tools of these.
    """
    found: dict[str, list[str]] = {}
    for module in PAGES[page]:
        found[module] = [] if page in BY_FILE else [f"{module}.{name}" for name in face(module)]
        if page in BY_FILE:
            paths = [f"{module}.{name}" for name in face(module)] or _defined_in(module)
            for path in sorted(paths, key=lambda path: origin(path).lower()):
                found.setdefault(origin(path).rpartition(".")[0], []).append(path)
    return [*found.items()]


def _defined_in(package: str) -> list[str]:
    """What the files of a package without `__all__` define."""
    path = file_of(package)
    assert path is not None
    files = sorted(path.parent.glob("[a-z]*.py"))
    if package.endswith(".ops"):
        files = [file for file in files if ENGINES.search(file.read_text("utf-8"))]
    modules = [f"{package}.{file.stem}" for file in files]
    return [f"{module}.{name}" for module in modules for name in face(module)]


@cache
def owners() -> dict[str, tuple[str, str]]:
    """By origin, the page that shows it, and the path by which it does."""
    found: dict[str, tuple[str, str]] = {}
    for page in PAGES:
        for module, _ in sections(page):
            found.setdefault(module, (page, module))
        for path in (path for _, paths in sections(page) for path in paths):
            found.setdefault(origin(path), (page, path))
    return found


def text_of(page: str) -> str:
    """The Markdown of one page."""
    lines = [f"# {page}\n"]
    headed = {module for other in PAGES for module, _ in sections(other)}
    for module, paths in sections(page):
        lines.append(f"::: {module}\n{HEAD}")
        elsewhere = []
        for path in paths:
            owner, shown = owners()[origin(path)]
            if shown == path and path not in headed:
                path = origin(path) if file_of(path) else path  # synflow, of a module of its name
                lines.append(f"::: {path}\n{BARE if file_of(path) else ''}")
            else:
                name = path.rpartition(".")[2]
                elsewhere.append(f"[`{name}`]({owner}.md#{shown})")
        if elsewhere:
            lines.append(f"Explained elsewhere: {', '.join(elsewhere)}.\n")
    return "\n".join(lines)


def start_page() -> str:
    """The README as the first page of the site."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.sub(r"\]\(docs/", "](", text)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add what is made here to the files of the site."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    files.append(File.generated(config, "index.md", content=start_page()))
    for page in PAGES:
        files.append(File.generated(config, f"reference/{page}.md", content=text_of(page)))
    return files
