"""Damaged and hostile files: one line, exit code 2, little memory, and nothing else is touched."""

import contextlib
import copy
import io
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kizzasi.cli import main
from kizzasi.errors import KizzasiError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.nas.report.model_card import model_card
from kizzasi.nas.results.events import check_events
from kizzasi.nas.results.summary import Summary, summarise
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.study.journal import read_run
from kizzasi.train.trainer import read_training

sys.path.insert(0, str(Path(__file__).parent / "nas"))
from made_up_runs import complete_events, evolved_events

MOST_BYTES = 500 * 2**20  # beyond what is held; a program holds some 400 MiB before it reads
ESC = "\x1b[2J\n\u202e"
VALUES = (None, True, 0, -1, 3, 1.5, 1e308, 10**30, 10**400, "", "x", ESC, "\udcff", [], [1], {})
VALUES += ([[1]], {"a": 1}, {ESC: 1}, "0", ["x"], [None], {"x": None}, -0.5, 2**63, "1e9", [[], {}])


def places(value, path=()):
    """The path of every part of plain data."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 8)):
            yield from places(value[i], (*path, i))


def damaged(value, chance: random.Random):
    """Plain data with one part replaced, removed, or renamed."""
    value = copy.deepcopy(value)
    *way, last = chance.choice([*places(value)])
    part = value
    for key in way:
        part = part[key]
    how = chance.random()
    if how < 0.15:
        del part[last]
    elif how < 0.25 and isinstance(part, dict):
        part[chance.choice(["x", ESC, "d_modle", "kind", "choice", "repeat"])] = part.pop(last)
    else:
        part[last] = copy.deepcopy(chance.choice(VALUES))
    return value


def told(*words: object) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, err.getvalue()


def refused(call: Callable[[], object]) -> str:
    """The message of a refusal, or nothing."""
    try:
        call()
    except KizzasiError as error:
        return str(error)
    return ""


def require_refusal_or_success(code: int, error: str, case: object) -> None:
    """The contract of every program."""
    assert code in (0, 2), f"{error}\n{case!r:.2000}"
    if code == 2:
        assert len(error.splitlines()) == 1, error
        assert error.strip().isprintable(), error
        assert "Traceback" not in error


def held(name: str) -> int:
    """Bytes that this process holds ("VmRSS"), or has held at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


