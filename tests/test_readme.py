"""The code blocks of README and docs run as they stand, and the README's commands exist."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import kizzasi
from kizzasi.cli import main
from kizzasi.models import ChannelSpec, LayerSpec, MixerSpec
from kizzasi.models.heads import HeadSpec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands_of(text):
    """Every line of the blocks of commands, without its comment."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    lines = (line.split(" #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line and line[0] != "#"]


COMMANDS = commands_of(README)
PROGRAM = re.compile(r"\bkizzasi ([a-z]+)([^&|>]*)")
SHOWN = {
    verb
    for page in PAGES
    for line in commands_of(page.read_text())
    for verb, _ in PROGRAM.findall(line)
}


@pytest.fixture(autouse=True)
def unchanged_families(monkeypatch):
    """What a page registers is gone after it."""
    for family in (MixerSpec, ChannelSpec, LayerSpec, HeadSpec):
        monkeypatch.setattr(family, "registry", dict(family.registry))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    module = ModuleType("page")  # so that what a page defines can be pickled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name} block {number}", "exec"), vars(module))


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[number], f"README.md block {number}", "exec"), {})


def test_first_screen_shows_both_commands_and_a_twelve_line_model():
    screen = README.splitlines()[:30]
    assert any(line.startswith("make search") for line in screen)
    assert any(line.startswith("make test") for line in screen)
    assert len(PYTHON[0].strip().splitlines()) == 12


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command, capsys):
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert program == "kizzasi"
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--help"])
    assert exit_.value.code == 0
    assert "example:" in capsys.readouterr().out


@pytest.mark.parametrize("verb", sorted(SHOWN))
def test_docs_name_commands_and_options_that_exist(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for page in PAGES:
        for line in commands_of(page.read_text()):
            for own, rest in PROGRAM.findall(line):
                given = set(re.findall(r"(?<!\S)--[\w-]+", rest)) if own == verb else set()
                assert given <= known, f"{page.name}: {line}"


def test_the_server_is_short():
    page = (ROOT / "docs" / "serving.md").read_text()
    block = re.search(r"```python\n(# serve\.py\n.*?)```", page, re.DOTALL).group(1)
    assert sum(bool(line.strip()) for line in block.splitlines()) < 40


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type", "license"} <= set(cited)
    assert cited["version"] == kizzasi.__version__


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target
