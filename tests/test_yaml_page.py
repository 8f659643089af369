"""docs/yaml.md is what the dataclasses say, and what it shows can be read."""

import re

import docs_yaml
import pytest

from kizzasi.nas import SearchConfig
from kizzasi.nas.study.config_file import read_config

PAGE = docs_yaml.PAGE.read_text("utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|([^|]*(?:\\\|[^|]*)*)\|$", PAGE, re.MULTILINE)


def test_the_page_is_up_to_date():
    assert docs_yaml.page() == PAGE, "run: python scripts/docs_yaml.py"


def test_every_key_has_a_meaning():
    assert len(ROWS) > 300
    assert [name for name, *_, meaning in ROWS if not meaning.strip()] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(#([\w-]+)\)", PAGE))))
def test_every_link_within_the_page_has_its_heading(target):
    assert re.search(rf"^#+ {target}$", PAGE, re.MULTILINE | re.IGNORECASE)


def test_every_setting_of_a_search_has_its_row_and_the_default_one_is_read(tmp_path):
    below = PAGE[PAGE.index("## A search") :]
    text = re.search(r"```yaml\n(.*?)```", below, re.DOTALL).group(1)
    (tmp_path / "search.yaml").write_text(text)
    assert read_config(tmp_path / "search.yaml")[0] == SearchConfig()
    renamed = {names[0]: docs_yaml.NAMED.get(s) for s, names in docs_yaml.SECTIONS.items()}
    for name in SearchConfig().to_dict():
        assert f"\n| `{renamed.get(name) or name}` |" in below, name


def test_a_type_is_said_in_words():
    assert docs_yaml.shown(tuple[int, ...] | None) == "list of whole number or null"
    assert docs_yaml.value(1e-5) == "1.0e-05"
    assert docs_yaml.value((1, (2, None))) == "[1, [2, null]]"
