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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.integration.conftest import ALIT, ROOT, environment
from tests.integration.test_job_submit import free_port

RAY = str(Path(sys.executable).with_name("ray"))
WAIT_S = 400.0


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


def start(arguments: list[str], log: Path, variables: dict[str, str] | None = None) -> Run:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*ALIT, "run", *arguments], stdout=sink, stderr=sink, cwd=ROOT, env=environment() | (variables or {})
        )
    return Run(process, log)


def workers_below(pid: int) -> list[psutil.Process]:
    """Training workers among the descendants of a process."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::RayTrainWorker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@dataclass
class Cluster:
    """A head and further nodes on this machine, each `ray start` in a process of its own."""

    home: Path
    address: str
    variables: dict[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add(self, *options: str) -> subprocess.Popen[bytes]:
        arguments = [*options, "--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
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
def cluster(workers: int) -> Iterator[Cluster]:
    """A head with one CPU and ``workers`` nodes with one each."""
    home = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets below it have at most 107 characters
    variables = environment() | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    variables["PYTHONPATH"] = str(ROOT)
    subprocess.run([RAY, "get-auth-token", "--generate"], env=variables, check=True, capture_output=True)
    port = free_port()
    made = Cluster(home, f"127.0.0.1:{port}", variables)
    try:
        made.add("--head", f"--port={port}", f"--temp-dir={home}/r", "--include-dashboard=false")
        _wait_for_nodes(made, 1)
        for number in range(workers):  # one by one: of two that start at once on one machine one may not join
            made.add(f"--address={made.address}")
            _wait_for_nodes(made, number + 2)
        yield made
    finally:
        for node in reversed(made.nodes):
            node.terminate()
        for node in made.nodes:
            node.wait(timeout=60)
        shutil.rmtree(home, ignore_errors=True)


def nodes_in(status: str) -> int:
    """How many are alive in what `ray status` says."""
    return len(re.findall(r"^ 1 node_", status, re.MULTILINE))


def _wait_for_nodes(made: Cluster, number: int) -> None:
    deadline = time.monotonic() + 180
    command = [RAY, "status", f"--address={made.address}"]
    while True:
        status = subprocess.run(command, env=made.variables, capture_output=True, text=True, check=False)
        if nodes_in(status.stdout) >= number:
            return
        assert time.monotonic() < deadline, status.stdout + status.stderr
        time.sleep(1)
