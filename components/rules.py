"""The rules of model/selection.py by their config."""

from components.config import RuleConfig
from components.task_config import TaskConfig
from model.selection import Best, MeanTokens, Rule, Threshold, Within


def build_rule(config: RuleConfig) -> Rule:
    """The rule that ``config`` names."""
    if config.kind == "threshold":
        return Threshold(config.metric, max=config.max, min=config.min)
    if config.kind == "within":
        assert config.ratio is not None
        return Within(config.metric, config.ratio)
    if config.kind == "mean_tokens":
        assert config.mean is not None
        return MeanTokens(config.metric, config.mean)
    return Best(config.metric)


def describe(config: RuleConfig) -> str:
    """The rule in a few words, e.g. ``l1 <= 0.06``."""
    if config.kind == "threshold":
        return f"{config.metric} <= {config.max}" if config.max is not None else f"{config.metric} >= {config.min}"
    if config.kind == "within":
        return f"{config.metric} within {config.ratio} of the most tokens"
    if config.kind == "mean_tokens":
        return f"least {config.metric} at {config.mean} tokens a mean image"
    return f"best {config.metric}"


def column(task: TaskConfig, metric: str) -> str:
    """The column of a ScoreTable that holds ``task``'s ``metric``: ``<task>.<metric>``, of pixels the bare name."""
    return f"{task.name}.{metric}" if task.kind != "reconstruction" and metric in task.metrics else metric
