"""The pipeline that a config asks for, and how it wants it run."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from components.tracking import DataSet
from pipelines import rerun, train
from pipelines.config import AnyConfig, RerunConfig, to_yaml
from pipelines.dag import Pipeline
from pipelines.runner import RunOptions


def build(config: AnyConfig) -> Pipeline:
    """The stages of ``config``; looks at the source's listing and, for a rerun, at the model registry.

    Raises ConfigError when one of them can't be read.
    """
    return rerun.build(config) if isinstance(config, RerunConfig) else train.build(config)


def options_of(
    config: AnyConfig, pipeline: Pipeline, *, force: Sequence[str] = (), until: str | None = None
) -> RunOptions:
    """How ``config`` wants ``pipeline`` run."""
    data = config.data
    digest = str(pipeline["ingest"].fingerprint["listing"])
    return RunOptions(
        force=tuple(force),
        until=until,
        retries=config.retries,
        wait_s=config.wait_s,
        ray=config.ray,
        mlflow=config.mlflow,
        config=yaml.safe_load(to_yaml(config)),
        data_set=DataSet(name=Path(data.source).name, digest=digest, source=data.source, counts={}),
    )
