"""The rules of model/selection.py by their config."""

from pathlib import Path
from typing import TYPE_CHECKING

from components.config import RuleConfig
from components.task_config import TaskConfig
from model.selection import Best, FixedTokens, MeanTokens, Rule, Threshold, Within

if TYPE_CHECKING:
    from model.predicted import PredictedThreshold

OVER_THE_SET = "mean_tokens"  # the one rule that weighs images against each other
HEADS = "heads"  # folder of a published model with a LengthHead for each task whose rule predicts


def build_rule(config: RuleConfig, *, larger_is_better: bool | None = None) -> Rule:
    """The rule that ``config`` names; ``larger_is_better``: of its metric, None: as the metric's name says.

    Raises ValueError for a predicted rule, which needs its head (:func:`rule_with_head`).
    """
    if config.kind == "threshold":
        return Threshold(config.metric, max=config.max, min=config.min)
    if config.kind == "within":
        assert config.ratio is not None
        return Within(config.metric, config.ratio, larger_is_better)
    if config.kind == "mean_tokens":
        assert config.mean is not None
        return MeanTokens(config.metric, config.mean, larger_is_better)
    if config.kind == "fixed":
        assert config.num_tokens is not None
        return FixedTokens(config.num_tokens, config.metric)
    if config.kind == "predicted":
        raise ValueError(f"rule {describe(config)!r}: it needs the head that its pipeline trained")
    return Best(config.metric, larger_is_better)


def serves_alone(config: RuleConfig) -> bool:
    """Whether a tokenizer can apply the rule to any one image: with no judge, no stored scores and no other images."""
    from model.metrics import METRICS

    needs_no_metric = config.kind in ("fixed", "predicted")
    return needs_no_metric or (config.metric in METRICS and config.kind != OVER_THE_SET)


def searched(config: RuleConfig) -> RuleConfig:
    """The threshold on true values that a predicted rule stands for."""
    return RuleConfig(kind="threshold", metric=config.metric, max=config.max, min=config.min)


def rule_with_head(config: RuleConfig, folder: Path) -> "Rule | PredictedThreshold":
    """The rule that ``config`` names; a predicted one with the LengthHead saved in ``folder``."""
    if config.kind != "predicted":
        return build_rule(config)
    from model.predicted import LengthHead, PredictedThreshold

    return PredictedThreshold(LengthHead.load(folder), max=config.max, min=config.min)


def describe(config: RuleConfig) -> str:
    """The rule in a few words, e.g. ``l1 <= 0.06``."""
    if config.kind in ("threshold", "predicted"):
        condition = f"{config.metric} <= {config.max}" if config.max is not None else f"{config.metric} >= {config.min}"
        return f"predicted {condition}" if config.kind == "predicted" else condition
    if config.kind == "within":
        return f"{config.metric} within {config.ratio} of the most tokens"
    if config.kind == "mean_tokens":
        return f"best mean {config.metric} at {config.mean:g} tokens a mean image"
    if config.kind == "fixed":
        return f"{config.num_tokens} tokens"
    return f"best {config.metric}"


def columns_of(task: TaskConfig) -> list[str]:
    """The columns of a ScoreTable that are there for ``task``."""
    judged = task.metrics if task.kind != "reconstruction" else ()
    return [*task.pixel_metrics, *(column(task, metric) for metric in judged)]


def column(task: TaskConfig, metric: str) -> str:
    """The column of a ScoreTable that holds ``task``'s ``metric``: ``<task>.<metric>``, of pixels the bare name."""
    return f"{task.name}.{metric}" if task.kind != "reconstruction" and metric in task.metrics else metric
