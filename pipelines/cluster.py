"""The Ray that stages run on: joined or started for the run, and asked first whether it is big enough."""

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from components import buckets
from components.artifacts import WorkspaceError
from components.config import ClusterSize, RaySettings
from components.environment import OWN_RAY, restored
from pipelines.dag import Demand, Stage

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # ray.train.report() returns no faster than this
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Of a Ray of our own: nobody takes a node from it, so there needn't be an actor that looks out for that.
OWN = {OWN_RAY: "1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
MIB, GIB = 1 << 20, 1 << 30
EPSILON = 1e-6


class ClusterError(WorkspaceError):
    """The Ray cluster can't be joined or started."""


class DemandError(WorkspaceError):
    """A stage wants more than the whole cluster has; says what would fit."""


@contextmanager
def cluster(settings: RaySettings, log: str) -> Iterator[None]:
    """Ray for the length of a ``with``: what is connected already, RAY_ADDRESS, ``settings.address``, or our own.

    What Ray prints in this process goes to the file ``log``. Raises ClusterError.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    arguments = _init_arguments(settings)
    inherited = {**OWN, **stage_environment()} if arguments.get("address") == "local" else {}
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), restored(*inherited):
        os.environ.update(inherited)
        try:
            _connect(settings, arguments)
            yield
        finally:
            ray.shutdown()


def _connect(settings: RaySettings, arguments: Mapping[str, Any]) -> None:
    import ray

    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **arguments)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = os.environ.get("RAY_ADDRESS") or settings.address or "a Ray of its own"
        raise ClusterError(f"the run can't use {where}: {error}") from error


def _init_arguments(settings: RaySettings) -> dict[str, Any]:
    inherited = os.environ.get("RAY_ADDRESS")
    if inherited and inherited != "local":
        return {}  # bare: inside `ray job submit` Ray knows the rest
    if settings.address and settings.address != "local" and not inherited:
        if settings.address.startswith("ray://"):
            raise ClusterError(f"ray.address: {settings.address!r} is a Ray Client; give host:port, or submit a job")
        return {"address": settings.address}
    return {
        "address": "local",
        "num_cpus": settings.num_cpus,
        "object_store_memory": settings.object_store_mb * MIB,
        "include_dashboard": False,
    }


def free_placement_groups() -> None:
    """Give back what a dead training held, in a Ray of our own while no stage runs in it; elsewhere nothing happens.

    A group outlives the controller that asked for it, and Ray Train's cleaner needs a dashboard to see that one died.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if OWN_RAY in os.environ:
        for number, group in placement_group_table().items():
            if group["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(number))))


def runtime_env() -> dict[str, Any]:
    """Ray's, of a stage's process and those that it starts.

    Those of a Ray of our own have inherited it all: so they can be the ones that Ray starts with.
    """
    return {} if OWN_RAY in os.environ else {"env_vars": stage_environment()}


def stage_environment() -> dict[str, str]:
    """Variables for stage processes and theirs, on any node: quiet Ray, the same buckets, the same modules.

    Ray logs them, so there are no credentials among them: a node has its own, or, when we started Ray, ours.
    """
    own = (sys.prefix, sys.base_prefix)
    folders = [os.path.abspath(p) for p in sys.path if not p.startswith(own) and (not p or os.path.isdir(p))]
    settings = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    return {**settings, **buckets.environment(), "PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}


def check_demand(
    stages: Iterable[Stage], have: Mapping[str, float], largest: Mapping[str, float] | None = None
) -> None:
    """Whether each stage fits a cluster with resources ``have`` (CPU, GPU, memory in bytes).

    ``largest``: what one node has at most, which each worker must fit; None: as much as the cluster. Raises DemandError
    that names all that don't.
    """
    problems = [text for stage in stages for text in _problems(stage, have, have if largest is None else largest)]
    if problems:
        raise DemandError("\n".join(problems))


def fits(demand: Demand, running: Iterable[Demand], have: Mapping[str, float]) -> bool:
    """Whether a stage may start beside those ``running``: together they must leave Ray Data its CPUs.

    Two stages that fit one by one and not together would each hold what the other waits for.
    """
    everyone = [demand, *running]
    if len(everyone) == 1:
        return True
    data = max(one.data_cpus for one in everyone)
    return all(
        sum(getattr(one, kind.demand) for one in everyone) + (data if kind is CPU else 0) <= kind.of(have) + EPSILON
        for kind in KINDS
    )


@dataclass(frozen=True)
class _Kind:
    """Something a cluster has so much of."""

    demand: str  # field of Demand
    setting: str  # what the config calls a worker's share, without "_per_worker"
    unit: str  # of a demand, for people
    per_unit: float = 1.0  # of the setting's in one of the demand's

    def of(self, have: Mapping[str, float]) -> float:
        """How much of it there is."""
        return have.get("memory", 0.0) / GIB if self.demand == "memory_gb" else have.get(self.unit, 0.0)


BIGGER = "use a bigger cluster (if it grows by itself, ray.grows_to says how far)"
LARGER = "use larger nodes"
CPU = _Kind("cpus", "cpus", "CPU")
KINDS = (CPU, _Kind("gpus", "gpus", "GPU"), _Kind("memory_gb", "memory_mb", "GiB", 1024.0))


def grown(have: Mapping[str, float], to: ClusterSize) -> dict[str, float]:
    """The resources of a cluster when its autoscaler has made it as large as it may be."""
    limits = {"CPU": to.cpus, "GPU": to.gpus, "memory": to.memory_gb * GIB}
    return {**have, **{name: max(limit, have.get(name, 0.0)) for name, limit in limits.items()}}


def largest_node(
    nodes: Iterable[Mapping[str, Any]], now: Mapping[str, float], have: Mapping[str, float]
) -> dict[str, float]:
    """The most that one of ``nodes`` (``ray.nodes()``), or one that is still to come, has of each resource.

    ``now``: what the cluster has; ``have``: when it has grown. One node may bring all of the difference.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return {
        name: max(have.get(name, 0.0) - now.get(name, 0.0), *(node.get(name, 0.0) for node in alive), 0.0)
        for name in ("CPU", "GPU", "memory")
    }


def _problems(stage: Stage, have: Mapping[str, float], largest: Mapping[str, float]) -> Iterator[str]:
    for kind in KINDS:
        yield from [*_problem(stage, kind, kind.of(have))] or _problem_of_one(stage.name, stage.demand, kind, largest)


def _problem_of_one(name: str, demand: Demand, kind: _Kind, largest: Mapping[str, float]) -> Iterator[str]:
    """A worker is on one node, however many there are."""
    each, most = getattr(demand, kind.demand) / demand.workers, kind.of(largest)
    if each > most + EPSILON:
        advice = _advice(replace(demand, workers=1), kind, each, most, otherwise=LARGER)
        wanted = f"{each:g} {kind.unit} for one {demand.unit}"
        yield f"{name} wants {wanted}, no node has more than {most:.4g}: {advice}"


def _problem(stage: Stage, kind: _Kind, have: float) -> Iterator[str]:
    demand = stage.demand
    wanted: float = getattr(demand, kind.demand)
    data = demand.data_cpus if kind is CPU else 0.0
    if wanted + data <= have + EPSILON:
        return
    units = f"{demand.workers} {demand.unit}s x {wanted / demand.workers:g}" if demand.workers > 1 else f"{wanted:g}"
    sum_of = f"{units} {kind.unit}" + (f" + {data:g} for Ray Data" if data else "")
    plural = "" if kind.unit == "GiB" else "s"
    total = f" = {wanted + data:g} {kind.unit}{plural}" if data or demand.workers > 1 else ""
    advice = _advice(demand, kind, wanted, have - data, otherwise=BIGGER)
    yield f"{stage.name} wants {sum_of}{total}, the cluster has {have:.4g}: {advice}"


def _advice(demand: Demand, kind: _Kind, wanted: float, free: float, *, otherwise: str) -> str:
    """What would fit in ``free`` CPUs, GPUs or GiB, or else be done."""
    section = f"{demand.setting}." if demand.setting else ""
    each = wanted / demand.workers
    choices = []
    if demand.workers > 1 and each and free >= each:
        choices.append(f"{section}{demand.unit}s={math.floor(free / each + EPSILON)}")
    if wanted and (share := math.floor(100 * free / demand.workers + EPSILON) / 100) > 0:
        choices.append(f"{section}{kind.setting}_per_{demand.unit}={share * kind.per_unit:.6g}")
    return f"set {' or '.join(choices)}, or {otherwise}" if choices else otherwise
