"""Tables of trained models: what is stored is what the models are, and searches can ask it."""

import json
import sys
from pathlib import Path

import pytest

from kizzasi.errors import SpecError
from kizzasi.models import build_model
from kizzasi.nas import Search
from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.schedulers import ASHA
from kizzasi.nas.searchers import Random
from kizzasi.nas.spaces.model_space import name_of
from kizzasi.nas.study.plan import Finals
from kizzasi.nas.tables import TrainedTable, hybrid216
from kizzasi.nas.tables.table import to_json

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_tables
import hybrid_table

TEMPLATE = {
    "d_model": 8,
    "blocks": [
        {"mixer": {"kind": "mamba"}},
        {"mixer": {"choice": [{"kind": "mamba"}, {"kind": "attention", "n_heads": 2}]}},
    ],
    "stem": {"kind": "tokens", "vocab_size": 256},
}
ABOUT = {"template": TEMPLATE, "rungs": [10, 30]}
ROWS = [  # valid by seed and rung, test by seed, facts
    ([[5.0, 4.0], [5.2, 4.2]], [4.1, 4.3], [1]),
    ([[4.9, 3.0], []], [3.5, None], [2]),
]


def small() -> TrainedTable:
    return TrainedTable.from_json(to_json(ABOUT, ["size"], ROWS))


def test_what_is_written_is_read_back() -> None:
    first, second = small().rows
    assert [name_of(row.spec) for row in (first, second)] == ["d8 2xmamba", "d8 mamba attention"]
    assert first.valid == {0: (5.0, 4.0), 1: (5.2, 4.2)}
    assert first.test == {0: 4.1, 1: 4.3}
    assert second.valid == {0: (4.9, 3.0)}
    assert second.test == {0: 3.5}
    assert second.facts == {"size": 2}
    assert first.mean() == pytest.approx(4.2)
    assert first.mean("valid") == pytest.approx(4.1)


def test_regret_and_rank_are_those_of_test_data() -> None:
    table = small()
    first, second = table.rows
    assert table.best is second
    assert table.regret(second.spec) == 0
    assert table.regret(first.spec) == pytest.approx(0.7)
    assert (table.rank(second.spec), table.rank(first.spec)) == (1, 2)


def test_a_job_is_answered_by_its_own_seed_rung_and_split() -> None:
    table, told = small(), []
    spec = table.rows[0].spec
    assert table(Job(spec, 10, 3), told.append).score == 5.2  # seed 3 of two: the second
    assert table(Job(spec, 30, 0), told.append).score == 4.0
    assert table(Job(spec, 30, 1, split="test"), told.append).score == 4.3
    assert told == [10, 30, 30]
    with pytest.raises(SpecError, match="budget 20: the table has 10, 30 alone"):
        table(Job(spec, 20, 0), told.append)
    other = hybrid216().rows[0].spec
    with pytest.raises(SpecError, match="no model of this table"):
        table(Job(other, 10, 0), told.append)


def test_a_table_that_misses_a_model_is_refused() -> None:
    with pytest.raises(SpecError, match="rows: 1 for 2 models"):
        TrainedTable.from_json(to_json(ABOUT, ["size"], ROWS[:1]))


def test_a_search_asks_the_table(tmp_path) -> None:
    table = hybrid216()
    first, last = table.rungs[0], table.rungs[-1]
    found = Search(
        table.space,
        table,
        searcher=Random(9, 1, distinct=True),
        scheduler=ASHA(9, first, last),
        finals=Finals(n=2, budget=last, seeds=2),
        metric="bits/byte",
        folder=tmp_path / "run",
    ).run()
    best = table.row(found.best.spec)
    ends = {scores[-1] for scores in best.valid.values()}
    assert set(found.best.scores.values()) <= ends
    assert 1 <= table.rank(found.best.spec) <= len(table.rows)


def test_the_stored_table_is_whole_and_of_these_models() -> None:
    table = hybrid216()
    assert len(table.rows) == 216
    assert len({row.spec.digest for row in table.rows}) == 216
    params = [row.spec.cost(1).params for row in table.rows]
    assert min(params) > 111_000
    assert max(params) < 115_000
    at = table.about["facts at"]
    for row in table.rows:
        cost = row.spec.cost(at)
        assert row.facts["params"] == cost.params
        assert row.facts["flops"] == pytest.approx(cost.flops)
        for scores in row.valid.values():
            assert len(scores) == len(table.rungs)
            assert 8 > scores[0] > scores[-1] > 1
        assert row.test
        assert row.test.keys() == row.valid.keys()
    json.dumps(dict(table.about))


def test_fronts_of_the_table() -> None:
    """Of all models no model is on the front that another dominates; with as many candidates as
    there are models, random draws find it."""
    table = hybrid216()
    found = bench_tables.front(table, "state_bytes", 1, (len(table.rows),))
    assert 0 < found["single families"] < found["all"] <= 1
    scores = [(row["state_bytes"], row["score"]) for row in found["front"]]
    every = [(row.facts["state_bytes"], row.mean()) for row in table.rows]
    assert scores == sorted(scores, reverse=True)
    for cost, score in scores:
        assert not any(c <= cost and s < score for c, s in every)
    for cost, score in every:
        assert any(c <= cost and s <= score for c, s in scores)
    by_valid = found["searched"][len(table.rows)]["random"]
    assert 0.9 * found["all"] < by_valid <= found["all"]


def test_tuned_models_are_compared_over_the_same_seeds() -> None:
    gaps = [-0.3, -0.2, -0.2, -0.2, -0.1]
    base = [2.0, 3.0, 4.0, 5.0, 6.0]

    def tuned(tests, rate):
        return {"rate": rate, "test": dict(zip("23456", tests, strict=True))}

    found = {
        "tune 43": tuned(base, 0.008),
        "tune 53": tuned([a + b for a, b in zip(base, gaps, strict=True)], 0.016),
        "train 1 seed 0": {"valid": [], "test": 1.0},
    }
    lines = hybrid_table.tuned_rows(found)
    assert lines[0] == "| model | parameters | rate | test | less d64 3xmamba |"
    # Student's t of 4 degrees of freedom: 2.776; standard deviation of the gaps .0707
    assert lines[2] == (
        "| d64 mamba mamba2 short_conv+swiglu | 114,360 | 0.016 | 3.8000 | -0.200 ± 0.088 |"
    )
    assert lines[3] == "| d64 3xmamba | 114,560 | 0.008 | 4.0000 |  |"


@pytest.mark.slow
def test_a_stored_score_comes_out_again() -> None:
    """The first rung of one model, trained anew as `about` says."""
    from kizzasi.train import Recipe, Training, derive_seed
    from kizzasi.train.open import open_task

    table = hybrid216()
    task, row = open_task(table.about["data"]), table.rows[43]
    if task.digest != table.about["digest"]:
        pytest.skip("another Python: its standard library is other text")
    recipe = Recipe(**table.about["recipe"])
    training = Training(build_model(row.spec, seed=0), task, recipe, derive_seed(0, "data"))
    assert training.run(table.rungs[0]) is None
    assert training.score() == pytest.approx(row.valid[0][0], abs=2e-3)
