"""Real runs, real Ray nodes, and ways to hurt them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.integration.conftest import ALIT, ROOT, environment
from tests.integration.test_job_submit import free_port

RAY = str(Path(sys.executable).with_name("ray"))
WAIT_S = 400.0
HEALTH = {  # a dead node is noticed in about 5 s instead of 30
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
# Ends when so many nodes are alive. `ray status` hears of them from the autoscaler, which looks every 5 s only.
ALIVE = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo

client = GcsClient(address=sys.argv[1])
while sum(node.state == GcsNodeInfo.ALIVE for node in client.get_all_node_info().values()) < int(sys.argv[2]):
    time.sleep(0.2)
"""
# Lines that a node's processes write needn't reach a driver: runs read their own logs.
QUIET = ("--include-log-monitor=false", "--disable-usage-stats")


@dataclass
class Run:
    """`alit run` in a process of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, pattern: str, timeout_s: float = WAIT_S) -> re.Match[str]:
        """Until a progress line matches."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.said)):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)
        return found

    @property
    def said(self) -> str:
        return self.log.read_text()

    def finish(self, timeout_s: float = 600) -> int:
        return self.process.wait(timeout=timeout_s)


def start(arguments: list[str], log: Path, variables: dict[str, str] | None = None, *, own_group: bool = False) -> Run:
    """``own_group``: a process group of its own, for signals as a terminal sends them."""
    environ = environment() | (variables or {})
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*ALIT, "run", *arguments],
            stdout=sink,
            stderr=sink,
            cwd=ROOT,
            env=environ,
            process_group=0 if own_group else None,
        )
    return Run(process, log)


def workers_below(pid: int) -> list[psutil.Process]:
    """Training workers among the descendants of a process."""
    return processes_below(pid, "ray::RayTrainWorker")


def processes_below(pid: int, title: str) -> list[psutil.Process]:
    """Descendants of a process whose title begins so."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline() and process.cmdline()[0].startswith(title):
                found.append(process)
    return found


@dataclass
class Cluster:
    """A head and further nodes on this machine, each `ray start` in a process of its own."""

    home: Path
    address: str
    variables: dict[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add(self, *options: str) -> subprocess.Popen[bytes]:
        arguments = [*options, "--block", "--num-cpus=1", "--object-store-memory=100000000", *QUIET]
        node = subprocess.Popen(
            [RAY, "start", *arguments], env=self.variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.nodes.append(node)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """The whole node at once, as when its machine goes away."""
        family = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        node.wait()


@contextmanager
def cluster(workers: int, **variables_of_nodes: str) -> Iterator[Cluster]:
    """A head with one CPU and ``workers`` nodes with one each."""
    home = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets below it have at most 107 characters
    variables = environment() | HEALTH | variables_of_nodes
    variables |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    variables["PYTHONPATH"] = str(ROOT)
    subprocess.run([RAY, "get-auth-token", "--generate"], env=variables, check=True, capture_output=True)
    port = free_port()
    made = Cluster(home, f"127.0.0.1:{port}", variables)
    try:
        made.add("--head", f"--port={port}", f"--temp-dir={home}/r", "--include-dashboard=false")
        wait_for_nodes(1, made.address, variables)
        for number in range(workers):  # one by one: of two that start at once on one machine one may not join
            made.add(f"--address={made.address}")
            wait_for_nodes(number + 2, made.address, variables)
        yield made
    finally:
        for node in reversed(made.nodes):
            node.terminate()
        for node in made.nodes:
            node.wait(timeout=60)
        shutil.rmtree(home, ignore_errors=True)


def wait_for_nodes(number: int, address: str, variables: dict[str, str], *before: str) -> None:
    """Until so many are alive in the cluster at ``address``; ``before``: a command that runs what follows it."""
    command = [*before, sys.executable, "-c", ALIVE, address, str(number)]
    deadline = time.monotonic() + 300
    while (left := deadline - time.monotonic()) > 0:  # it fails where no head answers yet
        with suppress(subprocess.TimeoutExpired):
            asked = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=left, check=False)
            if asked.returncode == 0:
                return
    raise AssertionError(f"no {number} nodes at {address}")
