"""A model registry with versions in it, made without a run of the pipeline, and without MLflow's wrapping of models."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow

from components.registry import REFERENCE, ModelVersion, move_aliases
from components.tracking import Store, Tracker, open_parent_run
from model.starter import STARTER


def registry_at(folder: Path) -> str:
    """The tracking URI of the workspace ``folder``."""
    return f"sqlite:///{folder}/mlflow.db"


def tracker_in(folder: Path) -> Tracker:
    """A run in the MLflow of the workspace ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return open_parent_run(Store(registry_at(folder), "alit", str(folder / "mlflow-artifacts")), "by hand", {})


def register(
    tracker: Tracker,
    folder: Path = STARTER,
    *,
    name: str = "alit-demo",
    alias: str | None = None,
    reference: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> ModelVersion:
    """The tokenizer in ``folder`` as a version, with ``alias`` moved to it."""
    client = mlflow.MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    number = len(client.search_model_versions(f"name = '{name}'")) + 1
    files = Path(tracker.uri.removeprefix("sqlite:///")).parent / f"{name}-{number}"
    shutil.copytree(folder, files / "artifacts" / "tokenizer")
    if reference is not None:
        (files / "artifacts" / "tokenizer" / REFERENCE).write_text(json.dumps(reference))
    made = ModelVersion(name, int(client.create_model_version(name, str(files), tags=dict(tags or {})).version))
    if alias:
        move_aliases(tracker.uri, name, to={alias: made.version}, reason="by hand")
    return made
