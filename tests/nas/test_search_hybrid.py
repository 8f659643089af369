"""Searches over models with holes: evolution and ASHA end to end, killed and resumed anywhere."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_search import killed_after, outcome

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec, load
from kizzasi.models.mixers.gated_delta import GatedDelta
from kizzasi.nas import report
from kizzasi.nas.search import SearchConfig, named_search
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.ready_made import read_space
from kizzasi.nas.study.journal import read_events

CONFIG = SearchConfig(
    space="hybrid",
    searcher="regularized",
    scheduler="asha",
    n_params=60_000,
    band=0.5,
    max_state_bytes=40_000,
    proxies=("flops", "grad_norm"),
    population=4,
    sample=2,
    side_by_side=3,
    rungs=(128, 384),
    search_tokens=2_000,
    lrs=(3e-3, 1e-2),
    n_sweep=2,
    n_finalists=2,
    final_tokens=128,
    final_seeds=2,
    seq_len=16,
    batch_size=4,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "text"
    path.write_bytes(b"".join(b"line %d of a small text\n" % (i * i % 97) for i in range(100)))
    return str(path)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    named_search(replace(CONFIG, data=data), folder)
    return folder


def events_of(folder: Path, kind: str) -> list[dict]:
    return [e for e in read_events(folder / "journal.jsonl") if e["event"] == kind]


def test_a_hybrid_search_leaves_a_winner_and_an_honest_result(finished):
    (result,) = events_of(finished, "result")
    candidates = {e["id"]: e for e in events_of(finished, "candidate")}
    means = {f["candidate"]: f["mean"] for f in result["finalists"]}
    assert result["best"] == min(means, key=means.__getitem__)
    assert load(finished / "best").spec.to_dict() == candidates[result["best"]]["spec"]
    assert list((finished / "trials").iterdir()) == []
    assert {e["group"] for e in candidates.values()} == {"preset", "random", "searched"}
    assert len(result["finalists"]) == 3  # two searched ones and a preset
    for final in result["finalists"]:
        assert (len(final["trials"]), final["mean"] > 0, final["spread"] >= 0) == (2, True, True)
    assert result["noise"]["floor"] > 0
    assert set(result["ties"]) <= {f["candidate"] for f in result["finalists"]}
    assert result["refused"]["params"] > 0
    assert "bits/byte" in (finished / "report.md").read_text()
    assert "noise floor" in report.table(report.summarise(read_events(finished / "journal.jsonl")))


def test_children_know_their_parents_and_come_once(finished):
    candidates = events_of(finished, "candidate")
    known: set[str] = set()
    space = read_space("hybrid")
    for e in candidates:
        assert e["id"] not in known
        assert set(e["parents"]) <= known
        assert (e["group"] == "searched") == bool(e["parents"])
        known.add(e["id"])
        assert e["state_bytes"] <= 40_000
        assert e["proxies"]["flops"] > 0
        assert e["proxies"]["grad_norm"] > 0
        if e["group"] != "preset":
            assert 30_000 <= e["params"] <= 90_000
            assert space.decode(e["genotype"]).spec.to_dict() == e["spec"]
    digests = [ModelSpec.from_dict(e["spec"]).digest for e in candidates]
    assert len(set(digests)) == len(digests)


def test_rungs_are_ashas_and_the_budget_is_kept(finished):
    trials, chosen = events_of(finished, "trial"), {}
    for e in events_of(finished, "settings"):
        chosen[e["family"]] = e["settings"]
    families = {e["id"]: e["family"] for e in events_of(finished, "candidate")}
    climbed = [e for e in trials if chosen[families[e["candidate"]]] == e["settings"]]
    n = [sum(e["rung"] == rung for e in climbed) for rung in ("0", "1")]
    assert n[1] <= n[0] // 3
    (result,) = events_of(finished, "result")
    assert result["tokens"] == 128 * n[0] + 256 * n[1]
    assert 2_000 <= result["tokens"] < 2_000 + 256


def test_searchers_begin_with_presets_that_lie_in_the_space(data, tmp_path):
    """The Mamba preset does: it is trained once, as a preset, and bred from as a founder."""
    config = replace(CONFIG, data=data, n_params=200_000, max_state_bytes=None, search_tokens=2_500)
    config = replace(config, population=2, sample=2, lrs=(3e-3,), proxies=())
    named_search(config, tmp_path / "run")
    candidates = events_of(tmp_path / "run", "candidate")
    assert len({e["id"] for e in candidates}) == len(candidates)
    (mamba,) = (e for e in candidates if e["name"] == "mamba preset")
    assert mamba["group"] == "preset"
    assert sum(e["group"] == "random" for e in candidates) == 1  # the other founder
    assert {p for e in candidates for p in e["parents"]} >= {mamba["id"]}


def test_those_with_one_main_mixer_share_a_learning_rate(finished):
    swept = {e["family"] for e in events_of(finished, "settings")}
    for e in events_of(finished, "candidate"):
        assert e["family"] in swept
        if e["group"] != "preset":
            kinds = [block["mixer"]["kind"] for block in e["spec"]["blocks"]]
            main = e["family"].removeprefix("mostly ")
            most = max(map(kinds.count, kinds))
            assert main == next(kind for kind in kinds if kinds.count(kind) == most)


def test_a_search_killed_again_and_again_ends_as_the_whole_one(finished, data, tmp_path):
    """Killed before the write of an event: what was done for it is lost, and done again."""
    n_events = len(read_events(finished / "journal.jsonl"))
    folder = tmp_path / "run"
    for n_more in (4, 9, n_events - 13 - 4, 3):
        with killed_after(n_more):
            named_search(replace(CONFIG, data=data), folder, resume=True)
    assert len(read_events(folder / "journal.jsonl")) == n_events - 1
    named_search(replace(CONFIG, data=data), folder, resume=True)
    assert outcome(folder) == outcome(finished)
    assert load(folder / "best").spec == load(finished / "best").spec


@pytest.mark.slow
def test_a_promotion_without_its_checkpoint_trains_anew_to_the_same_score(
    finished, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("kizzasi.nas.study.run.KEPT_CHECKPOINTS", 0)
    named_search(replace(CONFIG, data=data), tmp_path / "run")
    before, now = (
        {e["id"]: e["score"] for e in events_of(folder, "trial")}
        for folder in (finished, tmp_path / "run")
    )
    assert now == before


def test_random_search_starts_from_the_same_candidates(finished, data, tmp_path):
    """The control: equal founders, and then only chance, at equal compute."""
    config = replace(CONFIG, data=data, searcher="random", search_tokens=800, lrs=(3e-3,))
    named_search(config, tmp_path / "run")
    mine = [e["id"] for e in events_of(tmp_path / "run", "candidate")]
    theirs = [e["id"] for e in events_of(finished, "candidate")]
    assert mine[:5] == theirs[:5]
    groups = {e["group"] for e in events_of(tmp_path / "run", "candidate")}
    assert groups == {"preset", "random"}


def test_a_candidate_that_explodes_is_recorded_and_skipped(data, tmp_path, monkeypatch):
    def explode(self, *args, **kwargs):
        raise RuntimeError("this mixer is broken")

    monkeypatch.setattr(GatedDelta, "forward", explode)
    config = replace(
        CONFIG, data=data, n_finalists=1, final_seeds=1, search_tokens=1_200, lrs=(3e-3,)
    )
    named_search(config, tmp_path / "run")
    candidates = {e["id"]: e for e in events_of(tmp_path / "run", "candidate")}
    broken = {k for k, e in candidates.items() if "'gated_delta'" in str(e["spec"])}
    assert broken
    for e in events_of(tmp_path / "run", "trial"):
        assert (e["score"] is None) == (e["candidate"] in broken)
        assert "this mixer is broken" in (e["failure"] or "this mixer is broken")
    for own in broken:
        assert candidates[own]["proxies"]["grad_norm"] is None
        assert "this mixer is broken" in candidates[own]["proxy_failures"]["grad_norm"]
    (result,) = events_of(tmp_path / "run", "result")
    assert result["winner"] not in broken
    assert not broken & set(result["ranking"])


no_optuna = pytest.mark.skipif(not find_spec("optuna"), reason="optuna is not installed")
SPACE = """
d_model: {choice: [24, 32]}
stem: {kind: tokens, vocab_size: 256}
tie_head: true
blocks:
  repeat: {mixer: {choice: [{kind: s4d, d_state: 8}, {kind: attention, n_heads: 2}]}}
  low: 1
  high: 2
