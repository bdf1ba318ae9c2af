"""The train pipeline: from a source of images to a registered tokenizer and the tokens that each task needs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.artifacts import join, read_bytes
from components.config import (
    BaseStageConfig,
    DistillStageConfig,
    FinetuneStageConfig,
    IngestConfig,
    IngestResources,
    IngestStageConfig,
)
from components.sources import open_source
from components.tracking import DataSet
from model.starter import model_folder
from pipelines.config import ConfigError, RunConfig
from pipelines.dag import Demand, Pipeline, Stage
from pipelines.demands import inference_demand, tokenizer_stage, training_demand
from pipelines.judging import judging_stages
from pipelines.runner import RunOptions
from pipelines.selection import stages_from_scores


def build(config: RunConfig) -> Pipeline:
    """The stages of ``config``; looks at the source's listing. Raises ConfigError when the source can't be read."""
    stages = [_ingest(config), _base(config), _distill(config), *_finetune(config), _tokenize(config)]
    return Pipeline("train", (*stages, *judging_stages(config), *stages_from_scores(config)))


def options_of(
    config: RunConfig, pipeline: Pipeline, *, force: Sequence[str] = (), until: str | None = None
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
        config=config.model_dump(mode="json", by_alias=True),
        data_set=DataSet(name=Path(data.source).name, digest=digest, source=data.source, counts={}),
    )


def _ingest(config: RunConfig) -> Stage:
    try:
        digest = open_source(config.data).digest()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    limits = {name: getattr(config.ingest, name) for name in IngestConfig.model_fields}
    resources = {name: getattr(config.ingest, name) for name in IngestResources.model_fields}
    return Stage(
        "ingest",
        run="components.ingest:ingest",
        produces="ImageSet",
        version="2",
        config=IngestStageConfig(data=config.data, limits=IngestConfig(**limits)),
        resources=IngestResources(**resources),
        fingerprint={"listing": digest},
        demand=Demand(data_cpus=1),
        headline=("images", "rejected"),
    )


def _base(config: RunConfig) -> Stage:
    training = config.training
    return Stage(
        "base",
        run="components.train:train_base",
        produces="BaseTokenizer",
        version="2",
        config=BaseStageConfig(
            image_size=config.data.image_size,
            base=config.tokenizer.base,
            objective=training.base_objective,
            train=training.base.config(training.start_folder),
        ),
        resources=training.resources(),
        needs={"images": "ingest"},
        fingerprint=_start(training.start_folder),
        demand=training_demand(config),
        headline=("steps", "l1"),
    )


def _distill(config: RunConfig) -> Stage:
    training = config.training
    smallest, largest = config.tokenizer.budgets[0], config.tokenizer.budgets[-1]
    return Stage(
        "distill",
        run="components.train:distill",
        produces="Tokenizer",
        version="2",
        config=DistillStageConfig(
            image_size=config.data.image_size,
            tokenizer=config.tokenizer,
            objective=training.distill_objective,
            train=training.distill.config(training.start_folder),
        ),
        resources=training.resources(),
        needs={"images": "ingest", "base": "base"},
        fingerprint=_start(training.start_folder),
        demand=training_demand(config),
        headline=("steps", f"l1@{smallest}", f"l1@{largest}"),
    )


def _finetune(config: RunConfig) -> list[Stage]:
    training, section = config.training, config.training.finetune
    if section is None:
        return []
    smallest, largest = config.tokenizer.budgets[0], config.tokenizer.budgets[-1]
    stage = Stage(
        "finetune",
        run="components.train:finetune",
        produces="Tokenizer",
        config=FinetuneStageConfig(
            image_size=config.data.image_size,
            objective=training.finetune_objective,
            train=section.config(training.start_folder),
            discriminator=section.discriminator or section.optimizer,
        ),
        resources=training.resources(),
        needs={"images": "ingest", "distilled": "distill"},
        demand=training_demand(config),
        headline=("steps", f"perceptual@{smallest}", f"perceptual@{largest}"),
    )
    return [stage]


def _start(folder: str | None) -> dict[str, Any]:
    """The weights that training goes on from, by their content."""
    if folder is None:
        return {}
    try:
        return {"start": hashlib.sha256(read_bytes(join(model_folder(folder), "weights.safetensors"))).hexdigest()}
    except OSError as error:
        raise ConfigError(f"training.from = {folder!r}: no Tokenizer artifact can be read there: {error}") from error


def _tokenize(config: RunConfig) -> Stage:
    return Stage(
        "tokenize",
        run="components.tokenize_images:tokenize",
        produces="CodeBook",
        version="2",
        config=config.inference.config(),
        resources=config.inference.resources(),
        needs={"images": "ingest", "tokenizer": tokenizer_stage(config)},
        demand=inference_demand(config),
        headline=("images", "tokens"),
    )
