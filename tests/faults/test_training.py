"""What a training survives: a worker, the controller or a node killed, a damaged checkpoint, a full disk, MLflow away.

Real processes are killed while they train on real photographs. After each the training ends, and no more steps were
done twice than lie between two checkpoints; where the number of workers stayed, the weights are an unbroken run's.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.conftest import EVERY, LONG, STREAMED, run_of, weights
from tests.faults.nodes import Run, cluster, processes_below, start, workers_below
from tests.integration.conftest import environment
from tests.integration.test_job_submit import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def told(fault: str, reached: int, again: int, began: float) -> None:
    """The line for the README's table (`pytest -s`)."""
    print(f"{fault}: had reached step {reached}, went on from step {again} after {time.monotonic() - began:.0f} s")


def step_reached(run: Run) -> int:
    return max(int(step) for step in re.findall(r"distill +step (\d+)/", run.said))


def resumed_at(said: str, workers: int) -> list[int]:
    return [int(step) for step in re.findall(rf"going on from step (\d+) with {workers} workers", said)]


def test_killed_workers_and_a_damaged_checkpoint_change_no_weight(
    tmp_path: Path, prepared: Path, unbroken: Path
) -> None:
    """A worker is killed twice; before the second time the newest checkpoint is damaged: the one before it serves."""
    run = start(run_of(prepared, *STREAMED), tmp_path / "log")
    run.wait_for(r"distill +step [6-9]/")
    kill_a_worker(run, "worker killed", since=0)

    run.wait_for(r"distill +step 1[2-9]/")
    newest = sorted((prepared / "scratch" / "distill").glob("*/checkpoints/step-*/checkpoint.json"))[-1].parent
    state = newest / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 255
    state.write_bytes(content)
    kill_a_worker(run, "newest checkpoint damaged and worker killed", since=EVERY)
    assert run.finish() == 0, run.said
    assert re.search(r"the checkpoint of step \d+ is damaged", run.said)
    assert len(resumed_at(run.said, workers=2)) == 2
    assert weights(prepared) == weights(unbroken)


def kill_a_worker(run: Run, fault: str, *, since: int) -> None:
    """SIGKILL, and wait for the next start; at most a checkpoint's steps, and ``since`` more, are done again."""
    victims = workers_below(run.process.pid)
    assert len(victims) == 2
    starts, reached = len(resumed_at(run.said, workers=2)), step_reached(run)
    victims[-1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    run.wait_for(rf"(going on from step \d+ with 2 workers[\s\S]*){{{starts + 1}}}")
    again = resumed_at(run.said, workers=2)[-1]
    told(fault, reached, again, killed)
    assert reached - EVERY - since <= again


def test_a_dead_controller_gives_its_place_back(tmp_path: Path, prepared: Path) -> None:
    """Its workers had most of the machine: the next try can't begin beside what they held."""
    run = start(run_of(prepared, *LONG, "training.cpus_per_worker=0.8"), tmp_path / "log")
    run.wait_for(r"distill +step [6-9]/")
    (controller,) = processes_below(run.process.pid, "ray::TrainController")
    controller.send_signal(signal.SIGKILL)
    run.wait_for(r"distill +will be tried again.*[Aa]ctor")
    again = int(run.wait_for(r"going on from step (\d+) with 2 workers")[1])
    assert again >= EVERY
    assert run.finish() == 0, run.said


def test_a_lost_node_shrinks_the_group_and_its_return_grows_it(tmp_path: Path, prepared: Path) -> None:
    elastic = ("training.workers={min: 1, max: 2}", "training.cpus_per_worker=1", "training.resize_s=2")
    steps = ("training.distill.further_steps=70", "training.eval_every=70")
    # A node's process waits for the lost worker's replacement; the driver's variables don't reach it.
    with cluster(workers=2, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="5") as nodes:
        variables = nodes.variables | {"RAY_ADDRESS": nodes.address}
        run = start(run_of(prepared, *LONG, *elastic, *steps), tmp_path / "log", variables)
        run.wait_for(r"distill +step 1[2-9]/")
        assert sum(len(workers_below(node.pid)) for node in nodes.nodes) == 2
        victim = next(node for node in nodes.nodes[1:] if workers_below(node.pid))
        reached = step_reached(run)
        nodes.kill(victim)
        others = [node for node in nodes.nodes[1:] if node is not victim]
        nodes.kill(others[0])  # else its CPU would take the place at once
        killed = time.monotonic()
        again = int(run.wait_for(r"going on from step (\d+) with 1 workers")[1])
        told("node killed", reached, again, killed)
        assert reached - EVERY <= again
        run.wait_for(rf"with 1 workers[\s\S]*distill +step {again + 3}/")
        reached, returned = step_reached(run), time.monotonic()
        nodes.add(f"--address={nodes.address}")
        grown = int(run.wait_for(r"with 1 workers[\s\S]*going on from step (\d+) with 2 workers")[1])
        told("node returned", reached, grown, returned)
        assert run.finish() == 0, run.said


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 200 MiB at ``folder``."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path) -> None:
    with file.open("wb") as ballast:
        with suppress(OSError):
            while True:
                ballast.write(b"x" * (1 << 16))
                ballast.flush()


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """`mlflow server`, killed at the end."""
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *store]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment())
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}")
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_full_disk_and_mlflow_going_away_cost_no_step(tmp_path: Path, prepared: Path) -> None:
    """While the server is away for 30 s, the checkpoints' disk fills up; both come back while it trains."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root, which containers of CI have")
    port, scratch = free_port(), prepared / "scratch"
    uri, more = f"http://127.0.0.1:{port}", ("training.distill.further_steps=40",)
    with small_disk(scratch):
        with server(tmp_path, port):
            run = start(run_of(prepared, *LONG, *more), tmp_path / "log", {"MLFLOW_TRACKING_URI": uri})
            run.wait_for(r"distill +step [6-9]/")
        away = time.monotonic()
        fill(scratch / "ballast")
        run.wait_for(r"no checkpoint at step \d+: .*[Nn]o space left.*training goes on")
        (scratch / "ballast").unlink()
        time.sleep(max(0.0, 30 - (time.monotonic() - away)))
        with server(tmp_path, port):
            assert run.finish() == 0, run.said
            assert logged_steps(uri) == set(range(1, 41))
    assert not resumed_at(run.said, workers=2)
    assert weights(prepared)


def logged_steps(uri: str) -> set[int]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "alit"]
    (distill,) = client.search_runs([experiment.experiment_id], "tags.`alit.stage` = 'distill'")
    return {metric.step for metric in client.get_metric_history(distill.info.run_id, "train/loss")}


def wait_until_it_answers(uri: str) -> None:
    import urllib.request

    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(1)
