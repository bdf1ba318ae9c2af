"""The train pipeline: from a source of images to a registered tokenizer and the tokens that each task needs."""

import hashlib
from collections.abc import Mapping
from typing import Any

from components.config import (
    BaseStageConfig,
    DistillStageConfig,
    FinetuneStageConfig,
    IngestConfig,
    IngestResources,
    IngestStageConfig,
    NoConfig,
    PromoteConfig,
    PublishConfig,
)
from components.sources import open_source
from components.store import join, read_bytes
from model.starter import model_folder
from pipelines.analyzing import analyzing_stages
from pipelines.config import ConfigError, PipelineConfig, RunConfig
from pipelines.dag import Demand, Pipeline, Stage
from pipelines.demands import TokenizerStage, inference_demand, trained, training_demand
from pipelines.judging import judge_stages, judges_of, score_stage
from pipelines.paths import digest_of
from pipelines.reporting import report_stage
from pipelines.selection import published, stages_from_scores


def build(config: RunConfig) -> Pipeline:
    """The stages of ``config``; looks at the source's listing. Raises ConfigError when the source can't be read."""
    tokenizer = trained(config)
    training = [_base(config), *_grids(config), _distill(config), *_finetune(config)]
    stages = [ingest_stage(config), *training, tokenize_stage(config, tokenizer)]
    stages += [*judge_stages(config), score_stage(config, tokenizer), *stages_from_scores(config, tokenizer)]
    stages += analyzing_stages(config, tokenizer)
    stages += [_publish(config, published(config, tokenizer, stages)), _promote(config)]
    return Pipeline("train", (*stages, report_stage(config, tokenizer, stages)))


def ingest_stage(config: PipelineConfig) -> Stage:
    """``ingest``; looks at the source's listing. Raises ConfigError when it can't be read."""
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
        version="4",
        config=IngestStageConfig(data=config.data, limits=IngestConfig(**limits)),
        resources=IngestResources(**resources),
        fingerprint={"listing": digest},
        demand=Demand(
            memory_gb=config.ingest.memory_mb_per_task / 1024,  # of one task: Ray Data runs as many as fit
            data_cpus=1,
            unit="task",
            setting="ingest",
        ),
        headline=("images", "rejected", "added", "changed", "removed"),
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


def _grids(config: RunConfig) -> list[Stage]:
    if not config.training.store_grids:
        return []
    stage = Stage(
        "grids",
        run="components.grids:make_grids",
        produces="GridSet",
        config=NoConfig(),
        resources=config.inference.resources(),
        needs={"images": "ingest", "base": "base"},
        demand=inference_demand(config),
        headline=("images", "encoded"),
    )
    return [stage]


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
        needs={"images": "grids" if training.store_grids else "ingest", "base": "base"},
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
        fingerprint=_distance(training.finetune_objective.perceptual.weights),
        demand=training_demand(config),
        headline=("steps", f"perceptual@{smallest}", f"perceptual@{largest}"),
    )
    return [stage]


def _distance(weights: str | None) -> dict[str, Any]:
    """The file of a perceptual distance, by its content."""
    if weights is None:
        return {}
    try:
        return {"perceptual": digest_of(weights, "training.finetune_objective.perceptual.weights =")}
    except ValueError as error:
        allowed = "a file that every node has, and kind efficientnet, whose weights come with the extra judges"
        raise ConfigError(f"{error}; allowed are {allowed}") from error


def _start(folder: str | None) -> dict[str, Any]:
    """The weights that training goes on from, by their content."""
    if folder is None:
        return {}
    try:
        return {"start": hashlib.sha256(read_bytes(join(model_folder(folder), "weights.safetensors"))).hexdigest()}
    except OSError as error:
        raise ConfigError(f"training.from = {folder!r}: no Tokenizer artifact can be read there: {error}") from error


def tokenize_stage(config: PipelineConfig, tokenizer: TokenizerStage) -> Stage:
    """``tokenize``, with what ``tokenizer`` makes."""
    return Stage(
        "tokenize",
        run="components.tokenize_images:tokenize",
        produces="CodeBook",
        version="3",
        config=config.inference.config(),
        resources=config.inference.resources(),
        needs={"images": "ingest", "tokenizer": tokenizer.name},
        demand=inference_demand(config),
        headline=("images", "tokens", "encoded"),
    )


def _publish(config: RunConfig, needs: Mapping[str, str]) -> Stage:
    section = config.publish
    return Stage(
        "publish",
        run="components.publish:publish",
        produces="Publication",
        version="4",
        config=PublishConfig(**{name: getattr(section, name) for name in PublishConfig.model_fields}),
        resources=NoConfig(),
        needs=needs,
        headline=("model", "version"),
    )


def _promote(config: RunConfig) -> Stage:
    """Whether what was registered becomes the champion: after it, so that each new version is asked about once."""
    return Stage(
        "promote",
        run="components.score.gate:promote",
        produces="Analysis",
        version="2",
        config=PromoteConfig(gate=config.publish.gate),
        resources=config.inference.resources(),
        needs={"images": "ingest", "scores": "score", "publication": "publish", **judges_of(config)},
        demand=inference_demand(config) if config.publish.gate else Demand(),
        headline=("alias", "reason"),
    )
