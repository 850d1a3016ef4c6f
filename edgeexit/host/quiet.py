"""Keep converters quiet: what they print is neither a result nor an error."""

import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """
    Send what the converter and its native code print into a file that is thrown away.

    Its refusals arrive as exceptions; the rest is chatter, some of it on stdout, which belongs
    to results. File descriptors 1 and 2 of the process are pointed elsewhere inside the block
    and restored on every way out.
    """
    quiet = logging.NullHandler()  # else logging.warning would install a handler for good
    with tempfile.TemporaryFile() as chatter, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = []
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            saved.append(os.dup(descriptor))
            os.dup2(chatter.fileno(), descriptor)
        out, err = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = io.StringIO()
        logging.getLogger().addHandler(quiet)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(quiet)
            sys.stdout, sys.stderr = out, err
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
