"""docs/reproductions.md: every row of a table that scripts/reproduce.py prints, and its setting."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from reproductions import TABLES  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reproductions.md").read_text()
SECTIONS = {
    match[1]: match[0]
    for match in re.finditer(r"^## (\w+)\n.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
RUN = [name for name in SECTIONS if name in TABLES]


def test_the_page_has_tables_and_names_those_that_it_lacks():
    assert RUN
    lacking = PAGE.split("## Not run here")[1]
    assert set(re.findall(r"`(\w+)`", lacking)) == set(TABLES) - set(RUN)


@pytest.mark.parametrize("name", RUN)
def test_a_section_has_every_row_and_the_setting_that_its_command_names(name):
    section, table = SECTIONS[name], TABLES[name]
    command = re.search(rf"`python scripts/reproduce\.py {name}([^`]*)`", section)
    assert command, "no command"
    steps = re.search(r"--steps (\d+)", command[1])
    if steps:
        table = replace(table, steps=int(steps[1]))
    assert table.setting() in section
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line[:2] == "| "]
    assert rows == ["model", "---", *(row.name for row in table.rows)]
    seeds = re.search(r"--seeds (\d)", command[1])
    assert seeds
    assert f"Medians over {seeds[1]} seeds" in section
    assert (ROOT / "docs" / "reproductions" / f"{name}.svg").is_file()
    assert f"(reproductions/{name}.svg)" in section
