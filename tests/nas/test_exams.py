"""The shipped exams: our own parts pass them, and planted faults are found."""

from dataclasses import dataclass

import pytest

from kizzasi.models import Tokens
from kizzasi.nas import (
    ASHA,
    PASHA,
    PDH,
    ArchSearchSpace,
    Evolution,
    Grid,
    Halving,
    Hyperband,
    LocalSearch,
    Random,
    RegularizedEvolution,
    StoppingASHA,
    Xorshift64,
)
from kizzasi.nas.spaces import hybrid, tiny
from kizzasi.testing import check_scheduler, check_searcher, check_space

SPACE = ArchSearchSpace()


@pytest.mark.parametrize("space", [tiny(Tokens(9)), hybrid(Tokens(9)), SPACE], ids=type)
def test_spaces(space):
    check_space(space, Tokens(9))


@pytest.mark.parametrize(
    "searcher",
    [
        Random(9, 0),
        Grid(9),
        Evolution(4, 3, 2, 0.3, 0),
        RegularizedEvolution(4, 2, 20, 0.3, 0),
        LocalSearch(20, 4, "best", 0.3, 0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_searchers(searcher):
    check_searcher(searcher, SPACE)


@pytest.mark.parametrize(
    "scheduler",
    [
        ASHA(30, 1, 9),
        StoppingASHA(30, 1, 9),
        PASHA(30, 1, 27),
        PDH(30, (1, 3, 9), 4, 8),
        Halving((1, 3, 9), 3, 30),
        Hyperband(1, 9, 3, 30),
    ],
    ids=lambda s: type(s).__name__,
)
def test_schedulers(scheduler):
    check_scheduler(scheduler)


class Restless(ArchSearchSpace):
    """Mutates whatever the chance."""

    def mutate(self, candidate, rng, prob):
        return super().mutate(candidate, rng, 1.0)


class Private(ArchSearchSpace):
    """Has random numbers of its own."""

    own = Xorshift64(5)

    def sample(self, rng):
        return super().sample(self.own)


@pytest.mark.parametrize(
    ("space", "fault"), [(Restless(), "a chance of 0"), (Private(), "the same random numbers")]
)
def test_faulty_spaces_fail(space, fault):
    with pytest.raises(AssertionError, match=fault):
        check_space(space, Tokens(9))


@dataclass
class Forgetful:
    """Goes on from where the last search stopped."""

    rng: Xorshift64

    def proposals(self, space):
        yield [space.sample(self.rng)]


@dataclass(frozen=True)
class Endless:
    def proposals(self, space):
        while True:
            yield list(space.iterate(50))


@pytest.mark.parametrize(
    ("searcher", "fault"),
    [(Forgetful(Xorshift64(1)), "equal scores lead"), (Endless(), "no end after")],
)
def test_faulty_searchers_fail(searcher, fault):
    with pytest.raises(AssertionError, match=fault):
        check_searcher(searcher, SPACE)


@dataclass(frozen=True)
class Lenient(ASHA):
    """Lets who has failed train on."""

    def survivors(self, results):
        return [c for c in range(30) if len(results.scores(c)) == 1]


@dataclass(frozen=True)
class Falling(ASHA):
    def budgets(self, candidate):
        return (9, 3) if candidate < 30 else ()


@pytest.mark.parametrize(
    ("scheduler", "fault"), [(Lenient(30, 1, 9), "has failed"), (Falling(30, 1, 9), "do not rise")]
)
def test_faulty_schedulers_fail(scheduler, fault):
    with pytest.raises(AssertionError, match=fault):
        check_scheduler(scheduler)
