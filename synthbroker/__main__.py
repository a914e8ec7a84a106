"""`python -m synthbroker` is the command line."""

import sys

from synthbroker.cli import main

if __name__ == "__main__":
    sys.exit(main())
