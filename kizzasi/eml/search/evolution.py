"""Evolution strategies and simultaneous perturbation, in the manner of `optimizer.py`.

They keep the best point seen in `x`; `mean` is where they search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kizzasi.eml.search.optimizer import hashed_noise, keep_best, require, usable


class GradientState(NamedTuple):
    """x (R, n) and best (R) seen; mean (R, n); Adam's moments m, v (R, n); counters.

    steps    length of the schedule, where there is one
    """

    x: Tensor
    best: Tensor
    mean: Tensor
    m: Tensor
    v: Tensor
    steps: int
    at: int
    used: int
    seed: int


def _start(x: Tensor, loss: Tensor, seed: int, steps: int = 0) -> GradientState:
    zero = torch.zeros_like(x)
    return GradientState(x, usable(loss), x, zero, zero, steps, 0, 1, seed)


def _adam(state: GradientState, g: Tensor, lr: float) -> GradientState:
    """Take one Adam step along an estimated gradient."""
    at = state.at + 1
    m, v = 0.9 * state.m + 0.1 * g, 0.99 * state.v + 0.01 * g * g
    unbiased = (v / (1 - 0.99**at)).sqrt() + 1e-12
    mean = state.mean - lr * m / (1 - 0.9**at) / unbiased
    return state._replace(mean=mean, m=m, v=v, at=at)


@dataclass(frozen=True)
class AntitheticES:
    """Evolution strategy with mirrored samples, centred ranks and Adam.

        g = sum_p rank(f(mean + sigma e_p), f(mean - sigma e_p)) e_p / (P sigma)

    Args:
        population: candidates per step, even.
        sigma: size of the perturbations.
        lr, lr_final: Adam's step at the start and after `steps`, geometric in between.
        steps: length of the schedule; None for what `minimize`'s budget allows.

    Source: Salimans et al. 2017, arXiv:1703.03864, section 2.1.
    """

    residuals: ClassVar[bool] = False
    speculative: ClassVar[bool] = False
    population: int = 64
    sigma: float = 0.05
    lr: float = 0.02
    lr_final: float = 0.002
    steps: int | None = None

    def __post_init__(self) -> None:
        require(self.population % 2 == 0 < self.population, f"{self}: population must be even")
        require(min(self.sigma, self.lr, self.lr_final) > 0, f"{self}: sizes must be above 0")

    def init(self, x: Tensor, loss: Tensor, seed: int, evaluations: int) -> GradientState:
        steps = self.steps or max(1, evaluations // self.population)
        return _start(x, loss, seed, steps)

    def ask(self, state: GradientState) -> Tensor:
        noise = self.sigma * hashed_noise(state.seed, state.at, self.population // 2, state.mean)
        return state.mean[:, None] + torch.cat((noise, -noise), 1)

    def tell(self, state: GradientState, candidates: Tensor, losses: Tensor) -> GradientState:
        losses = usable(losses)
        x, best, _ = keep_best(state.x, state.best, candidates, losses)
        ranks = losses.argsort(1).argsort(1).to(state.mean) / (self.population - 1) - 0.5
        noise = (candidates - state.mean[:, None]) / self.sigma
        g = torch.einsum("rp,rpn->rn", ranks, noise) / (self.population * self.sigma)
        progress = min(state.at / state.steps, 1.0)
        lr = self.lr * (self.lr_final / self.lr) ** progress
        used = state.used + losses.shape[1]
        return _adam(state._replace(x=x, best=best, used=used), g, lr)

    def renew(self, state: GradientState, loss: Tensor) -> GradientState:
        return state._replace(best=usable(loss))


@dataclass(frozen=True)
class Spsa:
    """Simultaneous perturbation: a gradient estimate from `pairs` mirrored pairs of losses.

        g = mean_p (f(mean + c e_p) - f(mean - c e_p)) / (2 c) e_p;    mean <- mean - lr g

    Only the losses and a seed need to be kept between ask and tell, as in MeZO: perturbations are
    hashed from the seed. With adam=True the step is Adam's.

    Args:
        pairs: mirrored pairs per step; 1 is the original.
        c: size of the perturbations.
        lr: step size.
        adam: normalise steps by Adam's moments.

    Source: Spall 1992, IEEE TAC 37(3); MeZO: Malladi et al. 2023, arXiv:2305.17333, section 2.
    """

    residuals: ClassVar[bool] = False
    speculative: ClassVar[bool] = False
    pairs: int = 1
    c: float = 1e-3
    lr: float = 1e-3
    adam: bool = False

    def __post_init__(self) -> None:
        require(self.pairs >= 1, f"{self}: pairs must be >= 1")
        require(min(self.c, self.lr) > 0, f"{self}: c and lr must be above 0")

    def init(self, x: Tensor, loss: Tensor, seed: int, evaluations: int) -> GradientState:
        return _start(x, loss, seed)

    def ask(self, state: GradientState) -> Tensor:
        noise = self.c * hashed_noise(state.seed, state.at, self.pairs, state.mean)
        return state.mean[:, None] + torch.cat((noise, -noise), 1)

    def tell(self, state: GradientState, candidates: Tensor, losses: Tensor) -> GradientState:
        x, best, _ = keep_best(state.x, state.best, candidates, usable(losses))
        plus, minus = losses.unflatten(1, (2, -1)).unbind(1)
        slope = ((plus - minus) / (2 * self.c)).nan_to_num(0.0, 0.0, 0.0)
        noise = hashed_noise(state.seed, state.at, self.pairs, state.mean)
        g = torch.einsum("rp,rpn->rn", slope.to(noise), noise) / self.pairs
        state = state._replace(x=x, best=best, used=state.used + losses.shape[1])
        if self.adam:
            return _adam(state, g, self.lr)
        return state._replace(mean=state.mean - self.lr * g, at=state.at + 1)

    def renew(self, state: GradientState, loss: Tensor) -> GradientState:
        return state._replace(best=usable(loss))


class CmaState(NamedTuple):
    """x, best as ever; mean (R, n); sigma (R); paths p_sigma, p_c, variances c (R, n); counters."""

    x: Tensor
    best: Tensor
    mean: Tensor
    sigma: Tensor
    p_sigma: Tensor
    p_c: Tensor
    c: Tensor
    at: int
    used: int
    seed: int


@cache
def _recombination(mu: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Weights (mu) of the best candidates, best first, and how many they are worth; on the host,
    which needs the latter and would wait for a device to say it."""
    weights = math.log(mu + 0.5) - torch.arange(1, mu + 1, device="cpu").to(dtype).log()
    weights = weights / weights.sum()
    return weights, float(1 / weights.square().sum())


