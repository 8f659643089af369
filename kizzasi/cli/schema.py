"""Print the JSON Schema of pipelines, for editors.

example:
  kizzasi schema > kizzasi.schema.json
  # first line of a pipeline, for editors with a YAML language server:
  # yaml-language-server: $schema=kizzasi.schema.json
"""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # nothing beside what every verb has


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas.pipelines import json_schema

    schema = json_schema()
    return schema, json.dumps(schema, indent=1)