@pytest.fixture(autouse=True)
def little_memory():
    """Whatever was held by earlier tests: the kernel's high-water mark starts anew."""
    if not sys.platform.startswith("linux"):
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    yield
    assert held("VmHWM") - before < MOST_BYTES


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the files are; beside it lies what must stay as it is."""
    (tmp_path / "mine").write_text("precious")
    inner = tmp_path / "run"
    inner.mkdir()
    yield inner
    assert sorted(os.listdir(tmp_path)) == ["mine", "run"]
    assert (tmp_path / "mine").read_text() == "precious"


def told_of(summary: Summary) -> str:
    """The model card, if there is a model."""
    best = summary.saved or summary.winner
    ready = summary.finished and best is not None
    return model_card(summary, ModelSpec.from_dict(best.entry["spec"])) if ready else ""


def test_journals(folder):
    chance, counts = random.Random(0), Counter[str]()
    made = (complete_events(failures=True), evolved_events(), complete_events())
    runs = json.loads(json.dumps(made))
    kinds = [
        {kind: [e for e in run if e["event"] == kind] for kind in kinds_of(run)} for run in runs
    ]
    journal = folder / "journal.jsonl"
    for i in range(1100):
        which = chance.randrange(3)
        event = chance.choice(kinds[which][chance.choice([*kinds[which]])])
        events = [damaged(e, chance) if e is event else e for e in runs[which]]
        error = refused(lambda events=events: check_events(events, "journal.jsonl"))
        assert error == "" or error.startswith("journal.jsonl, line ")
        assert len(error.splitlines()) < 2
        counts[error[:1]] += 1
        if not error and counts[""] % 50 == 0:
            refused(lambda events=events: told_of(summarise(events)))
        if i % 40 == 0:
            journal.write_text("\n".join(map(json.dumps, events)) + "\n")
            code, error = told("report", folder)
            require_refusal_or_success(code, error, events)
    assert min(counts.values()) > 100, counts
    lines = [json.dumps(event).encode() for event in runs[0]]
    for _ in range(60):
        some = list(lines)
        i = chance.randrange(len(some))
        line = bytearray(some[i])
        line[chance.randrange(len(line))] = chance.randrange(256)
        some[i] = chance.choice(
            [bytes(line), line[: len(line) // 2], b"{}", b"[" * 10**5, b"\0" * 9]
        )
        journal.write_bytes(b"\n".join(some) + chance.choice([b"", b"\n"]))
        refused(lambda: read_run(journal))
    for line in (b"{}", b'{"event":"trial"}', b"[" * 10**5, b'{"event":["x"]}', b'{"event":"lr"}'):
        journal.write_bytes(lines[0] + b"\n" + line + b"\n" + lines[1] + b"\n")
        code, error = told("report", folder)
        require_refusal_or_success(code, error, line)
        assert code == 0 or "line 2" in error


def kinds_of(run) -> list[str]:
    return sorted({event["event"] for event in run})


SPEC = ModelSpec(
    8, (BlockSpec(MambaSpec(d_state=4)), BlockSpec(AttentionSpec(2), SwiGLUSpec(8))), Tokens(16)
)
BLOCK = {"mixer": {"kind": "attention", "n_heads": {"choice": [1, 2]}}}
SPACES = (
    {"d_model": {"choice": [8, 16]}, "stem": {"kind": "tokens", "vocab_size": 9},
     "blocks": {"repeat": BLOCK, "low": 1, "high": 3}},
    {"d_model": 8, "stem": {"kind": "tokens", "vocab_size": 9},
     "blocks": {"pattern": {"choice": ["ab", "a"]}, "n_layers": 3,
                "letters": {"a": BLOCK, "b": BLOCK}}},
)  # fmt: skip
LAUGHS = "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]\n" for i in range(1, 26))
DEEP = "d_model: " + "[" * 5000
HOSTILE = {
    "laughs": LAUGHS + "d_model: *a25\nblocks: []\nstem: {kind: tokens, vocab_size: 2}\n",
    "laughs as blocks": LAUGHS + "blocks: *a25\n",
    "itself": "blocks: &a [*a]\n",
    "deep": DEEP,
    "digits": f"d_model: {'1' * 5000}\n",
    "hex digits": f"d_model: 0x{'f' * 5000}\n",
    "a date": "x: 2001-99-99\n",
    "a list as kind": "{d_model: 8, blocks: [{mixer: {kind: [tokens]}}], stem: {kind: {a: 1}}}",
    "python": "!!python/object/apply:os.system ['touch ../never']",
    "escape": '"\\e[2J\\n": 1',
    "comment": "# " + "x" * 2**20,
    "layers": "{d_model: 8, stem: {kind: tokens, vocab_size: 9}, blocks: {pattern: a, n_layers: "
    "1000000000, letters: {a: {mixer: {kind: attention, n_heads: 2}}}}}",
    "latin": "caf\xe9",
    "sexagesimal": "x: " + ":".join(["59"] * 5000),
    "json digits": '{"d_model": ' + "1" * 5000 + "}",
    "json float": '{"d_model": 8, "norm_eps": 1' + "0" * 399 + "}",
    "json deep": "[" * 10**5,
    "json twice nan": '{"d_model": NaN}',
}


@pytest.mark.parametrize("verb", ["validate", "search"])
def test_hostile_specs_and_spaces(verb, folder, monkeypatch):
    monkeypatch.chdir(folder)  # where "../never" is beside what must stay as it is
    start = time.process_time()
    for name, text in HOSTILE.items():
        path = folder / ("x.json" if name.startswith("json") else "x.yaml")
        path.write_bytes(text.encode("latin-1"))
        more = (
            () if verb == "validate" else ("--space", path, "--out", folder / "out", "--workers", 1)
        )
        code, error = told("validate", path) if verb == "validate" else told("search", *more)
        require_refusal_or_success(code, error, name)
        assert code == 2, name
    assert time.process_time() - start < 20
    assert not (folder / "out").exists()


def test_specs(folder):
    chance, n = random.Random(1), 0
    for i in range(300):
        path = folder / ("x.json" if i % 2 else "x.yaml")
        data = damaged(SPEC.to_dict(), chance)
        path.write_text(json.dumps(data))  # which is YAML too
        code, error = told("validate", path)
        require_refusal_or_success(code, error, data)
        n += code == 2
    assert n > 150


def test_spaces(folder):
    chance, n = random.Random(2), 0
    path = folder / "space.json"
    for i in range(300):
        path.write_text(json.dumps(damaged(SPACES[i % 2], chance)))
        n += refused(lambda: ModelSpace.from_file(path, Tokens(9)).sample(Xorshift64(1))) != ""
    assert n > 100


def test_checkpoints_of_trainings(folder):
    SPEC.to_file(folder / "spec.yaml")
    (folder / "text").write_bytes(bytes(i % 16 for i in range(600)))
    train = ["train", folder / "spec.yaml", "--data", folder / "text", "--out", folder / "out"]
    train += ["--seq-len", 8, "--batch-size", 2, "--steps", 8]
    from kizzasi.train import Recipe, Training, derive_seed
    from kizzasi.train.bytes import load_corpus

    task = load_corpus(folder / "text", test_fraction=0.1)
    recipe = Recipe(128, seq_len=8, batch_size=2, score_windows=512)
    training = Training(build_model(SPEC), task, recipe, derive_seed(0, "data"))
    training.run(64)
    whole = folder / "whole.pt"
    training.save(whole)
    saved, good = torch.load(whole), whole.read_bytes()
    (folder / "out").mkdir()
    state, chance = folder / "out" / "training.pt", random.Random(3)
    keys = ("step", "curve", "losses", "identity", "notes", "model", "optimizer")
    for i in range(250):
        if i % 2:
            key, changed = chance.choice(keys), dict(saved)
            changed[key] = chance.choice([v for v in VALUES if v != "\udcff"])
            torch.save(changed, state)
        else:
            content = bytearray(good)
            for _ in range(chance.choice((1, 5, 50))):
                content[chance.randrange(len(content))] = chance.randrange(256)
            state.write_bytes(content[: chance.choice([len(content), len(content) // 2, 5, 0])])
        error = refused(lambda: training.restore(state, read_training(state)))
        assert error == "" or "training.pt: cannot continue from it: " in error
        assert len(error.splitlines()) < 2
    for content in (b"", b"PK\x03\x04", b"cos\nsystem\n(S'touch x'\ntR.", good[:-30]):
        state.write_bytes(content)
        code, error = told(*train, "--resume")
        require_refusal_or_success(code, error, content)
        assert code == 2
        assert state.read_bytes() == content
    state.unlink()
    os.mkfifo(state)
    code, error = told(*train, "--resume")
    require_refusal_or_success(code, error, "a pipe")
    assert "not a regular file" in error
    state.unlink()


def tokenizer_file(**changes) -> dict:
    """A sound byte-level tokenizer.json of 256 ids."""
    pytest.importorskip("tokenizers")
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level |= {"use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"byte_fallback": False, "merges": [], "vocab": {c: i for i, c in enumerate(letters)}}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    whole |= {"normalizer": None, "pre_tokenizer": level, "post_processor": None}
    return {**whole, "decoder": level, "model": model, **changes}


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
PAD = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
PAD |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
CUT = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
RUNAWAY = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def test_tokenizers(folder):
    """Some ends well: what would pad or cut is not done."""
    from kizzasi.cli.generate import quiet
    from kizzasi.models.checkpoints.tokenizers import load_tokenizer

    sound = tokenizer_file()
    vocab = sound["model"]["vocab"]
    beyond = {**sound["model"], "vocab": {c: i + 1000 for c, i in vocab.items()}}
    unigram = {"type": "Unigram", "unk_id": None, "vocab": []}
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    cases = {
        "ids beyond": (tokenizer_file(model=beyond), False),
        "padding": (tokenizer_file(padding=PAD), True),
        "growth": (
            tokenizer_file(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 5}),
            0,
        ),
        "prepend": (tokenizer_file(normalizer={"type": "Prepend", "prepend": "x" * 10**6}), False),
        "runaway": (tokenizer_file(pre_tokenizer=RUNAWAY), False),
        "unigram": (tokenizer_file(model=unigram), False),
        "words": (tokenizer_file(model=words), False),
        "list": ([1], False),
    }
    path, chance = folder / "tokenizer.json", random.Random(4)
    (folder / "config.json").write_text("{}")

    def use() -> None:
        tokenizer = load_tokenizer(folder, 256)
        tokenizer.decode(tokenizer.encode("a" * 40 + "!"))

    with quiet():
        for name, (data, fine) in cases.items():
            path.write_text(json.dumps(data))
            error = refused(use)
            assert bool(error) != bool(fine), (name, error)
            assert len(error.splitlines()) < 2
        refused_of = [tokenizer_file(truncation=CUT)]
        small = {**sound, "model": {**sound["model"], "vocab": dict([*vocab.items()][:20])}}
        refused_of += [damaged(small, chance) for _ in range(150)]
        for data in refused_of:
            path.write_text(json.dumps(data))
            assert len(refused(use).splitlines()) < 2
        for content in (b"[" * 10**5, b"", b"\xff\xfe{}"):
            path.write_bytes(content)
            assert refused(use)
        os.unlink(path)
        with path.open("wb") as file:
            file.truncate(2**26 + 1)
        assert "larger than" in refused(use)


@pytest.mark.parametrize("eos", [-1, 2**70, [1, 2**70], "x", True, 1e300])
def test_ends_that_no_model_can_reach_end_nothing(folder, eos):
    from kizzasi.models.checkpoints.tokenizers import load_tokenizer

    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_file()))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert load_tokenizer(folder, 256).eos == ([1] if isinstance(eos, list) else None)
