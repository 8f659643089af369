"""`kizzasi search` for a checkout: python scripts/search.py --help."""

import sys

from kizzasi.cli import main

sys.exit(main(["search", *sys.argv[1:]]))
