import sys

from kizzasi.cli import main

sys.exit(main())
