"""The rerun pipeline: new images, tokenized by a registered model, with the tokens that each task needs."""

from collections.abc import Mapping
from dataclasses import replace

from components.config import NoConfig, RegisteredModel, TablesConfig
from components.registry import Found, ModelVersion, find_judge, find_tokenizer
from components.task_config import TaskConfig
from components.tracking import redact, store_for
from pipelines.config import RerunConfig, user_errors
from pipelines.dag import Pipeline, Stage
from pipelines.demands import TokenizerStage
from pipelines.judging import score_stage
from pipelines.reporting import report_stage
from pipelines.runner import absolute
from pipelines.selection import counts_of, published, stages_from_scores
from pipelines.train import ingest_stage, tokenize_stage


def build(config: RerunConfig) -> Pipeline:
    """The stages of ``config``; looks at the source's listing and at the model registry, where an alias is resolved.

    Raises ConfigError when the source can't be read, or the registry lacks the model or a judge.
    """
    with user_errors():
        registry = store_for(config.mlflow, absolute(config.workspace)).uri
        found = find_tokenizer(registry, config.model)
        judges = [_judge(registry, found, task) for task in config.tasks if task.judge != "none"]
    config = _sized(config, found)
    tokenizer = TokenizerStage("model", tuple(found.config["budgets"]))
    stages = [_ingest(config), _model(found), *judges]
    stages += [tokenize_stage(config, tokenizer), score_stage(config, tokenizer)]
    stages += [*stages_from_scores(config, tokenizer), *_drift(config, found)]
    stages.append(_publish(config, found, published(config, tokenizer, stages)))
    version = f"{config.model} is version {found.model.version}, weights {found.digest[:12]}, in {redact(registry)}"
    return Pipeline("rerun", (*stages, report_stage(config, tokenizer, stages)), facts={"model": version})


def _sized(config: RerunConfig, found: Found) -> RerunConfig:
    """The config with the image size of the model."""
    size = int(found.config["image_size"][0])
    return config.model_copy(update={"data": config.data.model_copy(update={"image_size": size})})


def _ingest(config: RerunConfig) -> Stage:
    stage = ingest_stage(config)
    return replace(stage, headline=tuple(dict.fromkeys((*stage.headline, "added", "changed", "removed"))))


def _model(found: Found) -> Stage:
    """The tokenizer as an artifact whose key is its content's: versions with the same weights share what follows."""
    return Stage(
        "model",
        run="components.fetch:fetch_tokenizer",
        produces="Tokenizer",
        config=NoConfig(),
        resources=_registered(found.model),
        fingerprint={"content": found.digest},
        headline=("model", "version"),
    )


def _judge(registry: str, found: Found, task: TaskConfig) -> Stage:
    """The judge of ``task`` that was registered with the model; raises ValueError when there is none."""
    name, model = f"{found.model.name}-judge-{task.name}", found.model
    if task.name not in found.judges:
        with_judges = sorted(found.judges) or "none"
        raise ValueError(
            f"tasks: {task.name!r} needs a judge, and version {model.version} of {model.name!r} was registered with "
            f"those of {with_judges}; train with that task first"
        )
    judge = ModelVersion(name, found.judges[task.name])
    return Stage(
        f"judge.{task.name}",
        run="components.fetch:fetch_judge",
        produces="Judge",
        config=NoConfig(),
        resources=_registered(judge),
        fingerprint={"content": find_judge(registry, judge)},
        headline=("model", "version"),
    )


def _drift(config: RerunConfig, found: Found) -> list[Stage]:
    """Where the config asks for it: new images beside those of the training."""
    if config.drift is None:
        return []
    stage = Stage(
        "drift",
        run="components.drift:drift",
        produces="Analysis",
        version="2",
        config=config.drift,
        resources=_registered(found.model),
        needs={"images": "ingest", "scores": "score", **counts_of(config)},
        fingerprint={"model": found.model.name, "version": found.model.version},
        headline=("images", "drift"),
    )
    return [stage]


def _publish(config: RerunConfig, found: Found, needs: Mapping[str, str]) -> Stage:
    return Stage(
        "publish",
        run="components.publish:publish_tables",
        produces="Publication",
        version="4",
        config=TablesConfig(pictures=config.publish.pictures),
        resources=_registered(found.model),
        needs=needs,
        fingerprint={"model": found.model.name, "version": found.model.version},
        headline=("model", "version"),
    )


def _registered(model: ModelVersion) -> RegisteredModel:
    return RegisteredModel(name=model.name, version=model.version)
