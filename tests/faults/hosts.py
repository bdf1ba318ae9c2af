"""Several hosts on this machine: network namespaces on a bridge, each with a /tmp and a home that no other one sees.

Beside them, on the bridge: a real S3 API and an MLflow server, as a team has them. Needs root and iproute2.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from moto.server import ThreadedMotoServer

from tests.faults.nodes import HEALTH, QUIET, RAY, Run, wait_for_nodes
from tests.integration.conftest import ALIT, ROOT, Result, environment
from tests.s3_server import KEYS, reset

PORT, MLFLOW_PORT = 6379, 5599
# In a mount namespace of its own; a checkout that lies in /tmp stays where it is.
PRIVATE = (
    f'mount --bind "{ROOT}" /mnt && mount -t tmpfs tmpfs /tmp && mkdir -p "$HOME" "{ROOT}" && '
    f'mount --move /mnt "{ROOT}" && cd "{ROOT}" && exec "$@"'
)


@dataclass(frozen=True)
class Network:
    """A bridge and a network namespace per host; names and addresses bear the network's number, 0 to 255."""

    number: int

    @property
    def bridge(self) -> str:
        return f"alitbr{self.number}"

    @property
    def outside(self) -> str:
        """The bridge's address: where S3 and MLflow are."""
        return f"10.78.{self.number}.254"

    def namespace(self, host: int) -> str:
        return f"alit{self.number}h{host}"

    def address(self, host: int) -> str:
        return f"10.78.{self.number}.{host + 1}"

    def inside(self, host: int, command: list[str]) -> list[str]:
        """``command`` in the network of a host."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def processes(self, host: int) -> list[psutil.Process]:
        """What runs in the network of a host."""
        command = ["ip", "netns", "pids", self.namespace(host)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        found = []
        for pid in listed.stdout.split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found


@dataclass
class Hosts:
    """A head and workers, with one CPU each."""

    network: Network
    folder: Path
    variables: dict[str, str]
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        """Of the S3 API."""
        return self.variables["AWS_ENDPOINT_URL"]

    def start(self, number: int) -> None:
        """Ray on host ``number``; 0 is the head."""
        place = [f"--address={self.network.address(0)}:{PORT}"]
        if number == 0:
            place = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        options = ["--block", "--num-cpus=1", "--object-store-memory=100000000", *QUIET]
        command = [RAY, "start", *place, f"--node-ip-address={self.network.address(number)}", *options]
        # A user namespace isn't needed, we are root; a mount namespace hides what other hosts write.
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", PRIVATE, "sh", *command]
        with (self.folder / f"host{number}.log").open("ab") as log:
            self.nodes[number] = subprocess.Popen(
                self.network.inside(number, inside), stdout=log, stderr=log, env=self.variables, start_new_session=True
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
        raylet = next(p for p in self.network.processes(0) if p.name() == "raylet")
        return ["nsenter", f"--target={raylet.pid}", "--net", "--mount", f"--wd={ROOT}", *command]

    def wait_for_nodes(self, number: int) -> None:
        """Until so many are alive."""
        try:
            wait_for_nodes(number, f"{self.network.address(0)}:{PORT}", self.variables, *self.network.inside(0, []))
        except AssertionError as error:
            logs = "".join(log.read_text() for log in sorted(self.folder.glob("host*.log")))
            raise AssertionError(logs) from error

    def working(self, number: int, name: str) -> bool:
        """Whether a Ray process of a host calls itself ``name``."""
        for process in self.network.processes(number):
            try:
                if process.cmdline() and process.cmdline()[0].startswith(name):
                    return True
            except psutil.Error:
                continue
        return False

    def kill(self, number: int) -> None:
        """Every process of a host at once, as when its power goes."""
        for process in self.network.processes(number):
            process.send_signal(signal.SIGKILL)
        self.nodes.pop(number).wait()


@contextmanager
def hosts(workers: int, folder: Path) -> Iterator[Hosts]:
    """A head and ``workers`` more, an S3 API and an MLflow server; all gone at the end."""
    with ExitStack() as stack:
        network = stack.enter_context(_network(workers + 1))
        server = ThreadedMotoServer(ip_address=network.outside, port=0, verbose=False)
        server.start()
        stack.callback(server.stop)
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        reset(endpoint)
        made = Hosts(network, folder, _variables(network, folder, endpoint))
        stack.enter_context(_mlflow(folder, network.outside))
        stack.callback(_stop, made)
        for number in range(workers + 1):
            made.start(number)
            made.wait_for_nodes(number + 1)
        yield made


def _variables(network: Network, folder: Path, endpoint: str) -> dict[str, str]:
    mine = environment() | KEYS | HEALTH
    return mine | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "HOME": "/tmp/home",  # each host's own
        "MLFLOW_TRACKING_URI": f"http://{network.outside}:{MLFLOW_PORT}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{mine['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": f"{network.address(0)}:{PORT}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TP_SOCKET_IFNAME": "eth0",
    }


@contextmanager
def _network(size: int) -> Iterator[Network]:
    network = _bridged()
    try:
        _ip("addr", "add", f"{network.outside}/24", "dev", network.bridge)
        _ip("link", "set", network.bridge, "up")
        for host in range(size):
            name, link = network.namespace(host), f"v{network.namespace(host)}"
            _ip("netns", "add", name)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", link, "master", network.bridge, "up")
            _ip("-n", name, "addr", "add", f"{network.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "route", "add", "default", "via", network.outside)  # Ray asks for its own address this way
        yield network
    finally:
        for host in range(size):
            subprocess.run(["ip", "netns", "del", network.namespace(host)], capture_output=True, check=False)
        _ip("link", "del", network.bridge)


def _bridged() -> Network:
    """The first number that is free gets its bridge; others may belong to a run beside this one, or to a killed one."""
    for number in range(256):
        network = Network(number)
        made = subprocess.run(
            ["ip", "link", "add", network.bridge, "type", "bridge"], capture_output=True, text=True, check=False
        )
        if made.returncode == 0:
            return network
        if "File exists" not in made.stderr:
            break
    raise OSError(f"no bridge for three hosts: {made.stderr.strip()}")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def _mlflow(folder: Path, host: str) -> Iterator[None]:
    store = [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/files"]
    where = ["--host", host, "--port", str(MLFLOW_PORT)]
    command = [sys.executable, "-m", "mlflow", "server", *where, "--workers=1", *store]
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
