"""The errors a user can cause. Each message says what was given, which rule it broke, what to do.

Programs (`kizzasi ...`) print the message on one line and exit with code 2.
"""


class KizzasiError(ValueError):
    """Base of every error that a user's input can cause."""


class SpecError(KizzasiError):
    """A spec, search space or configuration breaks a rule; the message starts with its path."""


class ShapeError(KizzasiError):
    """A tensor has the wrong shape or dtype; the message shows what came and what was expected."""


class GenerateError(KizzasiError):
    """What decoding was asked for is out of range, excludes another wish, or has no logits."""


class CheckpointError(KizzasiError):
    """A checkpoint is missing, damaged, hostile, or does not fit its config."""


class StateError(CheckpointError):
    """A state, in memory or in a file, is of another model; the message names both digests."""


class DataError(KizzasiError):
    """Training data is missing, empty, too short, or outside the model's vocabulary."""


class StudyError(KizzasiError):
    """A search run cannot start, be resumed, or be written."""
