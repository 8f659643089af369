"""What a search would do at most: counts by hand."""

from dataclasses import replace

import pytest
from small_search import config, write_text

from kizzasi.nas.study import outline as module


def test_an_outline_counts_trials_and_tokens(tmp_path, monkeypatch):
    """Four presets and five candidates on two rungs, of whom a third climbs; two rates; finals."""
    monkeypatch.setattr(module, "_pace", lambda evaluator, spec, device: 100.0)
    small = replace(config(write_text(tmp_path)), slope_seeds=1, n_finalists=2)
    found = module.outline(small, workers=3)
    rungs, sweeps, finals = 2 * (4 + 5), 4 + 1, 3 * (1 + 1)
    assert (found["candidates"], found["baselines"]) == (5, 4)
    assert found["trials"] == rungs + sweeps + finals
    climbing = max(2, round(0.34 * 9)) + 1
    assert found["tokens"] == 9 * 512 + climbing * 512 + sweeps * 512 + finals * 1536
    assert (found["workers"], found["tokens_per_second"]) == (3, 300.0)
    assert found["seconds"] == pytest.approx(found["tokens"] / 300)


def test_where_results_decide_as_they_come_every_candidate_may_climb(tmp_path):
    """As one did that was announced as 23.3 million tokens at most, and took 24.9."""
    data = config(write_text(tmp_path))
    asha = replace(data, searcher="random", scheduler="asha", n_pool=5, rungs=(512, 1536))
    sweeps, finals = (4 + asha.n_sweep) * 512, 2 * asha.final_seeds * asha.final_tokens
    assert module.tokens_at_most(asha, 4) == (4 + 5) * 1536 + sweeps + finals
