"""The stages from scores on: counts, packed tokens, whole-set quality, the matrix, and their publication."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.config import LengthConfig, LengthStageConfig, MatrixStageConfig, NoConfig, RuleConfig
from components.rules import column
from components.task_config import TaskConfig
from pipelines.config import ConfigError, RunConfig
from pipelines.dag import Stage
from pipelines.demands import inference_demand, tokenizer_stage


def stages_from_scores(config: RunConfig) -> list[Stage]:
    """What reads ``ingest``, ``tokenize`` and ``score``; raises ConfigError for what can't go together."""
    stages = []
    for task in config.tasks:
        stages += [*_length(config, task), _select(task), _pack(config, task)]
    stages += [*_quality(config), *_matrix(config)]
    return [*stages, _publish(config, [stage.name for stage in stages])]


def _predicted(task: TaskConfig) -> list[RuleConfig]:
    return [rule for rule in (task.rule, *task.rules) if rule.kind == "predicted"]


def _length(config: RunConfig, task: TaskConfig) -> list[Stage]:
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
        needs={"images": "ingest", "tokenizer": tokenizer_stage(config), "scores": "score"},
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


def _pack(config: RunConfig, task: TaskConfig) -> Stage:
    return Stage(
        f"pack.{task.name}",
        run="components.pack:pack",
        produces="TokenArchive",
        version="2",
        config=config.pack,
        resources=NoConfig(),
        needs={
            "images": "ingest",
            "codes": "tokenize",
            "scores": "score",
            "counts": f"select.{task.name}",
            "tokenizer": tokenizer_stage(config),
        },
        headline=("tokens", "mean_bits", "mean_png_bits"),
    )


def _quality(config: RunConfig) -> list[Stage]:
    """Whole-set quality, where the config asks for it."""
    if config.quality is None:
        return []
    largest = config.tokenizer.budgets[-1]
    stage = Stage(
        "quality",
        run="components.quality:quality",
        produces="Analysis",
        config=config.quality,
        resources=config.inference.resources(),
        needs={"images": "ingest", "codes": "tokenize", "tokenizer": tokenizer_stage(config), **_counts(config)},
        fingerprint=_inception(config.quality.inception),
        demand=inference_demand(config),
        headline=("images", f"frechet_efficientnet@{largest}", f"kernel_efficientnet@{largest}"),
    )
    return [stage]


def _inception(file: str | None) -> dict[str, Any]:
    """The weights that rFID is measured with, by their content; raises ConfigError when they aren't there."""
    if file is None:
        return {}
    if not Path(file).is_file():
        raise ConfigError(f"quality.inception = {file!r}: no such file")
    return {"inception": hashlib.sha256(Path(file).read_bytes()).hexdigest()}


def _matrix(config: RunConfig) -> list[Stage]:
    """The criterion x task matrix, where the config asks for it."""
    if config.matrix is None:
        return []
    criteria = {task.name: column(task, task.rule.metric) for task in config.tasks}
    stage = Stage(
        "matrix",
        run="components.matrix:matrix",
        produces="Analysis",
        config=MatrixStageConfig(settings=config.matrix, criteria=criteria),
        resources=NoConfig(),
        needs={"scores": "score", **_counts(config)},
        headline=("images", "mean_tokens", "best_under_own"),
    )
    return [stage]


def _counts(config: RunConfig) -> dict[str, str]:
    return {f"counts_{task.name}": f"select.{task.name}" for task in config.tasks}


def _publish(config: RunConfig, made: Sequence[str]) -> Stage:
    archives = {f"archive_{task.name}": f"pack.{task.name}" for task in config.tasks}
    lengths = {f"length_{task.name}": f"length.{task.name}" for task in config.tasks}
    found = {"quality": "quality", "matrix": "matrix", **lengths}
    optional = {argument: name for argument, name in found.items() if name in made}
    judges = {f"judge_{task.name}": f"judge.{task.name}" for task in config.tasks if task.judge != "none"}
    return Stage(
        "publish",
        run="components.publish:publish",
        produces="Publication",
        version="2",
        config=config.publish,
        resources=NoConfig(),
        needs={
            "images": "ingest",
            "tokenizer": tokenizer_stage(config),
            "scores": "score",
            **_counts(config),
            **archives,
            **judges,
            **optional,
        },
        headline=("model", "version"),
    )
