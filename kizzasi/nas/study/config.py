"""`SearchConfig`: everything that decides a search's result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from kizzasi.errors import SpecError
from kizzasi.nas.evaluators.probes import PROBES
from kizzasi.nas.evaluators.zero_cost import PROXIES
from kizzasi.nas.schedulers.schedule import geometric_budgets
from kizzasi.nas.spaces.ready_made import width_ratio
from kizzasi.strict import Strict, require, unknown_name

SearcherName = Literal[
    "proxy", "random", "grid", "regularized", "evolution", "local", "nsga2", "tpe"
]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SchedulerName = Literal["halving", "hyperband", "asha", "stopping", "pasha", "pdh"]
Optimizer = Literal["muon", "adamw"]
ANALYTIC, INHERIT = "analytic", "inherit"
SCREENS = (ANALYTIC, *PROXIES, *PROBES, INHERIT)  # from cheap to dear
ONE_AFTER_ANOTHER = ("hyperband", "asha", "stopping", "pasha", "pdh")  # may end at any time


@dataclass(frozen=True)
class SearchConfig(Strict):
    """Everything that decides a search's result; written into the journal.

    Args:
        data: a file or folder, "stdlib", or None for the text that ships with CPython; see
            `kizzasi.train.open_task`.
        test: a file or folder of text, all of it read once for the result, in place of a share of
            the data.
        test_fraction: share of the data that nobody looks at before the result.
        space: "families" (every layer has the same genes), "tiny", "hybrid", "mamba_rwkv" or "moe"
            (every layer chooses its own parts), or a YAML file of a `ModelSpace`.
        searcher: "proxy" trains the best of a random pool by an analytic proxy and a random control
            group; "grid" all candidates in the order of the space; the others propose what is
            trained one after another, led by the scores.
        scheduler: who trains on to the next rung; "halving" judges a rung when it is complete.
        n_params: the parameter budget, embeddings included.
        band: candidates have between (1 - band) and (1 + band) times n_params parameters.
        max_state_bytes, max_flops_per_token, max_latency_ms, max_memory_bytes: further bounds, at
            `bounds_len` tokens; latency and memory are measured once, on the device of the search,
            and then read from the journal.
        bounds_len: see there.
        n_pool: candidates that the proxy scores (200), or that another searcher proposes at most
            (16).
        n_best, n_random: trained from the pool: the best by proxy, and a random control group.
        n_outside: trained on the first rung only, from outside the band, to see what the proxy is
            worth over all sizes.
        proxies: zero-cost proxies of every candidate that is trained; recorded, never decisive.
        screens: from cheap to dear, what chooses each proposal among `screen_width` draws before
            any is trained: "analytic", a zero-cost proxy, a probe ("recall", "copy", "parity"), or
            "inherit", which trains mutants of one parent for `screen_tokens` from its weights.
        screen_width, screen_tokens: see there.
        population, sample, mutation: of the evolving searchers: members, contestants for a
            parent's place, and chance per gene.
        side_by_side: None: a worker that becomes free gets the next training at once, and what that
            is depends on the results that are there by then. A number: that many trainings are
            decided on at once, and all end before the next are; workers wait, and their number
            does not change the result.
        rungs: tokens at each rung, rising; of asha, stopping, pasha and hyperband, the first and
            the last one count, and each rung between them is eta times the one before.
        eta: see there, and one in eta goes on.
        extrapolate: asha, stopping and hyperband promote by the scores that learning curves promise
            at the next rung, in place of those that are there.
        keep: share of the candidates that "halving" passes on.
        search_tokens: no training starts beyond this budget; None ends with n_pool. Learning-rate
            sweeps and final trainings come on top.
        optimizer: of every training, "muon" or "adamw"; see `Recipe`.
        lrs: learning rates of the sweep; None takes those that suit optimizer and n_params.
        matrix_lrs: learning rates of Muon's matrices, swept beside `lrs`; None takes the same one.
        genes: by name, values of settings that each candidate brings with it, mutated and crossed
            with its architecture: lr, matrix_lr, weight_decay, batch_size, warmup, min_lr, clip and
            dropout. The presets alone are then swept, over `lrs`, if lr is one of them.
        n_sweep: candidates that share a sweep where layers choose their own mixers: the first ones
            with the same main mixer.
        n_finalists: searched candidates trained anew at the final budget, beside the best preset.
        final_tokens: the budget of that training, from scratch.
        final_seeds: how often.
        slope_seeds: as many of these seeds also train every finalist at about half of the
            parameters, to see what it gains from size; 0 leaves that out.
        seq_len, batch_size: of the training windows.
        precision, compile, accumulate, fused: of every training; see `Recipe`.
        score_windows: held-out windows that a score uses, evenly spread, or all if there are fewer.
        seed: of everything random.
    """

    data: str | None = None
    test: str | None = None
    test_fraction: float = 0.1
    space: str = "hybrid"
    searcher: SearcherName = "regularized"
    scheduler: SchedulerName = "asha"
    n_params: int = 200_000
    band: float = 0.1
    max_state_bytes: int | None = None
    max_flops_per_token: float | None = None
    max_latency_ms: float | None = None
    max_memory_bytes: int | None = None
    bounds_len: int = 1024
    n_pool: int | None = None
    n_best: int = 4
    n_random: int = 12
    n_outside: int = 2
    proxies: tuple[str, ...] = ("flops", "grad_norm", "synflow", "logdet")
    screens: tuple[str, ...] = ()
    screen_width: int = 4
    screen_tokens: int = 8_192
    population: int = 6
    sample: int = 3
    mutation: float = 0.1
    side_by_side: int | None = None
    rungs: tuple[int, ...] = (16_384, 147_456)
    eta: int = 3
    extrapolate: bool = False
    keep: float = 0.34
    search_tokens: int | None = None
    optimizer: Optimizer = "muon"
    lrs: tuple[float, ...] | None = None
    matrix_lrs: tuple[float, ...] | None = None
    genes: dict[str, tuple[int | float, ...]] = field(default_factory=dict)
    n_sweep: int = 1
    n_finalists: int = 1
    final_tokens: int = 524_288
    final_seeds: int = 3
    slope_seeds: int = 0
    seq_len: int = 128
    batch_size: int = 4
    score_windows: int = 512
    precision: Precision = "auto"
    compile: bool = False
    accumulate: int = 1
    fused: bool = False
    seed: int = 0

    @property
    def budgets(self) -> tuple[int, ...]:
        """Tokens at every rung that the scheduler knows."""
        if self.scheduler in ("halving", "pdh"):
            return self.rungs
        return geometric_budgets(self.rungs[0], self.rungs[-1], self.eta)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of the sweep."""
        return self.lrs or usual_rates(self.optimizer, self.n_params)

    @property
    def sweep(self) -> dict[str, tuple[float, ...]]:
        """By name, the settings among which each family's are chosen."""
        matrices = {"matrix_lr": self.matrix_lrs} if self.matrix_lrs else {}
        return {"lr": self.rates, **matrices}

    @property
    def pool(self) -> int:
        """n_pool, or what the searcher usually has: 200 to score by proxy, 16 to train."""
        usual = 200 if self.searcher == "proxy" else 16
        return usual if self.n_pool is None else self.n_pool

    @property
    def n_candidates(self) -> int:
        """The most candidates that a searcher may propose."""
        if self.search_tokens is None:
            return self.pool
        return self.search_tokens // self.rungs[0] + 1

    def check(self) -> None:
        """Raises SpecError naming the value and the rule."""
        counts = ("n_params", "pool", "n_best", "final_tokens", "final_seeds", "seq_len")
        more = ("batch_size", "accumulate", "bounds_len", "population", "sample", "n_sweep")
        last = ("n_finalists", "score_windows", "screen_width", "screen_tokens")
        self.require_positive("", *counts, *more, *last)
        rising = all(a < b for a, b in zip((0, *self.rungs), self.rungs, strict=False))
        for ok, rule in (
            (0 <= self.seed < 2**63, f"seed: {self.seed} is outside 0 .. 2^63 - 1"),
            (0 < self.band < 1, f"band: {self.band} is outside (0, 1)"),
            (0 < self.keep < 1, f"keep: {self.keep} is outside (0, 1)"),
            (self.rungs and rising, f"rungs: {self.rungs} must be rising token counts"),
            (_are_rates(self.lrs), f"lrs: {self.lrs} must be positive and finite"),
            (
                self.matrix_lrs is None
                or (self.optimizer == "muon" and _are_rates(self.matrix_lrs)),
                f"matrix_lrs: {self.matrix_lrs} must be positive, finite, and are of muon alone",
            ),
            (
                self.side_by_side is None or self.side_by_side > 0,
                f"side_by_side: {self.side_by_side} must be above 0, or null",
            ),
            (min(self.n_random, self.n_outside) >= 0, "n_random, n_outside: must not be negative"),
            (
                0 <= self.slope_seeds <= self.final_seeds,
                f"slope_seeds: {self.slope_seeds} is outside 0 .. final_seeds {self.final_seeds}",
            ),
        ):
            if not ok:
                raise SpecError(rule)
        named = (("searcher", SearcherName), ("scheduler", SchedulerName), ("optimizer", Optimizer))
        for name, known in named:
            value = getattr(self, name)
            require(
                value in get_args(known), name, f"{value!r} {unknown_name(value, get_args(known))}"
            )
        for name in self.proxies:
            require(name in PROXIES, "proxies", f"{name!r} {unknown_name(name, PROXIES)}")
        for name in self.screens:
            require(name in SCREENS, "screens", f"{name!r} {unknown_name(name, SCREENS)}")
        if self.screens:
            rule = (
                f"{self.searcher!r} makes its own choice; choose a searcher that samples or mutates"
            )
            require(self.searcher not in ("proxy", "tpe"), "screens", rule)
        if ANALYTIC in self.screens:
            rule = "no formula ranks the models of this space; use another screen, or families"
            require(self.space == "families", "screens", rule)
        if self.searcher == "proxy":
            ok = self.space == "families" and self.scheduler == "halving"
            rule = "'proxy' ranks a pool of families for halving; choose another searcher"
            require(ok, "searcher", f"{rule} for {self.space} and {self.scheduler}")
        if self.search_tokens is not None:
            ok = self.scheduler in ONE_AFTER_ANOTHER and self.search_tokens > 0
            rule = f"needs a positive number, and a scheduler of {', '.join(ONE_AFTER_ANOTHER)}"
            require(ok, "search_tokens", f"{self.search_tokens} with {self.scheduler}: {rule}")


def _are_rates(lrs: tuple[float, ...] | None) -> bool:
    return lrs is None or (bool(lrs) and all(0 < lr < math.inf for lr in lrs))


def usual_rates(optimizer: Optimizer, n_params: int) -> tuple[float, ...]:
    """Learning rates that trainings of this size are good at: they fall as models get wider.

        rate(n) = rate(200,000) * (n / 200,000)^-0.375,    the rule of `ready_made.ratio` for widths

    For small models that is measured, see docs/LOG.md; for large ones it is the rule of muP for
    matrices and no more.
    """
    rates = {"muon": (8e-3, 1.6e-2), "adamw": (2e-3, 4e-3, 8e-3)}[optimizer]
    scale = 1 / width_ratio(n_params)
    return tuple(float(f"{rate * scale:.2g}") for rate in rates)
