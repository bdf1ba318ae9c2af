"""Several hosts on this machine: network namespaces on a bridge, each with a /tmp and a home that no other one sees.

Beside them, on the bridge: a real S3 API and an MLflow server, as a team has them. Needs root and iproute2.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from moto.server import ThreadedMotoServer

from tests.faults.nodes import RAY, Run
from tests.integration.conftest import ALIT, ROOT, Result, environment
from tests.s3_server import KEYS, reset

NETWORK, PORT = "10.78.0", 6379
OUTSIDE = f"{NETWORK}.254"  # the bridge: where S3 and MLflow are
BRIDGE, PREFIX = "alitbr", "alith"
HEALTH = {  # a dead host is noticed in about 5 s instead of 30
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
# In a mount namespace of its own; a checkout that lies in /tmp stays where it is.
PRIVATE = (
    f'mount --bind "{ROOT}" /mnt && mount -t tmpfs tmpfs /tmp && mkdir -p "$HOME" "{ROOT}" && '
    f'mount --move /mnt "{ROOT}" && cd "{ROOT}" && exec "$@"'
)


@dataclass
class Hosts:
    """A head and workers, with one CPU each."""

    folder: Path
    variables: dict[str, str]
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        """Of the S3 API."""
        return self.variables["AWS_ENDPOINT_URL"]

    def start(self, number: int) -> None:
        """Ray on host ``number``; 0 is the head."""
        place = [f"--address={address(0)}:{PORT}"]
        if number == 0:
            place = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        options = ["--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        command = [RAY, "start", *place, f"--node-ip-address={address(number)}", *options]
        # A user namespace isn't needed, we are root; a mount namespace hides what other hosts write.
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", PRIVATE, "sh", *command]
        with (self.folder / f"host{number}.log").open("ab") as log:
            self.nodes[number] = subprocess.Popen(
                in_network(number, inside), stdout=log, stderr=log, env=self.variables, start_new_session=True
            )

    def run(self, arguments: list[str], log: Path) -> Run:
        """`alit run` on the head's host."""
        with log.open("wb") as sink:
            process = subprocess.Popen(
                self._entered([*ALIT, "run", *arguments]), stdout=sink, stderr=sink, cwd=ROOT, env=self.variables
            )
        return Run(process, log)

    def alit(self, *arguments: str, timeout_s: float = 300) -> Result:
        """Any command on the head's host."""
        done = subprocess.run(
            self._entered([*ALIT, *arguments]),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=ROOT,
            env=self.variables,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def _entered(self, command: list[str]) -> list[str]:
        """``command`` where the head is: in its network, and with its /tmp."""
        raylet = next(p for p in processes_of(0) if p.name() == "raylet")
        return ["nsenter", f"--target={raylet.pid}", "--net", "--mount", f"--wd={ROOT}", *command]

    def wait_for_nodes(self, number: int) -> None:
        """Until so many are alive."""
        deadline = time.monotonic() + 300
        while True:
            status = subprocess.run(
                in_network(0, [RAY, "status", f"--address={address(0)}:{PORT}"]),
                env=self.variables,
                capture_output=True,
                text=True,
                check=False,
            )
            if len(re.findall(r"^ 1 node_", status.stdout, re.MULTILINE)) >= number:
                return
            if time.monotonic() > deadline:
                logs = "".join(log.read_text() for log in sorted(self.folder.glob("host*.log")))
                raise AssertionError(status.stdout + status.stderr + logs)
            time.sleep(1)

    def kill(self, number: int) -> None:
        """Every process of a host at once, as when its power goes."""
        for process in processes_of(number):
            process.send_signal(signal.SIGKILL)
        self.nodes.pop(number).wait()


def address(number: int) -> str:
    return f"{NETWORK}.{number + 1}"


def in_network(number: int, command: list[str]) -> list[str]:
    return ["ip", "netns", "exec", f"{PREFIX}{number}", *command]


def processes_of(number: int) -> list[psutil.Process]:
    """What runs in the network of a host."""
    listed = subprocess.run(["ip", "netns", "pids", f"{PREFIX}{number}"], capture_output=True, text=True, check=False)
    found = []
    for pid in listed.stdout.split():
        try:
            found.append(psutil.Process(int(pid)))
        except psutil.NoSuchProcess:
            continue
    return found


def working(number: int, name: str) -> bool:
    """Whether a Ray process of a host calls itself ``name``."""
    for process in processes_of(number):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(name):
                return True
        except psutil.Error:
            continue
    return False


@contextmanager
def hosts(workers: int, folder: Path) -> Iterator[Hosts]:
    """A head and ``workers`` more, an S3 API and an MLflow server; all gone at the end."""
    with ExitStack() as stack:
        stack.enter_context(_network(workers + 1))
        server = ThreadedMotoServer(ip_address=OUTSIDE, port=0, verbose=False)
        server.start()
        stack.callback(server.stop)
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        reset(endpoint)
        made = Hosts(folder, _variables(folder, endpoint))
        stack.enter_context(_mlflow(folder, made.variables["MLFLOW_TRACKING_URI"]))
        stack.callback(_stop, made)
        for number in range(workers + 1):
            made.start(number)
            made.wait_for_nodes(number + 1)
        yield made


def _variables(folder: Path, endpoint: str) -> dict[str, str]:
    mine = environment() | KEYS | HEALTH
    return mine | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "HOME": "/tmp/home",  # each host's own
        "MLFLOW_TRACKING_URI": f"http://{OUTSIDE}:5599",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{mine['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": f"{address(0)}:{PORT}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TP_SOCKET_IFNAME": "eth0",
    }


@contextmanager
def _network(number: int) -> Iterator[None]:
    _ip("link", "add", BRIDGE, "type", "bridge")
    try:
        _ip("addr", "add", f"{OUTSIDE}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for host in range(number):
            name = f"{PREFIX}{host}"
            _ip("netns", "add", name)
            _ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"v{name}", "master", BRIDGE, "up")
            _ip("-n", name, "addr", "add", f"{address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "route", "add", "default", "via", OUTSIDE)  # Ray asks for its own address this way
        yield
    finally:
        for host in range(number):
            subprocess.run(["ip", "netns", "del", f"{PREFIX}{host}"], capture_output=True, check=False)
        _ip("link", "del", BRIDGE)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def _mlflow(folder: Path, uri: str) -> Iterator[None]:
    host, port = uri.removeprefix("http://").split(":")
    store = [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/files"]
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", port, "--workers=1", *store]
    allowed = {"MLFLOW_SERVER_ALLOWED_HOSTS": f"{host}:*"}
    with (folder / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment() | allowed)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stop(made: Hosts) -> None:
    for number in list(made.nodes):
        made.kill(number)
    shutil.rmtree(made.folder / "files", ignore_errors=True)


def names_in(client: Any, bucket: str, prefix: str = "") -> list[str]:
    """Every key below ``prefix``."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]
