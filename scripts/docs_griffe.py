"""Extension of griffe: what a class says of its fields, in whatever form, becomes its "Args:"."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).parent))
from docs_fields import meanings


class Fields(griffe.Extension):
    """Rewrites what is shown, not what is in the source."""

    def on_class(self, *, cls: Any, **_: Any) -> None:
        if cls.docstring is None:
            return
        fields = [name for name, member in cls.members.items() if member.is_attribute]
        before, found, after = meanings(cls.docstring.value, fields)
        if found:
            lines = [f"    {name}: {meaning}" for name, meaning in found.items()]
            cls.docstring.value = "\n".join([before, "", "Args:", *lines, "", after])

    def on_attribute_instance(self, *, attr: Any, **_: Any) -> None:
        """`added(default)` is the default of a field that came later."""
        text = str(attr.value)
        if text.startswith("added("):
            attr.value = text.removeprefix("added(").removesuffix(")")
