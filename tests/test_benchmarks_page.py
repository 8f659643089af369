"""docs/benchmarks.md: its figures are the log's, and its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
LOG = (ROOT / "docs" / "LOG.md").read_text()
WORDS = " ".join(LOG.split())


def test_every_row_of_a_table_is_one_of_the_log():
    tables = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)[1:]  # after that of the machines
    assert len(tables) == 6
    for table in tables:
        assert table.strip() in LOG, table


@pytest.mark.parametrize(
    "said", ["37.8 GB/s", "12.5 GB/s", "109 GFLOP/s", "186 to 205", "2 min 52 s"]
)
def test_figures_in_the_text_are_the_logs(said):
    assert said in PAGE
    assert said in WORDS or said.replace(" min ", " min\n") in LOG


@pytest.mark.parametrize("script", sorted(set(re.findall(r"scripts/(\w+)\.py", PAGE))))
def test_a_command_names_a_script_and_options_that_it_has(script):
    source = (ROOT / "scripts" / f"{script}.py").read_text()
    for line in re.findall(rf"scripts/{script}\.py([^\n`]*)", PAGE):
        for option in re.findall(r"--[\w-]+", line.split("#")[0]):
            assert f'"{option}"' in source, f"{script} {option}"
