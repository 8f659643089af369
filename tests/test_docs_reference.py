"""The reference: every public name has its place there, without the site being built."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import docs_reference
import pytest
from docs_fields import meanings

import kizzasi.eml  # noqa: F401 (registers eml_attention)
from kizzasi.models import ChannelSpec, LayerSpec, MixerSpec
from kizzasi.models.mixers import MambaSpec

ROOT = Path(__file__).parent.parent
SHOWN = re.compile(r"^::: (\S+)$|\[`\w+`\]\(\w+\.md#(\S+?)\)", re.MULTILINE)
TEXTS = {page: docs_reference.text_of(page) for page in docs_reference.PAGES}


def thing(path: str) -> object:
    """What a dotted path names; a module, if its package names nothing else so."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        return importlib.import_module(path)


def shown(page: str) -> list[str]:
    return [own or elsewhere for own, elsewhere in SHOWN.findall(TEXTS[page])]


@pytest.mark.parametrize("page", docs_reference.PAGES)
def test_a_page_shows_all_that_its_faces_name(page):
    things = [thing(path) for path in shown(page)]
    for module in map(importlib.import_module, docs_reference.PAGES[page]):
        for name in getattr(module, "__all__", ()):
            assert any(getattr(module, name) is one for one in things), f"{page}: {name}"


@pytest.mark.parametrize("family", [MixerSpec, ChannelSpec, LayerSpec])
def test_every_registered_spec_is_shown(family):
    things = [thing(path) for page in TEXTS for path in shown(page)]
    assert [kind for kind in family.known() if family.registry[kind] not in things] == []


def test_every_room_has_a_page():
    faces = [face for faces in docs_reference.PAGES.values() for face in faces]
    for room in ("kizzasi.models", "kizzasi.train", "kizzasi.nas", "kizzasi.eml"):
        assert room in faces
    for part in ("mixers", "channels", "layers", "ops", "decoding", "checkpoints"):
        assert f"kizzasi.models.{part}" in faces


def test_every_op_with_engines_and_every_decoder_is_shown():
    ops, decoding = TEXTS["ops"], TEXTS["decoding"]
    for name in ("selective_scan.selective_scan_ref", "ssd.ssd", "wkv7.wkv7", "dplr.s4_scan"):
        assert f"::: kizzasi.models.ops.{name}\n" in ops
    assert "kizzasi.models.ops.chunks" not in ops  # no engines: a tool of those that have them
    for name in ("batcher.Batcher", "beams.search_beams", "streaming.forecast"):
        assert f"::: kizzasi.models.decoding.{name}\n" in decoding


def test_nothing_is_explained_twice():
    own = [path for text in TEXTS.values() for path, _ in SHOWN.findall(text) if path]
    things = [id(thing(path)) for path in own]
    assert len(things) == len(set(things))


def test_pages_of_the_site_exist_and_none_is_left_out():
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", text, re.MULTILINE))
    made = {f"reference/{page}.md" for page in TEXTS} | {"index.md"}
    assert named == made | {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_readme_becomes_the_first_page_and_its_links_hold():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", docs_reference.start_page())
    assert links
    assert all((ROOT / "docs" / link).is_file() for link in links)


def test_fields_are_read_from_both_kinds_of_docstring():
    fields = [field.name for field in dataclasses.fields(MambaSpec)]
    before, found, _ = meanings(inspect.getdoc(MambaSpec), fields)
    assert before == "Mamba-1 mixer."
    assert found["dt_max"] == "range of the initial step sizes, log-uniform."
    assert found["dt_floor"] == "their smallest value."
    assert list(found) == fields
    doc = "A.\n\nArgs:\n    a, b: of c: both.\n        More.\n    c: one.\n\nSource: here."
    assert meanings(doc, "abc") == (
        "A.",
        {"a": "of c: both. More.", "b": "of c: both. More.", "c": "one."},
        "Source: here.",
    )
    assert meanings("Nothing.", ()) == ("Nothing.", {}, "")
