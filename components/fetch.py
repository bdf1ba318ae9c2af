"""model and judge.<task> of a rerun: what is in the model registry becomes an artifact of the workspace."""

import shutil
import tempfile

from components.artifacts import Figures, Job
from components.config import NoConfig, RegisteredModel
from components.registry import ModelVersion, copy_tokenizer, download
from components.store import filled_folder
from components.tracking import Tracker


def fetch_tokenizer(job: Job, *, config: NoConfig, resources: RegisteredModel) -> Figures:
    """Write the Tokenizer: weights and config alone, so that versions which share them share the artifact."""
    copy_tokenizer(_registry(job), _model(resources), job.output)
    return {"model": resources.name, "version": resources.version}


def fetch_judge(job: Job, *, config: NoConfig, resources: RegisteredModel) -> Figures:
    """Write the Judge."""
    with tempfile.TemporaryDirectory() as scratch, filled_folder(job.output) as output:
        folder = download(_registry(job), _model(resources), "", scratch)
        shutil.copytree(folder, output, ignore=shutil.ignore_patterns("artifact.json"), dirs_exist_ok=True)
    return {"model": resources.name, "version": resources.version}


def _registry(job: Job) -> str:
    """The MLflow that records the run is the one that holds the model."""
    return Tracker(**job.tracking).uri


def _model(resources: RegisteredModel) -> ModelVersion:
    return ModelVersion(resources.name, resources.version)
