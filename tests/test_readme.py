"""The code blocks of README and docs run as they stand, and the README's commands exist."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kizzasi.cli import main
from kizzasi.models import ChannelSpec, LayerSpec, MixerSpec
from kizzasi.models.heads import HeadSpec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(autouse=True)
def unchanged_families(monkeypatch):
    """What a page registers is gone after it."""
    for family in (MixerSpec, ChannelSpec, LayerSpec, HeadSpec):
        monkeypatch.setattr(family, "registry", dict(family.registry))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
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
