"""What is passed around does not change underway: dataclasses are frozen but for those that keep a
tally, and what is many and alike is given by name."""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest

import kizzasi.nas
import kizzasi.train

GROWING = {  # of a tree or a line that is being read, and of who was judged so far
    "executors.files": {"_Leases"},
    "pipelines.compiling.stages": {"Line"},
    "pipelines.printing.line": {"Line"},
    "schedulers.pasha": {"_State"},
    "schedulers.pdh": {"_State"},
    "schedulers.stopping_asha": {"_Judged"},
    "spaces.template.encode": {"_Reading"},
    "spaces.template.nodes": {
        "Block",
        "Choice",
        "Leaf",
        "List",
        "Pattern",
        "Record",
        "Repeat",
        "Walk",
    },
    "study.flow": {"Sweep"},
}
ONESELF = {"ByteText", "Frames", "Labels"}  # tensors have no truth: equal is who is the same
BY_NAME = {"Finalist": (), "Search": ("space", "evaluator")}  # what may be given by place


def records():
    for package in (kizzasi.nas, kizzasi.train):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for kind in vars(importlib.import_module(module.name)).values():
                own = inspect.isclass(kind) and kind.__module__ == module.name
                if own and "__dataclass_params__" in vars(kind):
                    yield pytest.param(kind, id=f"{module.name}.{kind.__name__}")


@pytest.mark.parametrize("kind", list(records()))
def test_a_record_is_frozen_equal_by_value_and_given_by_name(kind):
    params, fields = kind.__dataclass_params__, dataclasses.fields(kind)
    room = kind.__module__.removeprefix("kizzasi.nas.")
    assert params.frozen == (kind.__name__ not in GROWING.get(room, ()))
    assert params.eq == (kind.__name__ not in ONESELF)
    assert (kind.__hash__ is not None) == params.frozen
    by_place = tuple(f.name for f in fields if f.init and not f.kw_only)
    assert kind.__name__ not in BY_NAME or by_place == BY_NAME[kind.__name__]
    assert kind.__name__ in BY_NAME or not any(f.kw_only for f in fields)
