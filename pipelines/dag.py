"""Stages, the graph they make, the keys of their artifacts, and what a run would do.

Pure Python: no Ray, no MLflow. A stage's key hashes its name, its code version, its config, what it knows of the
outside world (``fingerprint``) and the keys of the stages it reads, so the whole plan is known before anything runs.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal

from pydantic import BaseModel

from components import artifacts
from components.artifacts import UNREADABLE, Artifact, ImageSet, Manifest, finished, read_manifest
from components.store import join

STAGE_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")
RESERVED_NAMES = frozenset({"logs", "scratch", "end"})  # folders of a workspace; `end` closes a block in mermaid
MAX_REASONS = 3


@dataclass(frozen=True)
class Demand:
    """What a stage takes of the cluster while it runs."""

    cpus: float = 0.0  # held by Train workers or actors for as long as the stage runs, all of them together
    gpus: float = 0.0
    memory_gb: float = 0.0  # set aside for them, GiB
    data_cpus: float = 0.0  # must be free beside those for Ray Data, else it waits for ever without a word
    _: KW_ONLY
    # The rest only words the message for when it doesn't fit: "set training.workers=1 or training.cpus_per_worker=0.5".
    workers: int = 1  # how many share cpus, gpus and memory
    unit: str = "worker"  # what one of them is called, "actor" for example
    setting: str = ""  # config section that has `workers` and `cpus_per_worker`, such as "training"


@dataclass(frozen=True)
class Stage:
    """One step: the function that makes an artifact, and everything its key is made of."""

    name: str
    _: KW_ONLY
    run: str  # "package.module:function"
    produces: str  # name of a class in components.artifacts
    config: BaseModel  # decides the result: in the key
    version: str = "1"  # of the stage's code; raise it when the same config gives another result
    resources: BaseModel | None = None  # does not change the result: not in the key
    needs: Mapping[str, str] = field(default_factory=dict)  # argument name -> name of the stage that makes it
    fingerprint: Mapping[str, Any] = field(default_factory=dict)  # facts of the outside world: in the key
    demand: Demand = Demand()
    headline: tuple[str, ...] = ()  # figures to show in the table at the end

    def key(self, inputs: Mapping[str, str]) -> str:
        """16 hex digits of what this stage's result depends on; ``inputs``: argument name -> key."""
        facts = {
            "stage": self.name,
            "version": self.version,
            "config": self.config.model_dump(mode="json"),
            "fingerprint": dict(self.fingerprint),
            "inputs": dict(inputs),
        }
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Pipeline:
    """A graph of stages. Raises ValueError naming them: a bad name or one used twice, a missing input, a cycle."""

    name: str
    stages: tuple[Stage, ...]
    facts: Mapping[str, str] = field(default_factory=dict)  # what was found out while planning, for a person

    def __post_init__(self) -> None:
        _check_names(self)
        _check_inputs(self)
        self.order()

    def __getitem__(self, name: str) -> Stage:
        """The stage of that name; raises ValueError listing the stages there are."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"no stage {name!r} in pipeline {self.name!r}; its stages are {self.names}")

    @property
    def names(self) -> list[str]:
        """The stages' names as they were given."""
        return [stage.name for stage in self.stages]

    def order(self) -> tuple[Stage, ...]:
        """Every stage after those it reads; otherwise as they were given."""
        sorter = TopologicalSorter({stage.name: sorted(set(stage.needs.values())) for stage in self.stages})
        try:
            return tuple(self[name] for name in sorter.static_order())
        except CycleError as error:
            raise ValueError(f"pipeline {self.name!r}: cycle {' -> '.join(error.args[1])}") from error

    def keys(self) -> dict[str, str]:
        """Stage name -> key of its artifact."""
        keys: dict[str, str] = {}
        for stage in self.order():
            keys[stage.name] = stage.key({argument: keys[name] for argument, name in stage.needs.items()})
        return keys

    def until(self, name: str) -> "Pipeline":
        """The pipeline that makes ``name`` and no more; raises ValueError when there is no such stage."""
        wanted, queue = {name}, [self[name]]
        while queue:
            needs = set(queue.pop().needs.values()) - wanted
            wanted |= needs
            queue += [self[need] for need in needs]
        return replace(self, stages=tuple(stage for stage in self.stages if stage.name in wanted))

    def mermaid(self) -> str:
        """The graph as mermaid text."""
        nodes = {stage.name: stage.name.replace(".", "__") for stage in self.stages}
        lines = ["flowchart LR"]
        lines += [f'    {nodes[stage.name]}["{stage.name}<br/>{stage.produces}"]' for stage in self.stages]
        for stage in self.stages:
            lines += [
                f"    {nodes[need]} -- {argument} --> {nodes[stage.name]}" for argument, need in stage.needs.items()
            ]
        return "\n".join(lines) + "\n"


