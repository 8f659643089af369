"""`kizzasi train` for a checkout: python scripts/train.py --help."""

import sys

from kizzasi.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
