"""The model registry: a tokenizer goes in as a new version, and comes out as a folder.

It and serving.py, which MLflow runs beside the weights, are the modules besides tracking.py that import mlflow.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from components.artifacts import exists, join, local_folder, read_json
from components.buckets import check, is_bucket
from components.config import RuleConfig
from components.rules import HEADS
from components.tracking import Tracker
from model.starter import model_folder

SERVING = Path(__file__).with_name("serving.py")
PACKAGES = ("model", "components")  # what serving.py imports, at the version that made the weights
REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "pillow", "pandas", "pydantic")


@dataclass(frozen=True)
class ModelVersion:
    """A registered model."""

    name: str
    version: int


@dataclass(frozen=True)
class Rules:
    """What travels with the weights so that tasks can be named."""

    configs: Mapping[str, Any]  # task -> rule config
    heads: Mapping[str, str]  # task -> URI of the LengthHead of a rule that predicts


def register_tokenizer(tracker: Tracker, folder: str, *, name: str, rules: Rules, example_png: bytes) -> ModelVersion:
    """Register the tokenizer in ``folder`` under ``name``, logged by the tracker's run.

    The code that serves it is this software's own,
    copied beside it; nothing is pickled.
    """
    import mlflow

    mlflow.set_tracking_uri(tracker.uri)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch, "tokenizer")
        shutil.copytree(folder, weights, ignore=shutil.ignore_patterns("artifact.json"))
        (weights / "rules.json").write_text(json.dumps(dict(rules.configs), indent=2))
        for task, uri in rules.heads.items():
            with local_folder(uri) as head:
                shutil.copytree(head, weights / HEADS / task)
        with mlflow.start_run(run_id=tracker.run_id):
            info = mlflow.pyfunc.log_model(
                name="tokenizer",
                python_model=str(SERVING),
                artifacts={"tokenizer": str(weights)},
                code_paths=_code(Path(scratch)),
                signature=_signature(),
                input_example=_example(example_png),
                pip_requirements=[f"{package}=={version(package).split('+')[0]}" for package in REQUIREMENTS],
                registered_model_name=name,
            )
    return ModelVersion(name, int(info.registered_model_version))


def describe_version(tracker: Tracker, made: ModelVersion, *, card: str, tags: Mapping[str, str]) -> None:
    """Give a version its model card (markdown) and tags."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
    client.update_model_version(made.name, str(made.version), description=card)
    for name, value in tags.items():
        client.set_model_version_tag(made.name, str(made.version), name, value)


def register_judge(tracker: Tracker, folder: str, *, name: str, figures: Mapping[str, Any]) -> ModelVersion:
    """Register the judge in ``folder`` under ``name``: its files, no pickle, and what it scored as tags."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
    client.log_artifacts(tracker.run_id, folder, f"judges/{name}")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(tracker.run_id).info.artifact_uri}/judges/{name}"
    made = client.create_model_version(
        name, source, run_id=tracker.run_id, tags={f"judge.{key}": str(value) for key, value in figures.items()}
    )
    return ModelVersion(name, int(made.version))


def download_tokenizer(uri: str) -> str:
    """The local folder of the tokenizer behind ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises ValueError when there is no such model; the registry is the one of MLFLOW_TRACKING_URI.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.artifacts.download_artifacts(f"{uri}/artifacts/tokenizer")
    except MlflowException as error:
        where = mlflow.get_tracking_uri()
        raise ValueError(f"--model {uri!r}: not found in {where} (set MLFLOW_TRACKING_URI): {error}") from error


def _code(scratch: Path) -> list[str]:
    """Copies of our packages without weights and caches."""
    root = SERVING.parent.parent
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.png", "*.md")
        shutil.copytree(root / package, scratch / "code" / package, ignore=ignored)
    return [str(scratch / "code" / package) for package in PACKAGES]


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.long, "num_tokens"),
                ColSpec(Array(DataType.long), "token_ids", required=False),
                ColSpec(DataType.string, "image", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("rule", DataType.string, ""),
                ParamSpec("num_tokens", DataType.long, 0),
                ParamSpec("output", DataType.string, "tokens"),
            ]
        ),
    )


def _example(png: bytes) -> Any:
    import pandas as pd

    return pd.DataFrame({"image": [png]})


def resolve_model(name: str) -> str:
    """The folder of ``starter``, a Tokenizer's (local or s3://), or a registered ``models:/NAME@ALIAS`` (downloaded).

    Raises ValueError when there is no tokenizer.
    """
    registered = ":/" in name and not is_bucket(name)
    folder = download_tokenizer(name) if registered else model_folder(name)
    if is_bucket(name):
        check(name, "--model")
    if not all(exists(join(folder, file)) for file in ("weights.safetensors", "config.json")):
        raise ValueError(f"--model {name!r}: no tokenizer there; starter, a Tokenizer's folder or models:/NAME@ALIAS")
    return folder


def registered_rules(folder: str) -> dict[str, RuleConfig]:
    """The rule of each task that the model in ``folder`` was published with; none for a bare Tokenizer artifact."""
    file = join(folder, "rules.json")
    rules = read_json(file) if exists(file) else {}
    return {task: RuleConfig.model_validate(rule) for task, rule in rules.items()}
