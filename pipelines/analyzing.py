"""The stage that measures the paper's claims, where the config asks for it."""

from typing import Any

from components.analyze.settings import AnalyzeConfig, AnalyzeStageConfig, Criterion
from components.config import DataConfig
from components.rules import column
from components.sources import open_source
from components.task_config import TaskConfig
from pipelines.config import ConfigError, RunConfig
from pipelines.dag import Stage
from pipelines.demands import TokenizerStage, inference_demand


def analyzing_stages(config: RunConfig, tokenizer: TokenizerStage) -> list[Stage]:
    """``analyze``, or nothing; raises ConfigError when something that it reads isn't there."""
    settings = config.analyze
    if settings is None:
        return []
    first = config.tasks[0].name
    predicted = [task.name for task in config.tasks if _is_predicted(task)]
    stage = Stage(
        "analyze",
        run="components.analyze.stage:analyze",
        produces="Analysis",
        version="2",
        config=AnalyzeStageConfig(settings=settings, criteria=tuple(_criterion(task) for task in config.tasks)),
        resources=config.inference,
        needs={
            "images": "ingest",
            "tokenizer": tokenizer.name,
            "codes": "tokenize",
            "scores": "score",
            **{f"counts_{task.name}": f"select.{task.name}" for task in config.tasks},
            **{f"length_{name}": f"length.{name}" for name in predicted},
        },
        fingerprint=_outside(settings),
        demand=inference_demand(config, actors=1),
        headline=(
            f"complexity.{first}: tokens ~ jpeg bytes",
            f"specialization.entropy at {config.tokenizer.budgets[-1]}",
            f"regions.hard at {config.tokenizer.budgets[-1]}",
        ),
    )
    return [stage]


def _is_predicted(task: TaskConfig) -> bool:
    return any(rule.kind == "predicted" for rule in (task.rule, *task.rules))


def _criterion(task: TaskConfig) -> Criterion:
    rules = (task.rule, *task.rules)
    return Criterion(task=task.name, rules=tuple((rule, column(task, rule.metric)) for rule in rules))


def _outside(settings: AnalyzeConfig) -> dict[str, Any]:
    """The listings of other sources."""
    try:
        return {one.name: open_source(DataConfig(source=one.source)).digest() for one in settings.ood}
    except (ValueError, OSError) as error:
        raise ConfigError(f"analyze: {error}") from error
