"""eml-core's JSON, read field by field before anything is allocated, and written as serde writes.

serde writes nan and inf as null, and reads no null as a number; so do we.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from kizzasi.errors import CheckpointError

_LARGEST = 2**31  # no width, depth or count comes near it


def write(fields: Mapping[str, Any]) -> str:
    """Return compact JSON; numbers that JSON cannot hold become null."""
    return json.dumps(_usable(fields), separators=(",", ":"), allow_nan=False)


def _usable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _usable(each) for key, each in value.items()}
    return [_usable(each) for each in value] if isinstance(value, (list, tuple)) else value


class Fields:
    """One JSON object whose fields are checked as they are read.

    Args:
        data: what the JSON holds there.
        place: where that is, for messages; "" at the top.
        keys: those it must have.
        optional: those it may have; None for any.

    Raises:
        CheckpointError: here and in every method, for what is not as it says.
    """

    def __init__(
        self, data: Any, place: str, keys: Iterable[str], optional: Iterable[str] | None = ()
    ) -> None:
        self.place = place
        if not isinstance(data, dict):
            self._refuse("", f"a {type(data).__name__}; an object is needed")
        missing = sorted(set(keys) - set(data))
        unknown = [] if optional is None else sorted(set(data) - set(keys) - set(optional))
        if missing or unknown:
            self._refuse("", f"keys missing: {missing}, unknown: {unknown}")
        self.data: dict[str, Any] = data

    @classmethod
    def parse(cls, text: str, keys: Iterable[str], optional: Iterable[str] | None = ()) -> Fields:
        """Read the object in a text."""
        try:
            data = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise CheckpointError(f"not JSON: {reason:.200}; give what to_json wrote") from error
        return cls(data, "", keys, optional)

    def inner(self, key: str, keys: Iterable[str], optional: Iterable[str] | None = ()) -> Fields:
        """The object under a key."""
        return Fields(self.data[key], self._path(key), keys, optional)

    def objects(self, key: str, keys: Iterable[str]) -> list[Fields]:
        """The objects in the list under a key."""
        keys = list(keys)
        return [
            Fields(each, self._path(f"{key}[{i}]"), keys) for i, each in enumerate(self.items(key))
        ]

    def items(self, key: str, count: int | None = None) -> list[Any]:
        """The list under a key, of a known length."""
        value = self.data[key]
        if not isinstance(value, list):
            self._refuse(key, f"a {type(value).__name__}; a list is needed")
        if count is not None and len(value) != count:
            self._refuse(key, f"{len(value)} values; the sizes call for {count}")
        return value

    def whole(self, key: str, low: int = 0, high: int = _LARGEST) -> int:
        value = self.data[key]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._refuse(key, f"{value!r:.80}; a whole number in {low}..={high} is needed")
        return value

    def flag(self, key: str) -> bool:
        value = self.data[key]
        if not isinstance(value, bool):
            self._refuse(key, f"{value!r:.80}; true or false is needed")
        return value

    def text(self, key: str) -> str:
        value = self.data[key]
        if not isinstance(value, str):
            self._refuse(key, f"{value!r:.80}; a text is needed")
        return value

    def number(self, key: str) -> float:
        return self._number(key, self.data[key])

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of finite numbers, of a known length."""
        return [self._number(f"{key}[{i}]", v) for i, v in enumerate(self.items(key, count))]

    def table(self, key: str, rows: int, columns: int) -> list[float]:
        """A list of lists of numbers, flattened."""
        lists = {f"{key}[{i}]": row for i, row in enumerate(self.items(key, rows))}
        nested = Fields(lists, self.place, (), None)
        return [value for name in lists for value in nested.numbers(name, columns)]

    def _number(self, place: str, value: Any) -> float:
        if value is None:
            self._refuse(place, "null: the model had diverged to nan, and cannot be read back")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self._refuse(place, f"{value!r:.80}; a number is needed")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self._refuse(place, "beyond float64")
        return number

    def _path(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place and key else self.place or key

    def _refuse(self, key: str, message: str) -> NoReturn:
        raise CheckpointError(f"{self._path(key) or 'JSON'}: {message}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; nan and inf are written as null")
