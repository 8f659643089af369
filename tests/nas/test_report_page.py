"""docs/report.md explains every heading and every column that a report has."""

import re
from html import unescape
from pathlib import Path

import pytest
from made_up_runs import complete_events, evolved_events

from kizzasi.nas.report.pages import html, markdown, summarise
from kizzasi.nas.report.tables import tables

PAGE = (Path(__file__).parent.parent.parent / "docs" / "report.md").read_text()
HEADINGS = re.findall(r"^##+ (.+)$", PAGE, re.MULTILINE)
NAMED = " ".join(re.findall(r"`([^`]+)`", PAGE.replace("\n", " ")))
RUNS = {
    "complete": complete_events(failures=True),
    "evolved": evolved_events(),
    "half-done": complete_events()[:40],
}


@pytest.mark.parametrize("name", RUNS)
def test_every_heading_of_a_report_is_explained(name):
    summary = summarise(RUNS[name])
    found = [unescape(text) for text in re.findall(r"<h2>(.*?)</h2>", html(summary))]
    found += re.findall(r"^## (.+)$", markdown(summary), re.MULTILINE)
    assert len(found) > 15
    proxies = re.compile(r"Proxy \w+ against training")
    said = {proxies.sub("Proxy against training", heading) for heading in found}
    assert sorted(h for h in said if h not in HEADINGS and h not in NAMED) == []


@pytest.mark.parametrize("name", RUNS)
def test_every_column_of_a_table_is_explained(name):
    for part in tables(summarise(RUNS[name])):
        section = re.search(rf"^### {part.title}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
        text = PAGE if part.title == "Learning curves" else section.group(1)
        named = set(re.findall(r"`([^`]+)`", text))
        missing = {re.sub(r"top-\d", "top-5", column) for column in part.rows[0]} - named
        assert not missing, f"{part.title}: {missing}"
