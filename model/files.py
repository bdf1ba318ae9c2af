"""Weights on disk: a folder with ``weights.safetensors`` and ``config.json``, never a pickle."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

WEIGHTS, CONFIG = "weights.safetensors", "config.json"


def save_folder(
    folder: str | Path, tensors: Mapping[str, Tensor], *, kind: str, version: int, config: Mapping[str, Any]
) -> None:
    """Write ``tensors`` and ``config`` into ``folder`` as format ``kind``, ``version``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    header = {"format": kind, "format_version": version, "config": dict(config)}
    (folder / CONFIG).write_text(json.dumps(header, indent=2))


def load_folder(folder: str | Path, *, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of ``folder``; raises ValueError for another format or a newer version than ``version``."""
    folder = Path(folder)
    header = json.loads((folder / CONFIG).read_text())
    if header.get("format") != kind:
        raise ValueError(f"{folder / CONFIG}: format {header.get('format')!r}, {kind!r} is needed")
    if header["format_version"] > version:
        found = header["format_version"]
        raise ValueError(f"{folder / CONFIG}: format_version {found} of {kind!r}; this software reads up to {version}")
    return header["config"], load_file(folder / WEIGHTS)


def load_file_contents(path: str | Path) -> Any:
    """What ``path`` holds: a .safetensors file's tensors, or what torch saved, read without running any code of it.

    ``argparse.Namespace`` is allowed, since training scripts keep their arguments so. Raises ValueError for a file
    that holds other objects.
    """
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path}: more than tensors and plain values, it isn't loaded: {error}") from error


def load_tensors(path: str | Path, keys: Sequence[str] = ()) -> dict[str, Tensor]:
    """The state dict in a file: under the first of ``keys`` that is there, else the file as a whole.

    Raises ValueError, with what the file holds instead, when that is no state dict.
    """
    contents = load_file_contents(path)
    found = contents
    for key in reversed(keys):
        found = contents[key] if isinstance(contents, dict) and key in contents else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        held = sorted(map(str, contents)) if isinstance(contents, dict) else type(contents).__name__
        raise ValueError(f"{path}: holds {held}; a state dict{' or one of ' if keys else ''}{list(keys)} is needed")
    return found


class SkipRandomWeights(TorchFunctionMode):
    """Inside it, torch's layers come with whatever is in memory: seconds are saved for weights that are loaded next.

    (The meta device would do, but its first use imports torch's compiler, which takes seconds too.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leave out what layers fill their weights with."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
