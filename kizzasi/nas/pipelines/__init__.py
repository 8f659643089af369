"""Pipelines: EvoForge's language for architectures as a spelling of `ModelSpec`."""

from kizzasi.nas.pipelines.evolution import PipelineEvolution
from kizzasi.nas.pipelines.json_schema import json_schema
from kizzasi.nas.pipelines.mermaid import sketch
from kizzasi.nas.pipelines.misfits import Misfit
from kizzasi.nas.pipelines.observing import observed
from kizzasi.nas.pipelines.pipeline import Pipeline, examined, repaired
from kizzasi.nas.pipelines.printing import to_pipeline
from kizzasi.nas.pipelines.reading import is_pipeline, load
from kizzasi.nas.pipelines.report import search_report, write_search_report
from kizzasi.nas.pipelines.scaling import scaled
from kizzasi.nas.pipelines.space.space import PipelineSpace, Variant
from kizzasi.nas.pipelines.writing import to_yaml

__all__ = [
    "Misfit",
    "Pipeline",
    "PipelineEvolution",
    "PipelineSpace",
    "Variant",
    "examined",
    "is_pipeline",
    "json_schema",
    "load",
    "observed",
    "repaired",
    "scaled",
    "search_report",
    "sketch",
    "to_pipeline",
    "to_yaml",
    "write_search_report",
]