def _check_names(pipeline: Pipeline) -> None:
    seen: set[str] = set()
    for name in pipeline.names:
        if not STAGE_NAME.fullmatch(name) or name in RESERVED_NAMES:
            raise ValueError(
                f"pipeline {pipeline.name!r}: a stage can't be named {name!r}; allowed are lower-case letters, digits, "
                f"_ and dots, except {sorted(RESERVED_NAMES)}"
            )
        if name in seen:
            raise ValueError(f"pipeline {pipeline.name!r}: two stages are named {name!r}")
        seen.add(name)


def _check_inputs(pipeline: Pipeline) -> None:
    for stage in pipeline.stages:
        for argument, need in stage.needs.items():
            if need not in pipeline.names:
                raise ValueError(
                    f"pipeline {pipeline.name!r}: stage {stage.name!r} reads {argument!r} from {need!r}, "
                    f"which is not among its stages {pipeline.names}"
                )


@dataclass(frozen=True)
class Planned:
    """What a run would do with one stage, and why."""

    stage: Stage
    key: str
    state: Literal["stands", "run"]
    reason: str  # empty when the artifact stands
    manifest: Manifest | None = None  # of the artifact that stands


def plan(pipeline: Pipeline, workspace: str, force: tuple[str, ...] = ()) -> list[Planned]:
    """What a run in ``workspace`` would do, stage by stage in order.

    A forced stage runs again under the same key; those that read it stand, but for tables that follow its files.
    Raises ValueError when ``force`` names a stage that is not there.
    """
    for name in force:
        _ = pipeline[name]
    keys, planned = pipeline.keys(), dict[str, Planned]()
    for stage in pipeline.order():
        one = _plan_stage(stage, keys, workspace, stage.name in force)
        again = _made_again(one, planned)
        planned[stage.name] = replace(one, state="run", reason=f"{again} is made again") if again else one
    return list(planned.values())


def _made_again(one: Planned, planned: Mapping[str, Planned]) -> str:
    """The input whose files those of a standing artifact may no longer follow: one key may come in other files."""
    if one.state == "run" or not _kind(one.stage).follows_images or one.manifest is None:
        return ""
    for need in (planned[name] for name in one.stage.needs.values()):
        if _kind(need.stage).follows_images or _kind(need.stage) is ImageSet:
            if need.manifest is None or need.state == "run" or need.manifest.files != one.manifest.files:
                return need.stage.name
    return ""


def _kind(stage: Stage) -> type[Artifact]:
    kind: type[Artifact] = getattr(artifacts, stage.produces)
    return kind


def _plan_stage(stage: Stage, keys: Mapping[str, str], workspace: str, forced: bool) -> Planned:
    key = keys[stage.name]
    manifest = read_manifest(join(workspace, stage.name, key))
    if forced:
        return Planned(stage, key, "run", "forced", manifest)
    if manifest is not None and not any(_fingerprint_differences(manifest.fingerprint, _facts(stage))):
        if missing := manifest.counts.get(UNREADABLE):
            return Planned(stage, key, "run", f"{missing} of its inputs could not be read", manifest)
        return Planned(stage, key, "stands", "", manifest)
    newest = manifest or newest_manifest(workspace, stage.name)  # the first: made of another world than was planned
    if newest is None:
        return Planned(stage, key, "run", "first run")
    inputs = {argument: keys[name] for argument, name in stage.needs.items()}
    reasons = list(_differences(stage, inputs, newest)) or ["its key changed"]
    more = f"; and {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else ""
    return Planned(stage, key, "run", "; ".join(reasons[:MAX_REASONS]) + more, manifest)


def _facts(stage: Stage) -> dict[str, Any]:
    """The fingerprint as a manifest has it."""
    facts: dict[str, Any] = json.loads(json.dumps(dict(stage.fingerprint)))
    return facts


def newest_manifest(workspace: str, stage_name: str) -> Manifest | None:
    """The manifest of the newest finished artifact of a stage, whatever its key; None when there is none."""
    return next((manifest for _, manifest in finished(workspace, stage_name)), None)


def _differences(stage: Stage, inputs: Mapping[str, str], old: Manifest) -> Iterator[str]:
    """What differs between a stage as it is now and the artifact it made before."""
    if old.code != stage.version:
        yield f"code version {old.code} -> {stage.version}"
    yield from _config_differences(old.config, json.loads(stage.config.model_dump_json()))
    yield from _fingerprint_differences(old.fingerprint, _facts(stage))
    for argument in sorted({*inputs, *old.inputs}):
        if inputs.get(argument) != old.inputs.get(argument):
            yield f"input {argument} changed ({stage.needs.get(argument, 'no longer read')})"


def _fingerprint_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, after = _flat(old), _flat(new)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            told = f"{str(before.get(name))[:12]} -> {str(after.get(name))[:12]}"
            yield "source changed" if name == "listing" else f"{name} {told}"


def _config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, after = _flat(old), _flat(new)
    for path in sorted({*before, *after}):
        if before.get(path, "unset") != after.get(path, "unset"):
            yield f"config {path}: {before.get(path, 'unset')} -> {after.get(path, 'unset')}"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths; a list is one value."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{path}.{name}" if path else name).items()}
