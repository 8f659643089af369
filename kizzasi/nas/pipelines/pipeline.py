"""`Pipeline`: a document that fits, with its model and recipe; reading, repairing and printing.

Source: EvoForge's files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.pipelines.compiling import Compiled, compiled
from kizzasi.nas.pipelines.document import Document
from kizzasi.nas.pipelines.misfits import Findings, Misfit, changed, describe_change
from kizzasi.nas.pipelines.reading import load, read
from kizzasi.nas.pipelines.writing import said, to_yaml

ROUNDS = 30  # of repairs: one may uncover the next


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that fits.

    Args:
        document: as it is written.
        spec: its model.
        recipe: fields of a `Recipe` that it sets, and `steps`.
    """

    document: Document
    spec: ModelSpec
    recipe: dict[str, Any]

    @classmethod
    def from_data(cls, data: Any) -> Pipeline:
        """Raises SpecError that names everything that does not fit, one misfit a line."""
        pipeline, found = examined(data)
        Findings(found).require_none()
        assert pipeline is not None, "a document without misfits has a model"
        return pipeline

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Pipeline:
        """Read a YAML file. Raises SpecError naming the file, and what does not fit."""
        data = load(path)
        try:
            return cls.from_data(data)
        except SpecError as error:
            lines = "\n".join(f"{path}: {line}" for line in str(error).splitlines())
            raise SpecError(lines) from error

    def to_yaml(self) -> str:
        return to_yaml(said(self.document))


def examined(data: Any) -> tuple[Pipeline | None, list[Misfit]]:
    """A pipeline, taken as its remedies say where it does not fit, and all its misfits."""
    findings = Findings()
    document = read(data, findings)
    made: Compiled | None = None if document is None else compiled(document, findings)
    if document is None or made is None:
        return None, findings
    return Pipeline(document, made.spec, made.recipe), findings


def repaired(data: Any) -> tuple[Any, list[str]]:
    """The nearest data that fit, and every change in words.

    Raises:
        SpecError: something is missing or wrong that only its author knows.
    """
    said_so: list[str] = []
    for _ in range(ROUNDS):
        _, found = examined(data)
        if not found:
            return data, said_so
        fixable = [misfit for misfit in found if misfit.changes]
        if not fixable:
            Findings(found).require_none()
        # One at a time: a change may settle what else was found, or move it.
        for path, value in fixable[0].changes:
            said_so.append(describe_change(data, path, value))
            data = changed(data, path, value)
    raise SpecError(f"{examined(data)[1][0]}; {ROUNDS} repairs did not settle it")
