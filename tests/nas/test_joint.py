"""Settings as genes: proposed, trained, judged, told and resumed with the architecture."""

import json

import pytest
from small_search import SPACE, killed_after, outcome, write_text

from kizzasi.cli import main
from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.models.mixers import MambaSpec
from kizzasi.nas import (
    ASHA,
    Finals,
    MicroTrain,
    ModelSpace,
    RegularizedEvolution,
    Search,
    SearchConfig,
    Xorshift64,
    choice,
    repeat,
)
from kizzasi.nas.spaces.joint import Joint
from kizzasi.nas.study.config_file import nested, read_config
from kizzasi.nas.study.journal import read_events
from kizzasi.testing import check_space
from kizzasi.train import Recipe
from kizzasi.train.open import open_task

GENES = {"lr": (1e-3, 4e-3, 1.6e-2), "batch_size": (2, 4), "dropout": (0.0, 0.2)}
MAMBA = {"mixer": {"kind": "mamba", "d_state": choice(4, 8)}}
MODELS = ModelSpace(
    {
        "d_model": choice(8, 12),
        "stem": {"kind": "tokens", "vocab_size": 256},
        "blocks": repeat(MAMBA, 1, 2),
    }
)
BASELINE = ModelSpec(8, (BlockSpec(MambaSpec(d_state=4)),), Tokens(256))


def score(job, report):
    """Best at one learning rate and batch; the model hardly matters."""
    lr, batch = job.settings["lr"], job.settings.get("batch_size", 4)
    report(job.budget)
    return 3 + abs(lr - 4e-3) * 100 + (batch != 2) + job.spec.dropout + 1e-6 * job.spec.d_model


def search(folder, **changes) -> Search:
    usual = {
        "metric": "loss",
        "searcher": RegularizedEvolution(5, 3, 24, 0.3, 0),
        "scheduler": ASHA(24, 1, 3),
        "baselines": {"mine": BASELINE},
        "settings": {"lr": (1e-3, 4e-3)},
        "genes": GENES,
        "finals": Finals(1, seeds=2),
        "folder": folder,
    }
    return Search(MODELS, score, **{**usual, **changes})


@pytest.mark.parametrize("space", [MODELS, SPACE])
def test_is_a_space(space):
    joint = Joint(space, {"lr": (1e-3, 2e-3), "dropout": (0.0, 0.1)})
    check_space(joint, stem=Tokens(256))
    assert joint.size == 4 * space.size
    assert len(joint.iterate(limit=9)) == 9


def test_genes_move_one_by_one():
    joint, rng = Joint(MODELS, GENES), Xorshift64(3)
    one = joint.sample(rng)
    assert joint.mutate(one, rng, 0.0) == one
    moved = [dict(joint.mutate(one, rng, 0.5).chosen) for _ in range(60)]
    for name, values in GENES.items():
        assert {m[name] for m in moved} == set(values)
    a, b = joint.sample(rng), joint.sample(rng)
    children = [dict(joint.crossover(a, b, rng).chosen) for _ in range(40)]
    for name in GENES:
        assert {c[name] for c in children} == {dict(a.chosen)[name], dict(b.chosen)[name]}


def test_a_search_finds_settings_with_the_model(tmp_path):
    found = search(tmp_path).run()
    events = read_events(tmp_path / "journal.jsonl")
    entries = {e["id"]: e for e in events if e["event"] == "candidate"}
    searched = [e for e in entries.values() if e["group"] != "preset"]
    assert len({json.dumps(e["spec"]) for e in searched}) < len(searched)  # one model, other genes
    for trial in (e for e in events if e["event"] == "trial"):
        entry = entries[trial["candidate"]]
        if entry["group"] == "preset":
            assert set(trial["settings"]) == {"lr"}
        else:
            assert trial["settings"] == entry["settings"]
            assert set(entry["settings"]) == {"lr", "batch_size"}
            assert entry["genotype"]["dropout"] == entry["spec"]["dropout"]
    swept = [e for e in events if e["event"] == "settings"]
    assert [e["family"] for e in swept] == ["mine"]
    winner = entries[found.summary.result["winner"]]
    assert winner["settings"] == {"lr": 4e-3, "batch_size": 2}
    assert found.winner.spec.dropout == 0
    assert "lr 0.004, batch_size 2, dropout 0" in found.table
    assert not found.summary.at_edge
    assert found.summary.leader == winner


def test_resumed_it_is_the_same(tmp_path):
    search(tmp_path / "whole").run()
    for n in (3, 24):
        with killed_after(n):
            search(tmp_path / str(n)).run()
        search(tmp_path / str(n)).run(resume=True)
        assert outcome(tmp_path / str(n)) == outcome(tmp_path / "whole")


def test_what_cannot_be_a_gene(tmp_path):
    with pytest.raises(SpecError, match="genes: 'lr' has the values"):
        search(tmp_path, genes={"lr": ()}).run()
    with pytest.raises(SpecError, match="'matrix_lr' would be chosen for baselines alone"):
        search(tmp_path, settings={"matrix_lr": (1e-3,)}).run()
    trained = MicroTrain(open_task(write_text(tmp_path)), Recipe(64, 16, 4))
    for genes, fault in (({"lrs": (1e-3,)}, "did you mean lr"), ({"lr": (0.0,)}, "above 0")):
        one = search(tmp_path, genes=genes, settings={}, metric=None)
        with pytest.raises(SpecError, match=fault):
            Search(
                MODELS,
                trained,
                **{k: v for k, v in vars(one).items() if k not in ("space", "evaluator")},
            ).run()


def test_config_and_flags(tmp_path, capsys):
    own = SearchConfig(genes={"lr": (1e-3, 2e-3), "batch_size": (2, 4)})
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(nested(own)))
    assert read_config(path)[0] == own
    text, out = write_text(tmp_path), str(tmp_path / "run")
    flags = ["--gene", "lr", "1e-2", "3e-3", "--gene", "batch_size", "16", "--lrs", "1e-2"]
    small = ["--params", "20000", "--candidates", "1", "--rungs", "256", "--seq-len", "32"]
    end = [
        "--final-seeds",
        "1",
        "--tokens",
        "256",
        "--workers",
        "1",
        "--space",
        "tiny",
        "--proxies",
    ]
    assert (
        main(
            [
                "search",
                "--data",
                text,
                "--out",
                out,
                *flags,
                *small,
                *end,
                "--band",
                "0.6",
                "--proxies",
            ]
        )
        == 0
    )
    assert read_config(f"{out}/config.yaml")[0].genes == {"lr": (1e-2, 3e-3), "batch_size": (16,)}
    trials = [e for e in read_events(f"{out}/journal.jsonl") if e["event"] == "trial"]
    own = [t for t in trials if "batch_size" in t["settings"]]
    assert {t["tokens"] for t in own} == {512}  # a step of 16 windows of 32
    assert len(own) < len(trials)
    assert main(["search", "--gene", "lr", "much", "--out", out]) == 2
    assert "are no numbers" in capsys.readouterr().err
