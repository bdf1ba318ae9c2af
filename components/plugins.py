"""Classes of the user's own, named "package.module:Class" in a config."""

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any


def source_digest(place: str) -> str:
    """sha256 of the file that ``place`` ("package.module:Class") is in; the module itself is not run.

    Raises ValueError when there is no such module.
    """
    return hashlib.sha256(_file(place).read_bytes()).hexdigest()


def load_class(place: str, kind: type) -> Any:
    """The class at ``place``; raises ValueError when it isn't there or is no ``kind``."""
    _file(place)
    module, _, name = place.partition(":")
    found = getattr(importlib.import_module(module), name, None)
    if not isinstance(found, type) or not issubclass(found, kind):
        raise ValueError(f"{place!r}: {name} must be a class there that extends {kind.__module__}.{kind.__name__}")
    return found


def _file(place: str) -> Path:
    module = place.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a package above it
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ValueError(f"{place!r}: there is no module {module!r}; put its folder on PYTHONPATH, or install it")
    return Path(spec.origin)
