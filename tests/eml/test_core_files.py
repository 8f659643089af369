"""eml-core's JSON, read field by field; state_dicts; the crate's names."""

import json
import math
import random
import re
import tracemalloc

import pytest
import torch

import kizzasi.eml as eml
from kizzasi.eml import (
    AttentionBenchmark,
    BaselineAttention,
    EmlEvent,
    EmlEventLog,
    EmlModel,
    EndToEndTrainConfig,
    SafeTree,
    ScalingPoint,
    ToyEmlAttention,
    Trained,
    numerical_softmax,
    run_benchmark_with_trials,
)
from kizzasi.eml.core.events import event_from_dict
from kizzasi.errors import CheckpointError

READERS = {
    "tree": (SafeTree.from_json, lambda: SafeTree(3, 2, 2).to_json()),
    "toy": (ToyEmlAttention.from_json, lambda: ToyEmlAttention("t", 2, 1, 2, 3).to_json()),
    "baseline": (BaselineAttention.from_json, lambda: BaselineAttention("t", 2, 1, 2).to_json()),
    "model": (EmlModel.from_json, lambda: EmlModel(3, 2, 1).to_json()),
    "benchmark": (
        AttentionBenchmark.from_json,
        lambda: run_benchmark_with_trials(8, 2, 4, 3, 5).to_json(),
    ),
}
every_reader = pytest.mark.parametrize("kind", READERS)
BAD = [None, "3", 2.5, True, [], {}, -1, 10**9, 10**400, [None], ["x"], [[1]], math.nan, math.inf]


def places(value, path=()):
    """Every path to a value of nested JSON."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def put(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = put(value[path[0]], path[1:], new)
    return copied


@every_reader
def test_round_trip(kind):
    read, write = READERS[kind]
    text = write()
    assert read(text).to_json() == text
    json.loads(text, parse_constant=pytest.fail)


@every_reader
def test_damaged_files_are_checkpoint_errors_and_allocate_nothing(kind):
    """Every field replaced by every kind of wrong value, and 100 random cuts of the text."""
    read, write = READERS[kind]
    text = write()
    whole = json.loads(text)
    damaged = ["", "nonsense", "[" * 100_000, "NaN", "9" * 5000, text + "x"]
    for path in list(places(whole)):
        if len(path) < 2 or path[-1] in (0, "depth", "inputs", "heads", "params"):
            damaged += [json.dumps(put(whole, path, bad)) for bad in BAD]
    draw = random.Random(0)
    damaged += [text[: draw.randrange(len(text))] for _ in range(100)]
    messages = []
    tracemalloc.start()
    for each in damaged:
        try:
            assert json.loads(read(each).to_json(), parse_constant=pytest.fail) is not None
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 0.7 * len(damaged)
    assert not any("\n" in message or len(message) > 400 for message in messages)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


LARGE = '{"depth":3,"inputs":1000000000,"heads":1000,"params":[]}'
REFUSED = {
    "a large tree": (SafeTree.from_json, LARGE, "params: 0 values; the sizes call for 10000000"),
    "a width as text": (SafeTree.from_json, LARGE.replace("1000,", '"8",'), "heads: '8'; a whole"),
    "null": (SafeTree.from_json, '{"depth":0,"inputs":1,"heads":1,"params":[0,null]}',
             r"params\[1\]: null: the model had diverged"),
    "a bare NaN": (SafeTree.from_json, '{"depth":0,"inputs":1,"heads":1,"params":[0,NaN]}',
                   "NaN is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_messages_name_the_field(case):
    read, text, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        read(text)


@pytest.mark.parametrize(
    "change",
    [
        {"trained": "yes"}, {"name": 5}, {"training_rounds": -1}, {"scale": 0.1}, {"scale": "1"},
        {"d_model": 2.0}, {"d_k": None}, {"q_model": None}, {"q_model": []}, {"q_model": {}},
        {"tree_softmax": 1}, {"d_model": 33}, {"more": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_a_toy_model_takes_only_what_it_says(change):
    fields = json.loads(ToyEmlAttention("t", 2, 1, 2, 3).to_json())
    with pytest.raises(CheckpointError, match=re.escape(next(iter(change)))):
        ToyEmlAttention.from_json(json.dumps(fields | change))


def test_a_diverged_model_is_written_as_serde_does_and_not_read_back():
    for model in (SafeTree(3, 1, 1), ToyEmlAttention("t", 2, 1, 2, 3), EmlModel(2, 1, 1)):
        params = model.params if isinstance(model, EmlModel) else next(iter(model.parameters()))
        with torch.no_grad():
            params[0], params[1] = math.nan, -math.inf
        text = model.to_json()
        assert text.count("null") == 2
        with pytest.raises(CheckpointError, match="diverged"):
            type(model).from_json(text)


@pytest.mark.parametrize("kind", [ToyEmlAttention, BaselineAttention])
def test_a_state_dict_holds_what_defines_the_function(kind):
    depth = (3,) if kind is ToyEmlAttention else ()
    model = kind("t", 4, 2, 2, *depth, rng="seed")
    x = torch.rand(8, dtype=torch.float64)
    if kind is ToyEmlAttention:
        trained = json.loads(model.to_json()) | {"trained": True}
        model = kind.from_json(json.dumps(trained))
        assert model.tree_softmax
    model.training_rounds = 3
    again = kind("other", 4, 2, 2, *depth)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert again.is_trained == model.is_trained
    assert again.training_rounds == 3


def test_the_crates_names():
    model = ToyEmlAttention("t", 4, 2, 2, 3)
    assert (model.is_trained, model.buffer_len) == (False, 0)
    model.record([0.5] * 8, [0.5] * 8)
    assert model.buffer_len == 1
    assert torch.equal(numerical_softmax(torch.zeros(2)), torch.full((2,), 0.5))
    assert (eml.MAX_TOY_SEQ_LEN, eml.MAX_TOY_D_MODEL) == (8, 32)
    assert ScalingPoint(4, 8, 1, 2).seq_len == 4
    log = EmlEventLog()
    event = Trained("t", 4, 1.0, 0.5, True, 3)
    log.push(event)
    assert isinstance(event, EmlEvent)
    assert (len(log), list(log), log.drain(), len(log)) == (1, [event], [event], 0)
    for text in ({}, {"Trained": {}}, {"No": {}}, [], {"Trained": 1}):
        with pytest.raises(CheckpointError, match="no event"):
            event_from_dict(text)


def test_one_rule_for_both_ways_of_training():
    """On the CPU by `Walk`; with `batch`, or a softmax tree in use, by tensor operations."""
    x = torch.rand(20, 8, dtype=torch.float64) * 2 - 1
    ends = []
    for batch in (None, 8):
        model = ToyEmlAttention("t", 4, 2, 2, 3)
        for each in x:
            model.record(each, each)
        final = model.train_end_to_end(EndToEndTrainConfig(trials=150), batch)
        ends.append((model.last_accepts, [p.tolist() for p in model.parameters()]))
        error = (model(x[:16]) - x[:16]).square().mean().detach()
        assert final == pytest.approx(float(error), rel=1e-9)
    assert ends[0] == ends[1]
    model.tree_softmax = True
    final = model.train_end_to_end(EndToEndTrainConfig(trials=150))
    assert model.last_accepts > 0
    error = (model(x[:16]) - x[:16]).square().mean().detach()
    assert final == pytest.approx(float(error), rel=1e-9)
