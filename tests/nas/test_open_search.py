"""The search is open: own data, own training function and metric, own searcher and scheduler."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from small_search import killed_after, outcome

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model
from kizzasi.models.mixers import MambaSpec
from kizzasi.nas import (
    ASHA,
    Finals,
    Measurement,
    MicroTrain,
    ModelSpace,
    Random,
    RegularizedEvolution,
    Search,
    SearchConfig,
    Xorshift64,
    choice,
    named_search,
    repeat,
)
from kizzasi.nas.search import _named
from kizzasi.train import Frames, Labels, Metric, Recipe, TokenIds


def space(stem) -> ModelSpace:
    block = {"mixer": {"kind": "mamba", "d_state": choice(4, 8)}}
    return ModelSpace({"d_model": choice(8, 12), "stem": stem, "blocks": repeat(block, 1, 2)})


RECIPE = Recipe(256, seq_len=16, batch_size=4, score_windows=8)
QUICK = {
    "searcher": RegularizedEvolution(2, 2, 4, 0.3, 0, 2),
    "scheduler": ASHA(6, 128, 256, 2),
    "settings": {"lr": (3e-3, 1e-2)},
    "finals": Finals(1, 256, seeds=2),
    "side_by_side": 2,
}


def tasks(folder: Path):
    ids = np.random.default_rng(0).integers(0, 50, 3000).astype(np.uint16)
    np.save(folder / "ids.npy", ids)
    waves = np.sin(np.arange(800)[:, None] / (3.0, 5.0))
    x = np.random.default_rng(1).integers(0, 9, (100, 16))
    return {
        "ids": TokenIds.open(folder / "ids.npy"),
        "frames": Frames.of("waves", waves, horizon=2),
        "labels": Labels.of("labels", x, x[:, -1] % 3),
    }


@pytest.mark.parametrize("kind", ["ids", "frames", "labels"])
def test_a_search_over_any_task(kind, tmp_path):
    task = tasks(tmp_path)[kind]
    spec = ModelSpec(8, (BlockSpec(MambaSpec(d_state=4)),), task.stem)
    search = Search(
        space(task.stem),
        MicroTrain(task, RECIPE),
        baselines={"mine": spec},
        folder=tmp_path / "run",
        **QUICK,
    )
    with killed_after(12):
        search.run()
    found = search.run(resume=True)
    assert found.best.spec.stem == task.stem
    assert found.model().spec == found.best.spec
    assert {f.name for f in found.finals if not f.searched} == {"mine"}
    text = (tmp_path / "run" / "report.md").read_text() + found.table
    assert task.metric.name in text
    assert "bits/byte" not in text
    scores = [f.score for f in found.finals]
    assert scores == sorted(scores, reverse=not task.metric.lower_is_better)
    tests = [e for e in outcome(tmp_path / "run") if e.get("rung") == "test"]
    assert len(tests) == 4, "two finalists, two seeds"
    mean = sum(e["score"] for e in tests if e["candidate"] == found.summary.result["best"]) / 2
    assert found.best.score == pytest.approx(mean)


def test_a_named_search_takes_the_stem_of_its_data(tmp_path):
    tasks(tmp_path)
    config = SearchConfig(
        data=str(tmp_path / "ids.npy"),
        space="hybrid",
        searcher="random",
        scheduler="asha",
        n_params=20_000,
        band=0.9,
        n_pool=3,
        rungs=(128, 256),
        lrs=(3e-3,),
        final_tokens=256,
        seq_len=16,
        proxies=(),
    )
    found = named_search(config, tmp_path / "run")
    assert found.best.spec.stem == Tokens(50)
    assert found.summary.metric.name == "bits/token"
    assert set(found.summary.study["baselines"]) == {"unigram"}


def line_fit(job, report):
    """A user's own loop: no corpus, no recipe, a metric of its own; it leaves a model behind."""
    torch.manual_seed(job.seed)
    model = build_model(job.spec, seed=job.seed, device=job.device)
    x = torch.linspace(0, 6, 40)[None, :, None].sin()
    optimizer = torch.optim.Adam(model.parameters(), lr=job.settings["lr"])
    for _ in range(job.budget):
        loss = (model(x[:, :-1]).logits - x[:, 1:]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(1)
    model.save_pretrained(job.checkpoint, overwrite=True)
    return 1.0 - loss.item()


OWN = Metric("fit", lower_is_better=False)


def own(folder: Path, evaluate=line_fit, **changes) -> Search:
    parts = {**QUICK, "scheduler": ASHA(6, 2, 4, 2), "finals": Finals(1, 4, seeds=2)}
    return Search(space(Signal(1, 1)), evaluate, metric=OWN, folder=folder, **{**parts, **changes})


def test_a_users_own_training_function_and_metric(tmp_path):
    with killed_after(9):
        own(tmp_path / "run").run()
    found = own(tmp_path / "run").run(resume=True)
    assert own(tmp_path / "whole").run().best.scores == found.best.scores
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "run")
    assert found.best.spec.stem == Signal(1, 1)
    assert found.model()(torch.zeros(1, 3, 1)).logits.shape == (1, 3, 1)
    best = max(s for f in found.finals for s in f.scores.values())
    assert max(found.best.scores.values()) == best
    assert "fit" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(StudyError, match="cannot resume another search; seed: 0 then, 1 now"):
        own(tmp_path / "run", seed=1).run(resume=True)


