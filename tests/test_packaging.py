"""What is installed: the lock covers it, and peers are named by the version they come in."""

import re
import sys
import warnings
from pathlib import Path

import peers
import pytest
from torch import nn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LOCKED = {re.split("==", line)[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}


NAME = "kizzasi-models"  # "kizzasi" on the package index is somebody else's, with our import name


def read(name: str) -> dict:
    return tomllib.loads((ROOT / name).read_text())


def required() -> set[str]:
    """Every package that pyproject.toml names, its own extras apart."""
    data = read("pyproject.toml")
    lists = [data["build-system"]["requires"], data["project"]["dependencies"]]
    lists += data["project"]["optional-dependencies"].values()
    return {re.match(r"[\w-]+", need)[0] for needs in lists for need in needs} - {NAME}


def test_the_lock_holds_every_requirement_at_one_exact_version():
    assert {"torch", "setuptools", "transformers", "pyright"} <= required()
    assert required() <= LOCKED
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9._-]+==[^ ]+( ; .+)?", line), line


def test_the_lock_names_no_place_to_download_from():
    assert "://" not in (ROOT / "requirements.lock").read_text()


class Old(nn.Module):
    def forward(self, ids, past_key_values=None): ...


class OldMamba(nn.Module):
    def forward(self, ids, cache_params=None): ...


class New(nn.Module):
    def forward(self, ids, cache=None, past_key_values=None): ...


@pytest.mark.parametrize(
    ("version", "peer", "name"),
    [
        ((5, 23), Old, "past_key_values"),
        ((5, 23), OldMamba, "cache_params"),
        ((5, 24), New, "cache"),
    ],
)
def test_a_cache_goes_by_the_name_of_the_peers_version(version, peer, name, monkeypatch):
    monkeypatch.setattr(peers, "version", lambda: version)
    assert peers.cache_argument(peer()) == name
    assert peers.complaint() is None


def test_a_peer_that_is_too_new_is_named(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda: (6, 0))
    with pytest.raises(AssertionError, match=r"6\.0 is newer than .* \(5\.23 to 5\.24\)"):
        peers.cache_argument(Old())


def test_a_peers_warning_about_its_own_names_passes_and_ours_fails():
    renamed = "`past` is deprecated and will be removed in version 5.40.0 for `A.forward`. Use `b`."
    warnings.warn(renamed, FutureWarning, stacklevel=1)
    warnings.warn_explicit("old", DeprecationWarning, "x.py", 1, module="transformers.cache_utils")
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "x.py", 1, module="kizzasi.models")
    with pytest.raises(FutureWarning):
        warnings.warn("`engine` is deprecated", FutureWarning, stacklevel=1)


def test_the_lock_holds_torch_at_our_lower_bound_so_that_every_run_tests_it():
    bounds = [r for r in read("pyproject.toml")["project"]["dependencies"] if "torch" in r]
    lowest = bounds[0].removeprefix("torch>=")
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert f"torch=={lowest}.0" in lines


def test_the_package_has_a_name_of_its_own_and_every_message_says_it():
    project = read("pyproject.toml")["project"]
    assert project["name"] == NAME
    assert project["scripts"] == {"kizzasi": "kizzasi.cli:main"}
    sources = [*(ROOT / "kizzasi").rglob("*.py"), ROOT / "README.md", ROOT / "pyproject.toml"]
    for path in [*sources, *(ROOT / "docs").glob("*.md")]:
        found = re.findall(r"(?:pip install[^\n]*|\")\bkizzasi\[", path.read_text())
        assert not found, f"{path}: {found}: another project's name"
