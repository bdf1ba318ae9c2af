"""The stages that measure: a judge for each task that has one, and the scores of all tasks."""

from typing import Any

from components.plugins import source_digest
from components.rules import column
from components.task_config import (
    JUDGE_KINDS,
    OWN,
    PIXEL_METRICS,
    TASK_KINDS,
    JudgeStageConfig,
    ScoredTask,
    ScoreStageConfig,
    TaskConfig,
)
from model.recipes import PerceptualConfig
from model.weights import efficientnet_weights, perceptual_weights
from pipelines.config import ConfigError, PipelineConfig, RunConfig
from pipelines.dag import Stage
from pipelines.demands import TokenizerStage, inference_demand, training_demand
from pipelines.paths import digest_of


def judge_stages(config: RunConfig) -> list[Stage]:
    """``judge.<task>`` for each task with a judge; raises ConfigError for a file that isn't there."""
    try:
        return [_judge(config, task) for task in config.tasks if task.judge != "none"]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def judges_of(config: PipelineConfig) -> dict[str, str]:
    """The judges as inputs of a stage."""
    return {f"judge_{task.name}": f"judge.{task.name}" for task in config.tasks if task.judge != "none"}


def _judge(config: RunConfig, task: TaskConfig) -> Stage:
    trained = task.judge == "probe"
    return Stage(
        f"judge.{task.name}",
        run="components.train.probe:train_probe" if trained else "components.judges.stage:make_judge",
        produces="Judge",
        config=JudgeStageConfig(
            spec=task.judge, kind=task.kind, options=task.judge_options, image_size=config.data.image_size
        ),
        resources=config.training.resources() if trained else config.inference.resources(),
        needs={"images": "ingest"},
        fingerprint=_origin(task),
        demand=training_demand(config) if trained else inference_demand(config, actors=1),
        headline=("accuracy", "abs_rel", "miou", "constant", "skill", "gallery"),
    )


def _origin(task: TaskConfig) -> dict[str, Any]:
    """The files that a judge is made of, by their content; raises ValueError when one isn't there."""
    kind, _, place = task.judge.partition(":")
    files = {"classes": task.judge_options.classes} if task.judge_options.classes else {}
    if kind in ("torchscript", "onnx"):
        files["file"] = place
    if kind in ("probe", "efficientnet-lite0"):
        files["backbone"] = str(efficientnet_weights())
    own = {place: source_digest(place) for place in (task.judge, task.kind) if _is_own(place)}
    return {name: digest_of(path, "tasks:") for name, path in files.items()} | own


def _is_own(place: str) -> bool:
    kind = place.partition(":")[0]
    return place not in TASK_KINDS and kind not in JUDGE_KINDS and OWN.fullmatch(place) is not None


def score_stage(config: PipelineConfig, tokenizer: TokenizerStage) -> Stage:
    """``score``, of all tasks; raises ConfigError for a file that isn't there."""
    try:
        return _score(config, tokenizer)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _score(config: PipelineConfig, tokenizer: TokenizerStage) -> Stage:
    asked = {metric for task in config.tasks for metric in task.pixel_metrics}
    metrics = tuple(metric for metric in PIXEL_METRICS if metric in asked)
    judged = [task for task in config.tasks if task.kind != "reconstruction"]
    distances = [task.perceptual for task in config.tasks if "perceptual" in task.pixel_metrics]
    weights = perceptual_weights(distances[0]) if distances else None
    columns = [*metrics, *(column(task, metric) for task in judged for metric in task.metrics)]
    return Stage(
        "score",
        run="components.score:score",
        produces="ScoreTable",
        version="3",
        config=ScoreStageConfig(
            metrics=metrics,
            perceptual=distances[0] if distances else PerceptualConfig(),
            tasks=tuple(ScoredTask(name=task.name, kind=task.kind, metrics=task.metrics) for task in judged),
            precision=config.inference.precision,
        ),
        resources=config.inference.resources(),
        needs={
            "images": "ingest",
            "codes": "tokenize",
            "tokenizer": tokenizer.name,
            **judges_of(config),
        },
        fingerprint={
            **{task.kind: source_digest(task.kind) for task in judged if _is_own(task.kind)},
            **({"perceptual": digest_of(str(weights), "tasks:")} if weights else {}),
        },
        demand=inference_demand(config),
        headline=(*(f"{columns[0]}@{budget}" for budget in (tokenizer.budgets[0], tokenizer.budgets[-1])), "scored"),
    )