def test_a_function_needs_a_metric_and_has_no_data_for_proxies(tmp_path):
    with pytest.raises(SpecError, match="metric: a function of yours needs one"):
        own(tmp_path / "run").__class__(
            space(Signal(1, 1)), line_fit, folder=tmp_path / "run", **QUICK
        ).run()
    with pytest.raises(SpecError, match="proxies, screens: they look at the data of a MicroTrain"):
        own(tmp_path / "run", proxies=("flops",)).run()


def broken(job, report):
    raise TypeError(f"no such thing as {job.spec.d_model - job.spec.d_model}")


def test_a_search_whose_trials_all_fail_alike_stops_and_says_why(tmp_path):
    searcher = Random(50, 0)
    with pytest.raises(StudyError, match=r"all \d+ trials failed alike: TypeError: no such thing"):
        own(tmp_path / "run", broken, searcher=searcher, scheduler=ASHA(50, 2, 4, 2)).run()
    trials = [e for e in outcome(tmp_path / "run") if e["event"] == "trial"]
    assert 5 <= len(trials) <= 8, "it went on"


def sometimes(job, report):
    if job.spec.d_model == 8:
        raise RuntimeError("eight is too few")
    return Measurement(1.0 / len(job.spec.blocks), spent=job.budget)


def test_failing_trials_are_recorded_and_the_search_goes_on(tmp_path):
    found = own(tmp_path / "run", sometimes, searcher=Random(6, 3)).run()
    assert found.best.spec.d_model == 12
    assert found.summary.failures
    assert "eight is too few" in found.summary.failures[0][2]
    assert (tmp_path / "run" / "best" / "spec.yaml").exists(), "no weights were left to keep"


@dataclass(frozen=True)
class Annealing:
    """A searcher of one's own."""

    n: int
    seed: int

    def proposals(self, space):
        rng = Xorshift64(self.seed)
        here = space.sample(rng)
        (best,) = yield [here]
        for i in range(1, self.n):
            new = space.mutate(here, rng, 0.5)
            (score,) = yield [new]
            if score > best or rng.next_f64() < math.exp((score - best) / (1 - i / self.n)):
                here, best = new, score


@dataclass(frozen=True)
class MedianStop:
    """A scheduler of one's own."""

    n: int
    stages: tuple[int, ...]

    def check(self):
        pass

    def budgets(self, candidate):
        return self.stages if candidate < self.n else ()

    def survivors(self, results):
        on = {}
        for candidate, rung, score in results.told:
            on.pop(candidate, None)
            peers = sorted(results.rung(rung).values())
            if rung + 1 < len(self.stages) and score >= peers[len(peers) // 2] > -math.inf:
                on[candidate] = None
        return list(on)


@dataclass(frozen=True)
class Depths:
    """A space of one's own: its candidates are specs."""

    most: int

    @property
    def size(self):
        return self.most

    def of(self, n):
        return ModelSpec(8, (BlockSpec(MambaSpec(d_state=4)),) * n, Signal(1, 1))

    def sample(self, rng):
        return self.of(rng.choice(range(1, self.most + 1)))

    def build(self, decide):
        return self.of(decide("depth", self.most) + 1)

    def mutate(self, candidate, rng, prob):
        return self.sample(rng) if rng.next_f64() < prob else candidate

    def crossover(self, a, b, rng):
        return rng.choice((a, b))

    def iterate(self, limit=None):
        return [self.of(n) for n in range(1, self.most + 1)][:limit]

    def contains(self, candidate):
        return candidate in self.iterate()


def test_own_searcher_scheduler_and_space_pass_the_exams_and_search(tmp_path):
    from kizzasi.testing import check_scheduler, check_searcher, check_space

    check_space(Depths(4))
    check_searcher(Annealing(6, 0), Depths(4))
    check_scheduler(MedianStop(8, (1, 2, 4)), 8)
    search = Search(
        Depths(4),
        line_fit,
        metric=OWN,
        searcher=Annealing(5, 0),
        scheduler=MedianStop(5, (1, 2)),
        settings={"lr": (1e-2,)},
        finals=Finals(1, 2, seeds=1),
        folder=tmp_path / "run",
    )
    found = search.run()
    assert found.winner.spec in Depths(4).iterate()
    assert found.front[0].stem == Signal(1, 1)


def test_an_evaluator_is_told_from_another_by_its_recipe_or_its_name():
    class Own:
        def __call__(self, job, report):
            return 0.0

    training = MicroTrain(Labels.of("x", np.zeros((40, 8), int), np.arange(40) % 2), Recipe(512))
    assert _named(training) == repr(training.recipe)
    assert _named(Own()) == f"{__name__}.{Own.__qualname__}"
    assert _named(tasks) == f"{__name__}.tasks"
