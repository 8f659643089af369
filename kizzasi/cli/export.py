"""Put a search's winner into a folder of its own: weights, spec, model card, a script that runs it.

example:
  kizzasi export runs/first --out models/mine
  python models/mine/generate.py "Once upon"
  kizzasi train models/mine --tokens 10000000
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a finished search")
    parser.add_argument("--out", help="folder (default RUN/export)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace other files that are in the way"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas.report.export import export

    out = Path(args.out or Path(args.run) / "export")
    folder = export(Path(args.run), out, overwrite=args.overwrite)
    files = sorted(path.name for path in folder.iterdir())
    return {"folder": str(folder), "files": files}, f"{folder}: {', '.join(files)}"
