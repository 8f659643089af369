"""What happened to an EML model, as records that a caller can store. The shapes are eml-core's.

Each record serialises as one tagged object, e.g. {"Trained": {"model_name": "t", ...}}.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kizzasi.errors import CheckpointError


@dataclass(frozen=True)
class Event:
    """One record; `kind` is its dotted name, "eml.trained" for `Trained`."""

    model_name: str

    @property
    def kind(self) -> str:
        return f"eml.{type(self).__name__.lower()}"

    def to_dict(self) -> dict[str, Any]:
        """Return {"Name": {fields}}, ready for JSON."""
        return {type(self).__name__: asdict(self)}


EmlEvent = Event  # eml-core's name


@dataclass(frozen=True)
class Trained(Event):
    """A training run ended; the errors are mean squared errors on the run's own samples."""

    samples_used: int
    mse_before: float
    mse_after: float
    converged: bool
    param_count: int


@dataclass(frozen=True)
class Prediction(Event):
    """A prediction worth keeping, with a hash of its inputs in hexadecimal."""

    inputs_hash: str
    output: list[float]


@dataclass(frozen=True)
class Drift(Event):
    """A prediction and what came true, `drift_pct` apart."""

    predicted: float
    actual: float
    drift_pct: float


@dataclass(frozen=True)
class Saved(Event):
    """The model was written to `path`."""

    path: str
    param_count: int


@dataclass(frozen=True)
class Loaded(Event):
    """The model was read from `path`."""

    path: str
    trained: bool
    samples: int


@dataclass(frozen=True)
class Reset(Event):
    """The model was set back to untrained."""

    reason: str


_BY_NAME = {each.__name__: each for each in (Trained, Prediction, Drift, Saved, Loaded, Reset)}


def event_from_dict(tagged: dict[str, dict[str, Any]]) -> Event:
    """Rebuild an event from `Event.to_dict`.

    Raises:
        CheckpointError: no event, or other fields than it has.
    """
    try:
        ((name, fields),) = tagged.items()
        return _BY_NAME[name](**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{tagged!r:.80} is no event; it must be {{name: fields}}, name of {[*_BY_NAME]}"
        ) from error


class EmlEventLog:
    """Events in the order in which they happened, until they are drained."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def push(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        """Return the events so far and forget them."""
        drained, self._events = self._events, []
        return drained

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events)
