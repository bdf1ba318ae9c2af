"""The environment variables of this process, which those that it starts inherit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

OWN_RAY = "ALIT_OWN_RAY"  # set in the processes of a Ray that was started for the run, and ends with it


@contextmanager
def restored(*names: str) -> Iterator[None]:
    """Put these variables back as they were, whatever becomes of them meanwhile."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
