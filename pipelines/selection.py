"""The stages from scores on: counts, packed tokens, whole-set quality, the matrix; and what of them is published."""

from collections.abc import Sequence
from typing import Any

from components.config import (
    LengthConfig,
    LengthStageConfig,
    MatrixStageConfig,
    NoConfig,
    RuleConfig,
)
from components.rules import column
from components.task_config import TaskConfig
from pipelines.config import ConfigError, PipelineConfig, user_errors
from pipelines.dag import Stage
from pipelines.demands import TokenizerStage, inference_demand
from pipelines.judging import judges_of
from pipelines.paths import digest_of


def stages_from_scores(config: PipelineConfig, tokenizer: TokenizerStage) -> list[Stage]:
    """What reads ``ingest``, ``tokenize`` and ``score``; raises ConfigError for what can't go together."""
    stages = []
    for task in config.tasks:
        for rule in (task.rule, *task.rules):
            _check(rule, f"tasks: a rule of {task.name!r}", tokenizer.budgets)
        stages += [*_length(config, task, tokenizer), _select(task), _pack(config, task, tokenizer)]
    return [*stages, *_quality(config, tokenizer), *_matrix(config, tokenizer)]


def _check(rule: RuleConfig, place: str, budgets: Sequence[int]) -> None:
    if rule.num_tokens is not None and rule.num_tokens not in budgets:
        raise ConfigError(f"{place}: num_tokens = {rule.num_tokens}: allowed are the budgets {list(budgets)}")
    _check_mean(rule.mean, f"{place}: mean", budgets)


def _check_mean(mean: float | None, name: str, budgets: Sequence[int]) -> None:
    if mean is not None and mean < budgets[0]:
        raise ConfigError(f"{name} = {mean:g}: at least the smallest budget, {budgets[0]}, which every image gets")


def _predicted(task: TaskConfig) -> list[RuleConfig]:
    return [rule for rule in (task.rule, *task.rules) if rule.kind == "predicted"]


def _length(config: PipelineConfig, task: TaskConfig, tokenizer: TokenizerStage) -> list[Stage]:
    """The stage that trains what ``task``'s predicted rules choose from, where it has any."""
    wanted = {(rule.metric, rule.length or LengthConfig()) for rule in _predicted(task)}
    if not wanted:
        return []
    if len(wanted) > 1:
        raise ConfigError(f"tasks: the predicted rules of {task.name!r} must share one metric and one length section")
    ((metric, length),) = wanted
    stage = Stage(
        f"length.{task.name}",
        run="components.length:train_length",
        produces="LengthModel",
        config=LengthStageConfig(metric=metric, column=column(task, metric), length=length),
        resources=config.inference.resources(),
        needs={"images": "ingest", "tokenizer": tokenizer.name, "scores": "score"},
        demand=inference_demand(config),
        headline=("train_images", "error", "error_of_the_mean"),
    )
    return [stage]


def _select(task: TaskConfig) -> Stage:
    lengths = {"lengths": f"length.{task.name}"} if _predicted(task) else {}
    return Stage(
        f"select.{task.name}",
        run="components.select_counts:select",
        produces="TokenCounts",
        version="2",
        config=task,
        resources=NoConfig(),
        needs={"scores": "score", **lengths},
        headline=("mean_tokens", "satisfied", "saved_share"),
    )


def _pack(config: PipelineConfig, task: TaskConfig, tokenizer: TokenizerStage) -> Stage:
    return Stage(
        f"pack.{task.name}",
        run="components.pack:pack",
        produces="TokenArchive",
        version="3",
        config=config.pack,
        resources=NoConfig(),
        needs={
            "images": "ingest",
            "codes": "tokenize",
            "scores": "score",
            "counts": f"select.{task.name}",
            "tokenizer": tokenizer.name,
        },
        headline=("tokens", "mean_bits", "mean_png_bits"),
    )


def _quality(config: PipelineConfig, tokenizer: TokenizerStage) -> list[Stage]:
    """Whole-set quality, where the config asks for it."""
    if config.quality is None:
        return []
    largest = tokenizer.budgets[-1]
    stage = Stage(
        "quality",
        run="components.quality:quality",
        produces="Analysis",
        config=config.quality,
        resources=config.inference.resources(),
        needs={"images": "ingest", "codes": "tokenize", "tokenizer": tokenizer.name, **counts_of(config)},
        fingerprint=_inception(config.quality.inception),
        demand=inference_demand(config),
        headline=("images", f"frechet_efficientnet@{largest}", f"kernel_efficientnet@{largest}"),
    )
    return [stage]


def _inception(file: str | None) -> dict[str, Any]:
    """The weights that rFID is measured with, by their content; raises ConfigError when they aren't there."""
    if file is None:
        return {}
    with user_errors():
        return {"inception": digest_of(file, "quality.inception =")}


def _matrix(config: PipelineConfig, tokenizer: TokenizerStage) -> list[Stage]:
    """The criterion x task matrix, where the config asks for it."""
    if config.matrix is None:
        return []
    _check_mean(config.matrix.mean_tokens, "matrix.mean_tokens", tokenizer.budgets)
    criteria = {task.name: column(task, task.rule.metric) for task in config.tasks}
    stage = Stage(
        "matrix",
        run="components.matrix:matrix",
        produces="Analysis",
        config=MatrixStageConfig(settings=config.matrix, criteria=criteria),
        resources=NoConfig(),
        needs={"scores": "score", **counts_of(config)},
        headline=("images", "mean_tokens", "best_under_own"),
    )
    return [stage]


def counts_of(config: PipelineConfig) -> dict[str, str]:
    """The token counts of all tasks as inputs of a stage."""
    return {f"counts_{task.name}": f"select.{task.name}" for task in config.tasks}


def published(config: PipelineConfig, tokenizer: TokenizerStage, made: Sequence[Stage]) -> dict[str, str]:
    """What of the stages ``made`` is published."""
    archives = {f"archive_{task.name}": f"pack.{task.name}" for task in config.tasks}
    lengths = {f"length_{task.name}": f"length.{task.name}" for task in config.tasks}
    found = {**{name: name for name in ("quality", "matrix", "drift", "analyze")}, **lengths}
    names = {stage.name for stage in made}
    return {
        "images": "ingest",
        "tokenizer": tokenizer.name,
        "scores": "score",
        **counts_of(config),
        **archives,
        **judges_of(config),
        **{argument: name for argument, name in found.items() if name in names},
    }
