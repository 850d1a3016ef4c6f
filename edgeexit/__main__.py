"""`python -m edgeexit` is the same as `edgeexit`."""

from edgeexit.cli import script

if __name__ == "__main__":
    script()