@dataclass(frozen=True)
class SeparableCma:
    """CMA-ES with a diagonal covariance: linear in n in time and memory.

    Args:
        population: candidates per generation; None means 4 + floor(3 ln n).
        sigma: first size of the search distribution.

    Source: Ros & Hansen 2008, PPSN X, section 2; constants of Hansen 2016, arXiv:1604.00772, with
        the learning rate of the covariance raised by (n + 2) / 3.
    """

    residuals: ClassVar[bool] = False
    speculative: ClassVar[bool] = False
    population: int | None = None
    sigma: float = 0.1

    def __post_init__(self) -> None:
        require(self.population is None or self.population > 1, f"{self}: population must be > 1")
        require(self.sigma > 0, f"{self}: sigma must be above 0")

    def init(self, x: Tensor, loss: Tensor, seed: int, evaluations: int) -> CmaState:
        sigma = torch.full((len(x),), self.sigma, dtype=x.dtype, device=x.device)
        zero = torch.zeros_like(x)
        return CmaState(x, usable(loss), x, sigma, zero, zero, torch.ones_like(x), 0, 1, seed)

    def _size(self, n: int) -> int:
        return self.population or 4 + int(3 * math.log(n))

    def ask(self, state: CmaState) -> Tensor:
        noise = hashed_noise(state.seed, state.at, self._size(state.x.shape[1]), state.x)
        spread = state.sigma[:, None] * state.c.sqrt()
        return state.mean[:, None] + spread[:, None] * noise

    def tell(self, state: CmaState, candidates: Tensor, losses: Tensor) -> CmaState:
        n, size = state.x.shape[1], losses.shape[1]
        losses = usable(losses)
        x, best, _ = keep_best(state.x, state.best, candidates, losses)
        mu = size // 2
        weights, mu_eff = _recombination(mu, x.dtype)
        weights = weights.to(x.device)
        c_sigma = (mu_eff + 2) / (n + mu_eff + 5)
        damping = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma
        c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)
        c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
        c_mu = min(1 - c_1, 2 * (mu_eff - 2 + 1 / mu_eff) / ((n + 2) ** 2 + mu_eff))
        faster = (n + 2) / 3
        c_1, c_mu = min(1.0, c_1 * faster), min(1 - min(1.0, c_1 * faster), c_mu * faster)
        expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))

        order = losses.argsort(1)[:, :mu, None].expand(-1, -1, n)
        steps = (candidates.gather(1, order) - state.mean[:, None]) / state.sigma[:, None, None]
        step = torch.einsum("p,rpn->rn", weights, steps)
        mean = state.mean + state.sigma[:, None] * step
        push = math.sqrt(c_sigma * (2 - c_sigma) * mu_eff)
        p_sigma = (1 - c_sigma) * state.p_sigma + push * step / state.c.sqrt()
        length = p_sigma.norm(dim=1)
        unstalled = length / math.sqrt(1 - (1 - c_sigma) ** (2 * state.at + 2))
        h = (unstalled < (1.4 + 2 / (n + 1)) * expected).to(x)[:, None]
        p_c = (1 - c_c) * state.p_c + h * math.sqrt(c_c * (2 - c_c) * mu_eff) * step
        rank_one = p_c.square() + (1 - h) * c_c * (2 - c_c) * state.c
        rank_mu = torch.einsum("p,rpn->rn", weights, steps.square())
        c = (1 - c_1 - c_mu) * state.c + c_1 * rank_one + c_mu * rank_mu
        sigma = state.sigma * torch.exp((c_sigma / damping) * (length / expected - 1))
        used = state.used + size
        return CmaState(x, best, mean, sigma, p_sigma, p_c, c, state.at + 1, used, state.seed)

    def renew(self, state: CmaState, loss: Tensor) -> CmaState:
        return state._replace(best=usable(loss))
