"""What a training survives: its worker, a node with one, a damaged checkpoint, a full disk, MLflow going away.

Real processes are killed while they train on real photographs. After each the training ends, and no more steps were
done twice than lie between two checkpoints; where the number of workers stayed, the weights are an unbroken run's.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.nodes import Run, cluster, start, workers_below
from tests.integration.conftest import SMALL, environment, settings
from tests.integration.test_job_submit import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

EVERY = 5  # steps between checkpoints
STEPS = 24
LONG = (
    *SMALL,
    f"training.distill.further_steps={STEPS}",
    f"training.checkpoint_every={EVERY}",
    "training.eval_every=12",
)
STREAMED = (*LONG, "training.cache_mb=0")


def run_of(path: Path, *values: str, until: str = "distill") -> list[str]:
    return ["demo", *settings(f"workspace={path}", *values), "--until", until]


def told(fault: str, reached: int, again: int, began: float) -> None:
    """The line for the README's table (`pytest -s`)."""
    print(f"{fault}: had reached step {reached}, went on from step {again} after {time.monotonic() - began:.0f} s")


def weights(workspace: Path) -> bytes:
    (found,) = (workspace / "distill").glob("*/weights.safetensors")
    return found.read_bytes()


def step_reached(run: Run) -> int:
    return max(int(step) for step in re.findall(r"distill +step (\d+)/", run.said))


def resumed_at(said: str, workers: int) -> list[int]:
    return [int(step) for step in re.findall(rf"going on from step (\d+) with {workers} workers", said)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images streamed, nothing killed."""
    path = tmp_path_factory.mktemp("unbroken")
    run = start(run_of(path / "w", *STREAMED), path / "log")
    assert run.finish() == 0, run.said
    return path / "w"


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(tmp_path: Path, unbroken: Path) -> None:
    run = start(run_of(tmp_path / "w", *STREAMED), tmp_path / "log")
    run.wait_for(r"distill +step 1[2-9]/")
    victims = workers_below(run.process.pid)
    assert len(victims) == 2
    reached = step_reached(run)
    victims[-1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    again = int(run.wait_for(r"going on from step (\d+) with 2 workers")[1])
    told("worker killed", reached, again, killed)
    assert reached - EVERY <= again
    assert run.finish() == 0, run.said
    assert len(resumed_at(run.said, workers=2)) == 1
    assert weights(tmp_path / "w") == weights(unbroken)


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_used(tmp_path: Path, unbroken: Path) -> None:
    first = start(run_of(tmp_path / "w", *STREAMED), tmp_path / "first")
    first.wait_for(r"distill +step 1[2-9]/")
    first.process.send_signal(signal.SIGKILL)
    first.finish()
    newest = sorted((tmp_path / "w" / "scratch" / "distill").glob("*/checkpoints/step-*/checkpoint.json"))[-1].parent
    state = newest / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 255
    state.write_bytes(content)
    damaged = int(newest.name.removeprefix("step-"))

    second = start(run_of(tmp_path / "w", *STREAMED), tmp_path / "second")
    assert second.finish() == 0, second.said
    assert f"the checkpoint of step {damaged} is damaged" in second.said
    assert resumed_at(second.said, workers=2) == [damaged - EVERY]
    assert weights(tmp_path / "w") == weights(unbroken)


def test_a_lost_node_shrinks_the_group_and_its_return_grows_it(tmp_path: Path) -> None:
    elastic = ("training.workers={min: 1, max: 2}", "training.cpus_per_worker=1", "training.resize_s=2")
    steps = ("training.distill.further_steps=60", "training.distill.batch_size=8")
    with cluster(workers=2) as nodes:
        variables = nodes.variables | {"RAY_ADDRESS": nodes.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30"}
        run = start(run_of(tmp_path / "w", *LONG, *elastic, *steps), tmp_path / "log", variables)
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


def test_a_full_checkpoint_disk_costs_checkpoints_and_not_the_training(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root, which containers of CI have")
    disk = tmp_path / "w" / "scratch"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(disk)], check=True)
    try:
        run = start(run_of(tmp_path / "w", *LONG), tmp_path / "log")
        run.wait_for(r"distill +step [5-9]/")
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            while True:
                try:
                    file.write(b"x" * (1 << 20))
                    file.flush()
                except OSError:
                    break
        run.wait_for(r"no checkpoint at step \d+: .*[Nn]o space left.*training goes on")
        ballast.unlink()
        assert run.finish() == 0, run.said
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert weights(tmp_path / "w")


def test_an_mlflow_server_that_goes_away_is_caught_up_with(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"

    def serve() -> subprocess.Popen[bytes]:
        store = [
            "--backend-store-uri",
            f"sqlite:///{tmp_path}/mlflow.db",
            "--artifacts-destination",
            f"{tmp_path}/files",
        ]
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *store]
        with (tmp_path / "server.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment())

    def stop(server: subprocess.Popen[bytes]) -> None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    server = serve()
    try:
        wait_until_it_answers(uri)
        run = start(run_of(tmp_path / "w", *LONG), tmp_path / "log", {"MLFLOW_TRACKING_URI": uri})
        run.wait_for(r"distill +step [6-9]/")
        stop(server)
        time.sleep(30)
        server = serve()
        assert run.finish() == 0, run.said
        wait_until_it_answers(uri)
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=uri)
        (experiment,) = [found for found in client.search_experiments() if found.name == "alit"]
        (distill,) = client.search_runs([experiment.experiment_id], "tags.`alit.stage` = 'distill'")
        logged = {metric.step for metric in client.get_metric_history(distill.info.run_id, "train/loss")}
        assert logged == set(range(1, STEPS + 1))
    finally:
        stop(server)


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
