"""Every program knows eml_attention, and a mixer of the user's own after --import."""

import os
import subprocess
import sys

import pytest

from kizzasi.cli import VERBS, main
from kizzasi.errors import SpecError
from kizzasi.models import list_mixers
from kizzasi.models.mixer import MixerSpec

SPEC = """
d_model: 16
blocks: [{mixer: {kind: KIND, n_heads: 2}}]
stem: {kind: tokens, vocab_size: 256}
"""
# A fresh process imports kizzasi.eml only once a spec names the kind.
SCRIPT = """
import sys
from kizzasi.cli import main
from kizzasi.models import load
from kizzasi.nas import ModelSpace, Xorshift64, choice, repeat
folder = sys.argv[1]
common = ["--seq-len", "8", "--batch-size", "2", "--steps", "2", "--data", folder + "/text"]
assert "kizzasi.eml" not in sys.modules and "own_module" not in sys.modules
runs = [
    ["validate", folder + "/spec.yaml"],
    ["train", folder + "/spec.yaml", *common, "--out", folder + "/run"],
    ["info", folder + "/run"],
    ["generate", folder + "/run", "--tokens", "2"],
]
for run in runs:
    assert main([*run, "--import", sys.argv[-1]]) == 0, run
mixer = {"kind": sys.argv[2], "n_heads": choice(1, 2)}
stem = {"kind": "tokens", "vocab_size": 256}
space = ModelSpace({"d_model": 16, "stem": stem, "blocks": repeat({"mixer": mixer}, 1, 2)})
assert space.sample(Xorshift64(1)).spec.blocks[0].mixer.kind == mixer["kind"]
model = load(folder + "/run")
print(model.spec.blocks[0].mixer.kind)
"""
OWN = """
from dataclasses import dataclass
from typing import ClassVar
from kizzasi.eml.attention import EmlAttentionSpec
from kizzasi.strict import register

@register
@dataclass(frozen=True)
class OwnSpec(EmlAttentionSpec):
    kind: ClassVar[str] = "KIND"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 100)
    return tmp_path


def programs(folder, *more):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, *more],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_programs_and_load_know_eml_attention(folder):
    (folder / "spec.yaml").write_text(SPEC.replace("KIND", "eml_attention"))
    assert programs(folder, "eml_attention", "json") == "eml_attention"


def test_programs_import_a_module_of_the_users_own(folder):
    (folder / "spec.yaml").write_text(SPEC.replace("KIND", "own_kind"))
    (folder / "own_module.py").write_text(OWN.replace("KIND", "own_kind"))
    assert programs(folder, "own_kind", "own_module") == "own_kind"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_import(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "--import MODULE" in capsys.readouterr().out


def test_a_module_that_is_not_there_or_fails_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "broken_own_module.py").write_text("1 / 0")
    for name, reason in (("no_such_own", "ModuleNotFoundError"), ("broken_own_module", "ZeroDiv")):
        assert main(["validate", "x.yaml", "--import", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--import {name}: {reason}" in line
    monkeypatch.undo()


def test_kinds_elsewhere_are_listed_and_suggested():
    assert "eml_attention" in list_mixers()
    for kind, message in (("eml_atention", "did you mean eml_attention"), (["x"], "unknown")):
        with pytest.raises(SpecError, match=message):
            MixerSpec.from_dict({"kind": kind})
