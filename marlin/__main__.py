"""python -m marlin: the command line, which is also installed as `marlin`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
