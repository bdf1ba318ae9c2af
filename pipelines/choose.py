"""``alit select``: token counts under another rule, from scores that are already stored. No Ray, no model."""

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from components import artifacts
from components.artifacts import Artifact, Draft, Job, Manifest, TokenCounts, read_manifest
from components.config import NoConfig, RuleConfig
from components.parts import files_digest
from components.select_counts import select
from components.store import join
from components.task_config import TaskConfig
from pipelines.build import build
from pipelines.config import AnyConfig, ConfigError
from pipelines.dag import Pipeline
from pipelines.lock import hold
from pipelines.runner import absolute
from pipelines.summary import number, table

KINDS = {"max": "threshold", "min": "threshold", "ratio": "within", "mean": "mean_tokens"}


def choose_again(config: AnyConfig, task_name: str, given: Mapping[str, float]) -> Iterator[str]:
    """Apply the rule ``given`` (one of max, min, ratio, mean) with the task's metric; yields a table's lines.

    The result is the artifact that a run with that rule would make, and such a run finds it there.
    """
    task = config.task(task_name)
    ((parameter, value),) = given.items()
    try:
        rule = RuleConfig.model_validate({"kind": KINDS[parameter], "metric": task.rule.metric, parameter: value})
    except ValidationError as error:
        raise ConfigError(f"{parameter} = {value:g}: {error.errors()[0]['msg']}") from error
    changed = task.model_copy(update={"rule": rule})
    tasks = tuple(changed if one.name == task_name else one for one in config.tasks)
    pipeline = build(config.model_copy(update={"tasks": tasks}))
    workspace = absolute(config.workspace)
    with hold(workspace, f"select-{uuid.uuid4().hex[:6]}", config.wait_s):
        uri = _made(pipeline, f"select.{task_name}", workspace)
    figures = TokenCounts.open(uri).manifest.counts
    shares = [part.split(":") for part in str(figures.pop("histogram")).split()]
    total = sum(int(count) for _, count in shares)
    rows = [(tokens, count, f"{int(count) / total:.1%}") for tokens, count in shares]
    yield from table(("tokens", "images", "share"), rows)
    yield ""
    yield from (f"{name.replace('_', ' '):<22}{number(figure)}" for name, figure in figures.items())
    yield f"{'counts':<22}{uri}"


def _made(pipeline: Pipeline, name: str, workspace: str) -> str:
    """The URI of the artifact of stage ``name``, made now unless it stands."""
    stage, keys = pipeline[name], pipeline.keys()
    uri = join(workspace, name, keys[name])
    if read_manifest(uri) is not None:
        return uri
    inputs = {argument: _stored(pipeline, need, workspace) for argument, need in stage.needs.items()}
    began, task = time.monotonic(), stage.config
    assert isinstance(task, TaskConfig)
    draft = Draft(workspace, name, keys[name])
    job = Job(stage=name, key=keys[name], workspace=workspace, output=draft.uri, scratch="")
    try:
        counts = select(job, config=task, resources=NoConfig(), **inputs)
    except ValueError as error:
        draft.discard()
        raise ConfigError(str(error)) from error
    manifest = Manifest(
        schema=TokenCounts.schema,
        version=TokenCounts.version,
        stage=name,
        key=keys[name],
        inputs={argument: keys[need] for argument, need in stage.needs.items()},
        config=task.model_dump(mode="json"),
        code=stage.version,
        counts=counts,
        files=files_digest(join(draft.uri, "table")),
        seconds=time.monotonic() - began,
    )
    return draft.commit(manifest)


def _stored(pipeline: Pipeline, name: str, workspace: str) -> Any:
    """The artifact of stage ``name``; raises ConfigError when it isn't there."""
    uri = join(workspace, name, pipeline.keys()[name])
    if read_manifest(uri) is None:
        raise ConfigError(f"nothing stored at {uri}: `alit run` the config first, with --until {name} at least")
    kind: type[Artifact] = getattr(artifacts, pipeline[name].produces)
    return kind.open(uri)
