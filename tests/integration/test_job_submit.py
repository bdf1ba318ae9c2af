"""The same run through Ray's job API, against a head node with its dashboard."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from pipelines.config import READY
from tests.integration.conftest import ALIT, ROOT, SMALL, environment, settings

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))
STARTED_S = 90


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str  # of the dashboard
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` in a process of its own, with a token of its own, stopped by ending that process."""
    home = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets below it have at most 107 characters
    variables = environment() | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    variables["RAY_JOB_STOP_WAIT_TIME_S"] = "60"  # a stopped job would be killed after 3 s, on a busy machine too soon
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    subprocess.run([RAY, "get-auth-token", "--generate"], env=variables, check=True, capture_output=True)
    dashboard = free_port()
    # The job agent's port too: where another Ray on this machine has the usual one, jobs would never be taken.
    ports = [f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    arguments = ["--head", "--block", *ports, "--num-cpus=2"]
    limits = ["--object-store-memory=200000000", f"--temp-dir={home}/r", "--disable-usage-stats"]
    node = subprocess.Popen([RAY, "start", *arguments, *limits], env=variables, stdout=subprocess.DEVNULL)
    try:
        running = Head(f"http://127.0.0.1:{dashboard}", variables)
        wait_until_ready(running, node)
        yield running
    finally:
        node.terminate()
        node.wait(timeout=60)
        shutil.rmtree(home, ignore_errors=True)


def wait_until_ready(head: Head, node: subprocess.Popen[bytes]) -> None:
    """Until the head takes jobs: its job agent starts after its dashboard."""
    deadline = time.monotonic() + STARTED_S
    while submit(head, [sys.executable, "-c", "pass"]).returncode != 0:
        assert node.poll() is None, "ray start ended"
        assert time.monotonic() < deadline, "no job was taken"
        time.sleep(2)


def submit(head: Head, command: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [RAY, "job", "submit", "--address", head.address, "--working-dir", str(ROOT), *options, "--", *command]
    return subprocess.run(arguments, env=head.environment, capture_output=True, text=True, timeout=600, check=False)


def alit_submit(head: Head, *arguments: str, config: str = "demo", **variables: str) -> subprocess.Popen[str]:
    """`alit submit`, from a folder that holds no code: it is sent from the repository."""
    command = [*ALIT, "submit", config, "--address", head.address, "--working-dir", str(ROOT), *arguments]
    environment = head.environment | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=head.environment["HOME"],
        # A shell has SIGINT ignored by what it runs in the background.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and everything said."""
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(pattern, line):
            return found
    raise AssertionError(said)


def ray_job(head: Head, command: str, submission_id: str) -> str:
    """What `ray job` says."""
    arguments = [RAY, "job", command, "--address", head.address, submission_id]
    done = subprocess.run(arguments, env=head.environment, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


def test_a_submitted_run(head: Head, tmp_path: Path) -> None:
    """The config lies elsewhere; the tracking URI goes along by itself, another variable by name, unseen."""
    config = tmp_path / "my own.yaml"
    shutil.copy(READY / "demo.yaml", config)
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/record.db", "ALIT_TEST_SECRET": "unspeakable"}
    given = settings(f"workspace={tmp_path}/w", *SMALL, "training.cpus_per_worker=0.25")
    given += ["--until", "publish", "--env", "ALIT_TEST_SECRET"]
    process = alit_submit(head, *given, config=str(config), **variables)
    code, said = ended(process)
    assert code == 0, said
    assert "with MLFLOW_TRACKING_URI, ALIT_TEST_SECRET" in said and "unspeakable" not in said and "record.db" in said
    assert "distill      step 4/4" in said and "train done" in said and "succeeded" in said
    for stage in ("ingest", "distill", "pack.reconstruction", "publish"):
        assert len(list((tmp_path / "w" / stage).glob("*/artifact.json"))) == 1
    assert list((tmp_path / "w" / "logs").glob("*/distill.log"))
    assert (tmp_path / "record.db").is_file() and not (tmp_path / "w" / "mlflow.db").exists()


def test_exit_codes_are_the_job_s(head: Head, tmp_path: Path) -> None:
    too_much = settings(f"workspace={tmp_path}/w", *SMALL, "training.cpus_per_worker=50")
    code, said = ended(alit_submit(head, *too_much))
    assert code == 1 and "the cluster has 2" in said and "failed with exit code 1" in said, said
    nowhere = settings(f"workspace={tmp_path}/w", "data.source=/nowhere")
    code, said = ended(alit_submit(head, *nowhere))
    assert code == 2 and "there is no such folder" in said and "failed with exit code 2" in said, said


def test_a_job_that_is_not_waited_for(head: Head, tmp_path: Path) -> None:
    code, said = ended(alit_submit(head, *settings(f"workspace={tmp_path}/w", "data.source=/nowhere"), "--no-wait"))
    assert code == 0
    found = re.search(r"follow  ray job logs --address (\S+) --follow (\S+)\nstop    ray job stop", said)
    assert found and found[1] == head.address
    deadline = time.monotonic() + STARTED_S
    while "failed" not in ray_job(head, "status", found[2]):
        assert time.monotonic() < deadline
        time.sleep(1)


def test_ctrl_c_leaves_the_job_alone_and_a_stop_is_told(head: Head, tmp_path: Path) -> None:
    """Two at once: who follows the first goes away; the second is stopped while it is followed."""
    processes = [
        alit_submit(head, *settings(f"workspace={tmp_path}/{name}", *SMALL, "training.cpus_per_worker=0.25"))
        for name in ("left", "stopped")
    ]
    left, stopped = [read_until(process, r"^job (\S+)")[1] for process in processes]
    for process in processes:
        read_until(process, "ingest +starts")
    processes[0].send_signal(signal.SIGINT)
    code, said = ended(processes[0])
    assert code == 130 and f"stop    ray job stop --address {head.address} {left}" in said, said
    assert "RUNNING" in ray_job(head, "status", left)
    ray_job(head, "stop", stopped)
    code, said = ended(processes[1])
    assert code == 143 and f"job {stopped} was stopped" in said, said
    ray_job(head, "stop", left)


def test_a_token_is_asked_for(head: Head, tmp_path: Path) -> None:
    given = settings(f"workspace={tmp_path}/w")
    for variables in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "another"}):
        code, said = ended(alit_submit(head, *given, **variables))
        assert code == 1 and f"error: {head.address} wants its own token: set RAY_AUTH_MODE=token" in said, said


def test_a_submitted_run_that_fails(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "run", "demo"]
    done = submit(head, [*command, *settings(f"workspace={tmp_path}/w", *SMALL, "data.image_size=66")])
    assert done.returncode == 1
    assert "data.image_size = (66, 66)" in done.stdout + done.stderr


def test_a_stopped_job_ends_cleanly(head: Head, tmp_path: Path) -> None:
    import mlflow

    workspace = tmp_path / "w"
    long = ("training.distill.further_steps=400", "training.cpus_per_worker=0.25")
    command = [sys.executable, "-m", "pipelines", "run", "demo", *settings(f"workspace={workspace}", *SMALL, *long)]
    assert submit(head, command, "--no-wait", "--submission-id", "to-stop").returncode == 0
    deadline = time.monotonic() + 300
    while not list(workspace.glob("scratch/distill/**/step-*")):
        assert time.monotonic() < deadline, "distill made no checkpoint"
        time.sleep(1)
    stop = [RAY, "job", "stop", "--address", head.address, "to-stop"]
    assert subprocess.run(stop, env=head.environment, capture_output=True, timeout=120, check=False).returncode == 0
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workspace}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name == "alit"])
    states = {run.data.tags.get("alit.stage", "parent"): run.info.status for run in runs}
    assert states["parent"] == states["distill"] == "KILLED"
    assert not (workspace / ".lock").exists()
