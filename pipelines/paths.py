"""Local files that a config names: as absolute paths, for workers have another working directory, and by content."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.sources import DEMO


def absolute(path: str) -> str:
    """A local path from the root; an empty one stays empty."""
    return str(Path(path).expanduser().absolute()) if path else path


def local(place: object) -> object:
    """A local path from the root; an address, the demo's name and what is no text stay as they are."""
    return absolute(place) if isinstance(place, str) and place != DEMO and "://" not in place else place


def digest_of(path: str, name: str) -> str:
    """The sha256 of a file; ``name`` is what the config calls it. Raises ValueError when it can't be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{name} {path!r} can't be read: {error.strerror}") from error


def with_paths(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config, not yet checked, with its local files as absolute paths."""
    made = _with_path(raw, "quality", "inception")
    if isinstance(raw.get("data"), dict):
        made["data"] = _with_source(raw["data"])
    if isinstance(raw.get("training"), dict):
        made["training"] = _with_training_paths(raw["training"])
    if isinstance(raw.get("analyze"), dict):
        made["analyze"] = _with_analysis_paths(raw["analyze"])
    if isinstance(raw.get("tasks"), list):
        made["tasks"] = [_with_task_paths(task) if isinstance(task, dict) else task for task in raw["tasks"]]
    return made


def _with_path(raw: Mapping[str, Any], section: str, name: str) -> dict[str, Any]:
    values = raw.get(section)
    if isinstance(values, dict) and isinstance(values.get(name), str):
        return {**raw, section: {**values, name: absolute(values[name])}}
    return dict(raw)


def _with_source(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**raw, "source": local(raw["source"])} if "source" in raw else dict(raw)


def _with_training_paths(training: Mapping[str, Any]) -> dict[str, Any]:
    objective = training.get("finetune_objective")
    if not isinstance(objective, dict):
        return dict(training)
    return {**training, "finetune_objective": _with_path(objective, "perceptual", "weights")}


def _with_analysis_paths(analyze: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(analyze)
    if isinstance(made.get("ood"), list):
        made["ood"] = [_with_source(one) if isinstance(one, dict) else one for one in made["ood"]]
    return made


def _with_task_paths(task: Mapping[str, Any]) -> dict[str, Any]:
    made = _with_path(_with_path(task, "judge_options", "classes"), "perceptual", "weights")
    kind, _, place = str(task.get("judge", "")).partition(":")
    if kind in ("torchscript", "onnx"):
        made["judge"] = f"{kind}:{absolute(place)}"
    return made
