"""Specs: strict both ways, one digest per value, every rule before any tensor."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model, pattern
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec
from kizzasi.strict import Strict, added, join


def small(**changes) -> ModelSpec:
    block = BlockSpec(AttentionSpec(n_heads=2), MLPSpec())
    return ModelSpec(d_model=16, blocks=(block,), stem=Tokens(32)).replace(**changes)


def test_dict_and_file_round_trips(tmp_path):
    spec = small(dropout=0.1, tie_head=True)
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    for name in ("spec.yaml", "spec.json"):
        spec.to_file(tmp_path / name)
        assert ModelSpec.from_file(tmp_path / name) == spec


def test_digest_is_the_same_in_another_process_and_for_integer_floats():
    spec = small(dropout=0.0)
    code = (
        "import json,sys; from kizzasi.models import ModelSpec;"
        "print(ModelSpec.from_dict(json.load(sys.stdin)).digest)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(spec.to_dict()),
        text=True,
        capture_output=True,
        check=True,
    )
    assert out.stdout.strip() == spec.digest
    assert small(dropout=0).digest == spec.digest
    assert small(d_model=32).digest != spec.digest


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(d_modle=3), r"d_modle: unknown; did you mean d_model\?"),
        (
            lambda d: d["blocks"][0]["mixer"].update(n_head=2),
            r"blocks\[0\]\.mixer\.n_head: unknown",
        ),
        (lambda d: d["blocks"][0]["mixer"].update(kind="atention"), "did you mean attention"),
        (lambda d: d["blocks"][0]["mixer"].pop("kind"), r"blocks\[0\]\.mixer\.kind: missing"),
        (lambda d: d.update(d_model="16"), "d_model: expected int, got '16'"),
        (lambda d: d.update(d_model=True), "d_model: expected int, got True"),
        (lambda d: d.update(dropout=float("nan")), "dropout: nan is not finite"),
        (lambda d: d.update(norm="rmsnorm"), "norm: 'rmsnorm' is not one of"),
        (lambda d: d.pop("stem"), "stem: missing"),
        (lambda d: d.update(blocks="mmma"), "blocks: expected a list"),
        (lambda d: d.update(blocks=[3]), r"blocks\[0\]: expected a mapping"),
    ],
)
def test_bad_data_names_its_path(edit, message):
    data = small().to_dict()
    edit(data)
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model: 0 is not positive"),
        ({"d_model": 15}, r"blocks\[0\]\.mixer"),
        ({"blocks": ()}, "blocks: empty"),
        ({"dropout": 1.0}, "dropout: 1.0 is outside"),
        ({"stem": Tokens(0)}, "stem.vocab_size: 0 is not positive"),
        ({"stem": Signal(1, 1), "tie_head": True}, "tie_head: a signal stem has no embedding"),
        ({"d_model": 10**7}, "GiB; make d_model"),
    ],
)
def test_build_refuses_before_any_tensor(changes, message):
    with pytest.raises(SpecError, match=message):
        build_model(small(**changes))


def test_a_trillion_parameters_are_refused_with_their_size():
    with pytest.raises(SpecError, match=r"parameters need .* GiB"):
        build_model(small(d_model=2 * 10**5, blocks=small().blocks * 3))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "!!python/object/apply:os.system ['true']"),
        ("a.yaml", "a: [1, 2"),
        ("a.json", '{"d_model": '),
        ("a.json", "[" * 100_000),
        ("a.yaml", "[1, 2]"),
        ("b.yaml", None),
    ],
)
def test_unreadable_files_name_themselves(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SpecError, match=name):
        ModelSpec.from_file(tmp_path / name)


def test_pattern_tiles_over_depth_in_python_and_in_files():
    m, a = BlockSpec(MambaSpec()), BlockSpec(AttentionSpec(n_heads=2))
    blocks = pattern("mma", m=m, a=a, n_layers=5)
    assert blocks == (m, m, a, m, m)
    data = small(blocks=blocks).to_dict()
    data["blocks"] = {
        "pattern": "mma",
        "n_layers": 5,
        "letters": {"m": m.to_dict(), "a": a.to_dict()},
    }
    assert ModelSpec.from_dict(yaml.safe_load(yaml.safe_dump(data))).blocks == blocks
    for bad in ({"letters": "mx"}, {"letters": "m"}, {"letters": ""}):
        with pytest.raises(SpecError):
            pattern(**bad, m=m, a=a)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=8,
    )
)
def test_no_data_crashes_the_reader(data):
    for value in (data, {**small().to_dict(), "blocks": data}, {**small().to_dict(), "stem": data}):
        try:
            ModelSpec.from_dict(value)
        except SpecError:
            continue


def test_join():
    assert join("", "a") == "a"
    assert join("b", "a") == "b.a"


def test_mixers_in_each_others_place_are_refused():
    swapped = BlockSpec(MLPSpec(), MambaSpec())  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match=r"blocks\[0\].mixer: 'mlp' is a channel mixer"):
        small(blocks=(swapped,)).check()
    doubled = BlockSpec(MambaSpec(), MambaSpec())  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match=r"blocks\[0\].channel: 'mamba' is a sequence mixer"):
        small(blocks=(doubled,)).check()


def test_calls_name_what_is_misspelt_missing_or_too_much():
    attention = AttentionSpec(n_heads=2)
    for call, message in (
        (lambda: SwiGLUSpec(hiden=3), r"SwiGLUSpec.hiden: unknown; did you mean hidden\?"),
        (lambda: AttentionSpec(), r"AttentionSpec.n_heads: missing"),
        (lambda: AttentionSpec(2, n_heads=2), r"AttentionSpec.n_heads: given twice"),
        (lambda: AttentionSpec(2, 1, 4, 5), r"got 4 values by place; give window by name"),
        (lambda: Signal(1, 2, 3, 4), r"Signal: got 4 values by place; it has 2 fields"),
        (lambda: AttentionSpec("2"), r"n_heads: expected int, got '2'"),
        (lambda: AttentionSpec(2, position="rop"), r"position: 'rop' .* did you mean rope\?"),
        (lambda: small(blocks=(attention,)), r"blocks\[0\]: .* wrap it: BlockSpec\(AttentionSpec"),
        (lambda: small(blocks=BlockSpec(attention)), r"blocks: .* write \(BlockSpec\(..\),\)"),
        (lambda: BlockSpec({"kind": "atention"}), r"mixer.kind: 'atention' .* attention"),
        (lambda: BlockSpec(3), r"mixer: expected a mapping, got 3"),
        (lambda: small(stem=16), r"stem: expected a mapping, got 16"),
    ):
        with pytest.raises(SpecError, match=message):
            call()
    assert BlockSpec({"kind": "attention", "n_heads": 2}) == BlockSpec(attention)


def test_equal_specs_have_equal_digests_whatever_the_types():
    def blocks(kind, **fields):
        return [BlockSpec(kind(**fields), MLPSpec())]

    for a, b in (
        (
            small(blocks=blocks(AttentionSpec, n_heads=2, qk_norm=1)),
            small(blocks=blocks(AttentionSpec, n_heads=2, qk_norm=True)),
        ),
        (small(blocks=blocks(AttentionSpec, n_heads=2, qk_norm=0.0)), small()),
        (small(blocks=list(small().blocks)), small()),
        (small(dropout=-0.0), small()),
        (small(dropout=0), small()),
        (small(d_model=np.int64(16), dropout=np.float32(0.5)), small(dropout=0.5)),
        (
            small(blocks=blocks(RWKV7Spec, head_dim=np.int32(8))),
            small(blocks=blocks(RWKV7Spec, head_dim=8)),
        ),
        (small(blocks=blocks(MambaSpec, expand=2)), small(blocks=blocks(MambaSpec))),
    ):
        assert a == b == ModelSpec.from_dict(json.loads(json.dumps(a.to_dict())))
        assert hash(a) == hash(b)
        assert a.digest == b.digest
    assert small(blocks=blocks(AttentionSpec, n_heads=2, qk_norm=1)).digest != small().digest


def test_a_later_field_at_its_default_leaves_the_digest_alone():
    @dataclass(frozen=True)
    class Old(Strict):
        a: int = 1

    @dataclass(frozen=True)
    class New(Strict):
        a: int = 1
        b: float = added(0.5)
        c: Old = Old()

    assert New().to_dict() == {"a": 1, "b": 0.5, "c": {"a": 1}}
    assert New(b=0.5).canonical_json() == '{"a":1,"c":{"a":1}}'
    assert New(b=1).canonical_json() == '{"a":1,"b":1.0,"c":{"a":1}}'
    assert New.from_dict({"a": 1}) == New()


def test_specs_are_copied_and_pickled():
    spec = small()
    assert copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == spec
