"""``alit select``: token counts under another rule, from scores that are already stored. No Ray, no model."""

import time
import uuid
from collections.abc import Iterator, Mapping

from components.artifacts import Draft, Job, Manifest, ScoreTable, TokenCounts, join, read_manifest
from components.config import NoConfig, RuleConfig
from components.select_counts import select
from components.task_config import TaskConfig
from pipelines.config import ConfigError, RunConfig
from pipelines.dag import Stage
from pipelines.lock import hold
from pipelines.runner import absolute
from pipelines.summary import number, table
from pipelines.train import build, select_stage

KINDS = {"max": "threshold", "min": "threshold", "ratio": "within", "mean": "mean_tokens"}


def choose_again(config: RunConfig, task_name: str, given: Mapping[str, float]) -> Iterator[str]:
    """Apply the rule ``given`` (one of max, min, ratio, mean) with the task's metric; yields a table's lines.

    The result is the artifact that a run with that rule would make, and such a run finds it there.
    """
    task = config.task(task_name)
    ((parameter, value),) = given.items()
    rule = RuleConfig.model_validate({"kind": KINDS[parameter], "metric": task.rule.metric, parameter: value})
    scores = _stored_scores(config)
    stage = select_stage(task.model_copy(update={"rule": rule}))
    workspace = absolute(config.workspace)
    with hold(workspace, f"select-{uuid.uuid4().hex[:6]}", config.wait_s):
        uri = _made(stage, scores, workspace)
    figures = TokenCounts.open(uri).manifest.counts
    shares = [part.split(":") for part in str(figures.pop("histogram")).split()]
    total = sum(int(count) for _, count in shares)
    rows = [(tokens, count, f"{int(count) / total:.1%}") for tokens, count in shares]
    yield from table(("tokens", "images", "share"), rows)
    yield ""
    yield from (f"{name.replace('_', ' '):<22}{number(figure)}" for name, figure in figures.items())
    yield f"{'counts':<22}{uri}"


def _stored_scores(config: RunConfig) -> ScoreTable:
    key = build(config).keys()["score"]
    uri = join(absolute(config.workspace), "score", key)
    if read_manifest(uri) is None:
        raise ConfigError(f"no scores stored at {uri}: `alit run` the config first, with --until score at least")
    return ScoreTable.open(uri)


def _made(stage: Stage, scores: ScoreTable, workspace: str) -> str:
    """The URI of the stage's artifact, made now unless it stands."""
    key = stage.key({"scores": scores.key})
    uri = join(workspace, stage.name, key)
    if read_manifest(uri) is not None:
        return uri
    began, task = time.monotonic(), stage.config
    assert isinstance(task, TaskConfig)
    draft = Draft(workspace, stage.name, key)
    job = Job(stage=stage.name, key=key, workspace=workspace, output=draft.uri, scratch="")
    try:
        counts = select(job, config=task, resources=NoConfig(), scores=scores)
    except ValueError as error:
        draft.discard()
        raise ConfigError(str(error)) from error
    manifest = Manifest(
        schema=TokenCounts.schema,
        version=TokenCounts.version,
        stage=stage.name,
        key=key,
        inputs={"scores": scores.key},
        config=task.model_dump(mode="json"),
        code=stage.version,
        counts=counts,
        seconds=time.monotonic() - began,
    )
    return draft.commit(manifest)
