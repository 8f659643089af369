"""The digests of 0.1 stay: journals, caches and checkpoints are found by them.

tests/golden/digests.json was written by release 0.1: every preset without arguments, and the models
of the exam. An entry is never changed; kinds that came later have none.
"""

import json
from pathlib import Path

import pytest
from cases import CHANNELS, MIXERS, model_spec

from kizzasi.models import presets

STORED = json.loads((Path(__file__).parent.parent / "golden/digests.json").read_text())
MODELS = {name: model_spec(name) for name in (*MIXERS, *CHANNELS)}


@pytest.mark.parametrize("name", STORED)
def test_digest_of_0_1(name):
    preset = name.removeprefix("presets.")
    spec = MODELS[name] if name in MODELS else getattr(presets, preset)()
    assert spec.digest == STORED[name]
