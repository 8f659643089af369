"""The seed's search: golden parity through the general searchers, formulas, bad input, speed."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from kizzasi.errors import SpecError
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.results.rank_agreement import kendall_tau_b
from kizzasi.nas.searchers.arch_search import (
    ArchSearchConfig,
    EvolutionarySearcher,
    GridSearcher,
    RandomArchSearcher,
    search_best_arch,
)
from kizzasi.nas.spaces.families import (
    ArchCandidate,
    ArchSearchSpace,
    analytic_score,
    proxy_scores,
)
from kizzasi.nas.spaces.ready_made import hybrid
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.train import Recipe
from kizzasi.train.bytes import load_corpus

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "arch_search.jsonl"
GOLDEN = [json.loads(line) for line in GOLDEN_FILE.read_text().splitlines()]
SPACE, CONFIG = ArchSearchSpace(), ArchSearchConfig()
SEARCHERS = {
    "random_default_seed42": RandomArchSearcher(SPACE, CONFIG),
    "random_default_seed7": RandomArchSearcher(SPACE, replace(CONFIG, seed=7)),
    "evolution_default_seed42": EvolutionarySearcher(SPACE, CONFIG),
    "evolution_default_seed7": EvolutionarySearcher(SPACE, replace(CONFIG, seed=7)),
    "evolution_pop5_gen2_seed1": EvolutionarySearcher(
        SPACE, replace(CONFIG, population_size=5, n_generations=2, n_candidates=5, seed=1)
    ),
    "grid_default_cap10000": GridSearcher(SPACE, 10_000),
    "grid_default_cap100": GridSearcher(SPACE, 100),
}
MILLION = ArchSearchSpace(
    d_model_options=tuple(range(64, 1064, 100)),
    d_state_options=tuple(range(8, 18)),
    n_layers_options=tuple(range(1, 11)),
    model_types=("mamba", "rwkv", "s4", "transformer", *"abcdef"),
    expand_factor_options=tuple(i / 2 for i in range(10)),
    dropout_options=tuple(i / 10 for i in range(10)),
)


def scalar_proxy(candidate):
    return candidate.proxy_score()


def test_golden_file_is_covered():
    cases = {record["case"] for record in GOLDEN}
    assert cases == {"prng", *SEARCHERS}


@pytest.mark.parametrize("record", [r for r in GOLDEN if r["case"] == "prng"])
def test_golden_prng(record):
    seed = record["seed"]
    words, floats, shuffling = Xorshift64(seed), Xorshift64(seed), Xorshift64(seed)
    assert [words.next_u64() for _ in record["u64"]] == record["u64"]
    assert [floats.next_f64() for _ in record["f64"]] == record["f64"]
    items = list(range(10))
    shuffling.shuffle(items)
    assert items == record["shuffle10"]


@pytest.mark.parametrize(
    "record", [r for r in GOLDEN if r["case"] != "prng"], ids=lambda record: record["case"]
)
@pytest.mark.parametrize("vectorised", [True, False])
def test_golden_search(record, vectorised):
    searcher = SEARCHERS[record["case"]]
    result = (searcher if vectorised else replace(searcher, evaluate=scalar_proxy)).search()

    def check(candidate, score, expected):
        genes = {**asdict(candidate), "param_count": candidate.param_count()}
        assert genes == {key: value for key, value in expected.items() if key != "score"}
        assert score == pytest.approx(expected["score"], rel=0, abs=1e-12)

    assert result.n_evaluations == len(result.all_candidates) == record["n_evaluations"]
    check(result.best_candidate, result.best_score, record["best"])
    assert result.best_score == pytest.approx(record["best_score"], rel=0, abs=1e-12)
    if record["all"]:
        for (candidate, score), expected in zip(result.all_candidates, record["all"], strict=True):
            check(candidate, score, expected)


def test_search_best_arch_is_evolution():
    result = search_best_arch(SPACE, CONFIG)
    assert result.all_candidates == EvolutionarySearcher(SPACE, CONFIG).search().all_candidates


@pytest.mark.parametrize(
    ("model_type", "per_layer"),
    [
        ("mamba", 2 * 128 * (128 * 2 + 16 * 2) + 128),
        ("transformer", 8 * 128**2),
        ("rwkv", 5 * 128**2),
        ("s4", 2 * 128 * 16 + 128**2),
        ("hyena", 2 * 128**2),
    ],
)
def test_param_count_truncates_expand_factor(model_type, per_layer):
    for expand_factor in (2.0, 2.5, 2.99):
        candidate = ArchCandidate(128, 16, 4, model_type, expand_factor, 0.0)
        assert candidate.param_count() == 4 * per_layer
    assert ArchCandidate(128, 16, 4, "mamba", 0.9, 0.0).param_count() == 4 * (2 * 128 * 32 + 128)


def test_the_smallest_candidate_has_a_score():
    assert ArchCandidate(1, 1, 1, "mamba", 0.0, 0.0).proxy_score() == 0.0
    assert ArchCandidate(64, 0, 2, "mamba", 1.0, 0.0).proxy_score() == -math.inf


@pytest.mark.parametrize("seed", range(20))
def test_vectorised_scores_equal_scalar_ones(seed):
    grid = MILLION.iterate()
    some = np.random.default_rng(seed).integers(len(grid), size=50)
    at = int(some[0])
    piece = grid[at : at + 5000 : 97]
    assert proxy_scores(piece).tolist() == [c.proxy_score() for c in piece]
    assert proxy_scores([grid[int(i)] for i in some]).tolist() == [
        grid[int(i)].proxy_score() for i in some
    ]


def test_a_million_combinations_are_scored_by_columns(monkeypatch):
    """Two seconds on a free core; counted here is the work, which no other program slows down."""
    made = []
    check = ArchCandidate.__init__

    def counted(self, *genes):
        made.append(genes)
        check(self, *genes)

    monkeypatch.setattr(ArchCandidate, "__init__", counted)
    result = GridSearcher(MILLION, 10**6).search()
    assert result.n_evaluations == 10**6 == len(result.all_candidates)
    assert len(made) < 10, "candidates are made when somebody looks at them"
    some = result.all_candidates[::101]
    assert [score for _, score in some] == [candidate.proxy_score() for candidate, _ in some]
    assert result.best_score == result.best_candidate.proxy_score()
    assert result.best_score >= max(score for _, score in some)


def test_a_huge_grid_can_be_searched_up_to_a_cap():
    wide = tuple(range(1, 3001))
    space = ArchSearchSpace(wide, wide, wide, tuple(map(str, wide)), wide, (0.0,))
    assert space.size == 3000**5
    result = GridSearcher(space, 3).search()
    assert [c.expand_factor for c, _ in result.all_candidates] == [1, 2, 3]


def test_any_function_can_be_the_evaluator():
    def small(candidate):
        return -candidate.param_count()

    smallest = min(c.param_count() for c in SPACE.iterate())
    assert GridSearcher(SPACE, 10_000, small).search().best_score == -smallest
    assert search_best_arch(SPACE, CONFIG, small).best_score == -smallest
    assert RandomArchSearcher(SPACE, CONFIG, small).search().n_evaluations == 50


@pytest.mark.parametrize("name", list(asdict(SPACE)))
@pytest.mark.parametrize("empty", [(), []])
def test_an_empty_list_is_named(name, empty):
    space = replace(SPACE, **{name: empty})
    assert SPACE.is_valid()
    assert not space.is_valid()
    assert space.size == 0
    attempts = (
        RandomArchSearcher(space, CONFIG).search,
        EvolutionarySearcher(space, CONFIG).search,
        GridSearcher(space, 10).search,
        lambda: search_best_arch(space, CONFIG),
        lambda: space.sample(Xorshift64(1)),
        space.iterate,
    )
    for attempt in attempts:
        with pytest.raises(SpecError, match=f"{name}: the list is empty"):
            attempt()


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("d_model_options", (64, 0), "0 is not an integer >= 1"),
        ("d_state_options", (8.0,), "8.0 is not an integer >= 1"),
        ("n_layers_options", (2, True), "True is not an integer >= 1"),
        ("model_types", "mamba", "'mamba' is not a tuple"),
        ("model_types", ("mamba", 3), "3 is not a name"),
        ("expand_factor_options", (float("nan"),), "nan is not a finite number >= 0"),
        ("expand_factor_options", (-1.0,), "-1.0 is not a finite number >= 0"),
        ("dropout_options", (1.0,), r"1.0 is not a number in \[0, 1\)"),
        ("d_model_options", (64, 128, 64), "repeats an option"),
    ],
)
def test_an_impossible_option_is_named(name, options, rule):
    with pytest.raises(SpecError, match=f"{name}: .*{rule}"):
        GridSearcher(replace(SPACE, **{name: options}), 10).search()


@pytest.mark.parametrize(
    ("setting", "searcher"),
    [
        ("n_candidates", RandomArchSearcher(SPACE, replace(CONFIG, n_candidates=0))),
        ("population_size", EvolutionarySearcher(SPACE, replace(CONFIG, population_size=0))),
        ("n_generations", EvolutionarySearcher(SPACE, replace(CONFIG, n_generations=-1))),
        ("mutation_prob", EvolutionarySearcher(SPACE, replace(CONFIG, mutation_prob=1.5))),
        ("max_candidates", GridSearcher(SPACE, 0)),
        ("seed", RandomArchSearcher(SPACE, replace(CONFIG, seed=-1))),
    ],
)
def test_a_bad_setting_is_named(setting, searcher):
    with pytest.raises(SpecError, match=f"{setting}: "):
        searcher.search()


def test_searchers_train_each_model_once_and_survive_failures(tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(b"".join(b"%d of a text\n" % (i % 7) for i in range(200)))
    corpus = load_corpus(tmp_path / "text")
    space = ArchSearchSpace((8,), (3, 4), (1, 2), ("mamba", "transformer"), (1.0,), (0.0,))
    evaluator, jobs = MicroTrain(corpus, Recipe(64, seq_len=16, batch_size=2)), []
    call = MicroTrain.__call__

    def counted(self, job, report):
        jobs.append(job.spec)
        if len(job.spec.blocks) == 2:
            raise RuntimeError("out of luck")
        return call(self, job, report)

    monkeypatch.setattr(MicroTrain, "__call__", counted)
    found = GridSearcher(space, 99).search(evaluate=evaluator)
    again = RandomArchSearcher(space, ArchSearchConfig(9, seed=3)).search(evaluate=evaluator)
    assert len(jobs) == len({*jobs}) + len([one for one in again.trained if one.params])
    assert found.n_evaluations == 8
    failures = {one.candidate: one.failure for one in found.trained if one.failure}
    assert any("out of luck" in reason for reason in failures.values())
    assert any("does not divide" in reason for reason in failures.values()), "3 heads at 8"
    assert found.best_score == max(one.score for one in found.trained) > -math.inf
    assert found.best_candidate not in failures
    assert found.table.count("\n") == len(found.trained)
    assert found.table.count("failed") == len(failures)
    sized = [one for one in found.trained if one.params is not None]
    scores = [one.score for one in sized]
    taus = {"proxy": [one.proxy for one in sized], "params": [one.params for one in sized]}
    for name, values in taus.items():
        assert found.correlations[name] == pytest.approx(kendall_tau_b(values, scores))


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "s4", "transformer", "mamba+transformer"])
def test_the_analytic_score_of_a_model_is_that_of_its_genes(model_type):
    types = (model_type,)
    space = ArchSearchSpace((16, 32), (4, 8), (2, 3), types, (1.0, 2.5), (0.0,))
    for candidate in space.iterate():
        spec = candidate.to_spec(vocab_size=9)
        assert analytic_score(spec) == candidate.proxy_score()


def test_any_model_has_an_analytic_score():
    space, rng = hybrid(), Xorshift64(1)
    scores = {analytic_score(space.sample(rng).spec) for _ in range(20)}
    assert len(scores) > 10
    assert all(0 < score < 3 for score in scores)
