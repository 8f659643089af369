"""Names are where one looks for them, and cost nothing until they are used."""

import importlib
import subprocess
import sys

import pytest

import kizzasi
from kizzasi import models
from kizzasi.models import channels, mixers
from kizzasi.models.mixer import ChannelSpec, MixerSpec


@pytest.mark.parametrize("name", kizzasi.__all__)
def test_every_name_of_the_package_is_there(name):
    assert name in dir(kizzasi)
    assert getattr(kizzasi, name) is not None


def test_hello_world_needs_one_import():
    model = kizzasi.build_model(kizzasi.presets.mamba(16, 1, 32))
    assert isinstance(model, kizzasi.SequenceModel)
    assert kizzasi.load is models.load
    assert kizzasi.mixers.MambaSpec(d_state=2) == mixers.MambaSpec(d_state=2)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        kizzasi.laod  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


def test_importing_the_package_imports_nothing():
    code = "import sys, kizzasi; print('torch' in sys.modules, 'kizzasi.models' in sys.modules)"
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.split() == ["False", "False"]


@pytest.mark.parametrize(("room", "family"), [(mixers, MixerSpec), (channels, ChannelSpec)])
def test_specs_and_modules_stand_beside_each_other(room, family):
    for spec in family.registry.values():
        if not spec.__module__.startswith(room.__name__):
            continue
        assert getattr(room, spec.__name__) is spec
        module = spec.__name__.removesuffix("Spec")
        there = getattr(importlib.import_module(spec.__module__), module)
        assert getattr(room, module) is there
        assert {module, spec.__name__} <= set(room.__all__)


def test_all_names_of_models_exist():
    assert all(getattr(models, name) is not None for name in models.__all__)
    assert {"register", "presets", "Layer", "parameter_groups"} <= set(models.__all__)
