"""Stages that do next to nothing or fail as they are told to, and a driver for runs in a process of their own."""

import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel

from components.artifacts import Artifact, Figures, Job, WorkspaceError
from components.config import RaySettings
from components.store import join, read_bytes, write_bytes
from pipelines.dag import Demand, Pipeline, Stage
from pipelines.runner import RunOptions, run

RAY = RaySettings(num_cpus=2, object_store_mb=100)


class ToyConfig(BaseModel):
    text: str = "a"


class ToyResources(BaseModel):
    events: str = ""  # file that starts and ends are written to
    seconds: float = 0.0
    fail: str = ""
    once: bool = False  # fail the first time only
    listing: str = ""  # that it finds


def note(resources: ToyResources, what: str) -> None:
    if resources.events:
        with open(resources.events, "a") as file:
            file.write(json.dumps([what, time.time(), os.getpid()]) + "\n")


def events(path: Path) -> list[list]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(job: Job, *, config: ToyConfig, resources: ToyResources, **inputs: Artifact) -> Figures:
    """Writes its text and those of its inputs, and a line of scratch."""
    note(resources, f"start {job.stage}")
    os.makedirs(job.scratch, exist_ok=True)
    with open(join(job.scratch, "tries"), "a") as file:
        file.write("x")
    tries = os.path.getsize(join(job.scratch, "tries"))
    print(f"printed by {job.stage}")
    logging.getLogger("toy").info("logged by %s", job.stage)
    write_bytes(join(job.output, "half.txt"), b"half of it")
    job.progress(f"working on {config.text}")
    time.sleep(resources.seconds)
    if resources.fail and not (resources.once and tries > 1):
        fail(resources.fail)
    text = config.text + "".join(read_bytes(join(inputs[name].uri, "toy.txt")).decode() for name in sorted(inputs))
    write_bytes(join(job.output, "toy.txt"), text.encode())
    note(resources, f"end {job.stage}")
    seen = {"seen.listing": resources.listing} if resources.listing else {}
    return {"length": len(text), "tries": tries, "word": config.text, **seen}


def fail(how: str) -> None:
    if how == "value":
        raise ValueError("the toy is broken\nsecond line")
    if how == "connection":
        raise ConnectionResetError("https://me:secret@store went away")
    if how == "data":
        fail_in_ray_data()
    if how == "exit":
        os._exit(7)
    if how == "actor":
        fail_in_an_actor()
    if how == "disk":
        with open("/dev/full", "w") as file:
            file.write("x")
    raise AssertionError(how)


def fail_in_ray_data() -> None:
    import ray

    def bad(_: dict) -> dict:
        raise ValueError("a bad row")

    ray.data.range(4).map(bad).materialize()


def fail_in_an_actor() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Dying:
        def die(self) -> None:
            os._exit(7)

    ray.get(Dying.remote().die.remote())


def returns_none(job: Job, *, config: ToyConfig, resources: ToyResources) -> None:
    return None


def nested(job: Job, *, config: ToyConfig, resources: ToyResources) -> Figures:
    """Ray tasks inside a stage find this module too."""
    import ray

    def module_name(_: int) -> str:
        import toy_stages

        return toy_stages.__name__

    assert ray.get(ray.remote(module_name).options(num_cpus=0.5).remote(1)) == "toy_stages"
    return {}


def stage(name: str, *, needs: tuple[str, ...] = (), text: str = "a", run: str = "work", **resources: object) -> Stage:
    return Stage(
        name,
        run=f"toy_stages:{run}",
        produces="ImageSet",
        config=ToyConfig(text=text),
        resources=ToyResources(**resources),
        needs={f"from_{need}": need for need in needs},
        demand=Demand(),
        headline=("length",),
    )


def chain(**of: dict) -> Pipeline:
    """first -> second -> third, and `aside`, which nobody reads; ``of`` holds each stage's resources."""
    return Pipeline(
        "toy",
        (
            stage("first", text="1", **of.get("first", {})),
            stage("second", text="2", needs=("first",), **of.get("second", {})),
            stage("third", text="3", needs=("second",), **of.get("third", {})),
            stage("aside", text="4", **of.get("aside", {})),
        ),
    )


def main() -> None:
    """``python -c "import toy_stages; toy_stages.main()" WORKSPACE RESOURCES_OF_STAGES``; the record on stdout."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="[%(asctime)s] %(message)s")
    options = RunOptions(ray=RAY, backoff_s=0.1)
    try:
        record = run(chain(**json.loads(sys.argv[2])), workspace=sys.argv[1], options=options)
    except WorkspaceError as error:
        logging.error("%s: %s", type(error).__name__, error)
        sys.exit(1)
    print(json.dumps(asdict(record)))
    sys.exit(record.exit_code)
