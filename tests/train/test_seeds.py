"""Seeds of the parts of a run."""

from kizzasi.train.seeds import derive_seed


def test_derived_seeds_are_pinned_distinct_and_63_bits():
    seeds = {derive_seed(run, "trial", i) for run in range(10) for i in range(1000)}
    assert len(seeds) == 10_000
    assert 0 <= min(seeds) < 2**53
    assert 2**62 < max(seeds) < 2**63
    assert len({derive_seed(1), derive_seed(1, "1"), derive_seed(1, 1), derive_seed(11)}) == 4
    assert derive_seed(0, "trial", 1) == 9097331104069625126
