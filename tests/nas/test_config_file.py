"""A config as nested YAML: what it says is what is searched, and what nothing reads is refused."""

from dataclasses import fields, replace

import pytest
from small_search import SPACE, config, write_text

from kizzasi import cli
from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.search import SearchConfig, named_search
from kizzasi.nas.spaces.constraints import Constraints, Feasible
from kizzasi.nas.spaces.ready_made import hybrid, read_space, tiny
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.study.config import usual_rates
from kizzasi.nas.study.config_file import SECTIONS, nested, read_config, unread, write_config
from kizzasi.nas.study.journal import read_events
from kizzasi.nas.study.named import constraints_of


def test_every_setting_has_one_section():
    placed = [name for names in SECTIONS.values() for name in names]
    assert sorted([*placed, "seed"]) == sorted(field.name for field in fields(SearchConfig))


@pytest.mark.parametrize(
    "chosen",
    [
        SearchConfig(),
        SearchConfig(searcher="grid", scheduler="pdh", population=2, lrs=(1e-3,), seed=7),
        SearchConfig(space="families", searcher="proxy", scheduler="halving", keep=0.5),
        SearchConfig(screens=("inherit",), screen_tokens=64, max_state_bytes=9, bounds_len=8),
    ],
)
def test_a_config_is_read_as_it_was_written(tmp_path, chosen):
    write_config(chosen, tmp_path / "config.yaml")
    found, given = read_config(tmp_path / "config.yaml")
    assert found == chosen
    assert not unread(chosen).keys() & set(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("searchr: {}", "searchr: unknown; did you mean searcher"),
        ("searcher: {popluation: 3}", "searcher.popluation: unknown; did you mean population"),
        ("finals: {population: 3}", "finals.population: unknown"),
        (
            "searcher: {name: random, mutation: 0.2}",
            "mutation: nothing reads it: searcher random does not read it; regularized, evol",
        ),
        ("scheduler: {keep: 0.5}", "keep: nothing reads it: scheduler asha .* halving would"),
        ("screens: {screen_width: 3}", "screen_width: nothing reads it: there are no screens"),
        ("space: {bounds_len: 3}", "bounds_len: nothing reads it"),
        ("searcher: {name: regular}", "searcher: 'regular' .*did you mean regularized"),
        ("training: {precision: fp8}", "precision"),
        ("searcher: 3", "searcher: a section is a mapping"),
        ("[1, 2]", "a config is a mapping of sections"),
        ("a: [", "not YAML"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SpecError, match=message):
        read_config(tmp_path / "c.yaml")


def test_the_command_line_reads_a_config_and_refuses_idle_flags(tmp_path, capsys):
    small = replace(config(write_text(tmp_path)), n_best=3)
    write_config(small, tmp_path / "c.yaml")
    base = ["search", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "c.yaml")]
    assert cli.main([*base, "--dry-run", "--device", "auto", "--best", "5"]) == 0
    assert "7 candidates" not in capsys.readouterr().out
    assert cli.main([*base, "--mutation", "0.5"]) == 2
    assert "mutation: nothing reads it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_holds_its_config_and_a_text_of_its_own_is_the_test(tmp_path):
    (tmp_path / "other").write_bytes(b"".join(b"another %d text\n" % n for n in range(60)))
    small = replace(
        config(write_text(tmp_path)),
        test=str(tmp_path / "other"),
        lrs=(3e-3,),
        n_best=1,
        n_random=1,
        n_outside=0,
        proxies=(),
    )
    named_search(small, tmp_path / "run", SPACE)
    assert read_config(tmp_path / "run" / "config.yaml")[0] == small
    events = read_events(tmp_path / "run" / "journal.jsonl")
    assert events[0]["data"]["n_test"] == (tmp_path / "other").stat().st_size
    with_share = replace(small, test=None)
    assert {e["rung"] for e in events if e["event"] == "trial"} >= {"final", "test"}
    assert nested(with_share)["data"]["test"] is None


@pytest.mark.parametrize("n_params", [10_000, 10_000_000, 1_000_000_000])
def test_spaces_and_rates_stretch_to_the_budget(n_params):
    feasible = Feasible(
        hybrid(n_params=n_params), Constraints(params=(0.8 * n_params, 1.2 * n_params))
    )
    rng = Xorshift64(1)
    for _ in range(2):
        assert 0.8 * n_params <= feasible.sample(rng).spec.cost(1).params <= 1.2 * n_params
    usual = usual_rates("muon", 200_000)
    assert (usual_rates("muon", n_params)[0] < usual[0]) == (n_params > 200_000)
    assert read_space("hybrid", n_params=300_000).template == hybrid().template  # pyright: ignore


def test_a_grid_takes_all_candidates_in_order(tmp_path):
    small = replace(
        config(write_text(tmp_path)),
        space="tiny",
        searcher="grid",
        n_pool=3,
        band=0.9,
        lrs=(3e-3,),
        proxies=(),
    )
    named_search(small, tmp_path / "run")
    entered = [
        e
        for e in read_events(tmp_path / "run" / "journal.jsonl")
        if e["event"] == "candidate" and e["group"] != "preset"
    ]
    wanted = Feasible(tiny(), Constraints(params=(2_200, 41_800))).iterate(3)
    assert [ModelSpec.from_dict(e["spec"]) for e in entered] == [c.to_spec() for c in wanted]


def test_the_band_is_a_share_of_the_size_on_either_side():
    config = SearchConfig(data="x", n_params=200_000, band=0.25)
    assert constraints_of(config).params == (150_000, 250_000)
