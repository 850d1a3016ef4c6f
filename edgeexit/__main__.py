"""`python -m edgeexit` is the same as `edgeexit`."""

import sys

from edgeexit.cli import entry

if __name__ == "__main__":
    sys.exit(entry())