"""


@pytest.mark.parametrize(
    ("searcher", "scheduler"),
    [
        ("random", "hyperband"),
        pytest.param("random", "halving", marks=pytest.mark.slow),
        pytest.param("evolution", "stopping", marks=pytest.mark.slow),
        pytest.param("local", "pasha", marks=pytest.mark.slow),
        ("nsga2", "pdh"),
        pytest.param("tpe", "asha", marks=no_optuna),
    ],
)
def test_every_searcher_and_scheduler_runs(data, tmp_path, searcher, scheduler):
    (tmp_path / "space.yaml").write_text(SPACE)
    config = replace(
        CONFIG,
        data=data,
        space=str(tmp_path / "space.yaml"),
        searcher=searcher,
        scheduler=scheduler,
        n_params=11_000,
        max_state_bytes=None,
        max_latency_ms=1e6 if searcher == "nsga2" else None,
        proxies=(),
        n_pool=6,
        population=2,
        rungs=(64, 192),
        search_tokens=None,
        lrs=(3e-3,),
        n_finalists=1,
        final_seeds=1,
        final_tokens=64,
    )
    named_search(config, tmp_path / "run")
    (result,) = events_of(tmp_path / "run", "result")
    assert result["winner"]
    assert bool(events_of(tmp_path / "run", "measured")) == (searcher == "nsga2")
    before = outcome(tmp_path / "run")
    named_search(config, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"space": "hybird"}, SpecError, "space: 'hybird' unknown; did you mean hybrid"),
        ({"space": "nowhere.yaml"}, SpecError, "nowhere.yaml: cannot read the space"),
        ({"searcher": "proxy"}, SpecError, "searcher: .* choose another searcher for hybrid"),
        ({"searcher": "regular"}, SpecError, "searcher: 'regular' is .* did you mean regularized"),
        ({"scheduler": "halving"}, SpecError, "search_tokens: 2000 with halving"),
        ({"proxies": ("grad",)}, SpecError, "proxies: 'grad' unknown; did you mean grad_norm"),
        ({"rungs": (128, 64)}, SpecError, "rungs"),
        ({"eta": 1}, SpecError, "eta: 1 is too small"),
        ({"scheduler": "pdh", "population": 99}, SpecError, "end before the budget 384 opens"),
        ({"max_state_bytes": 1}, SpecError, "constraints: none of .* candidates .* state_bytes"),
    ],
)
def test_bad_settings_are_named(data, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        named_search(replace(CONFIG, data=data, **changes), tmp_path / "run")
    if "max_state_bytes" not in changes:
        assert not (tmp_path / "run").exists()


def test_another_space_cannot_resume(finished, data):
    template = dict(read_space("hybrid").template, d_model=48)
    other = ModelSpace(template)
    with pytest.raises(StudyError, match="cannot resume another search; template"):
        named_search(replace(CONFIG, data=data), finished, other, resume=True)
