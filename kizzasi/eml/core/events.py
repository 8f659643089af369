"""What happened to an EML model, as records that a caller can store. The shapes are eml-core's.

Each record serialises as one tagged object, e.g. {"Trained": {"model_name": "t", ...}}.
"""

from dataclasses import asdict, dataclass
from typing import Any


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
    """Rebuild an event from `Event.to_dict`."""
    ((name, fields),) = tagged.items()
    return _BY_NAME[name](**fields)
