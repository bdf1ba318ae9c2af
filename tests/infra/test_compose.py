"""Compose and images: what one part calls another by exists, and so does every file it names."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.infra.files import AWS, COMPOSE, INFRA, RAY_OBJECTS, ROOT, pod_specs

HERE = INFRA / "compose"
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile.*"))
LOCAL = {"localhost", "127.0.0.1"}
HOST = re.compile(r"(?:https?|postgresql)://(?:[^@/\s]*@)?([\w.-]+)|--address=([\w.-]+):|\b([a-z][\w.-]*):5000")


def hosts(node: Any) -> set[str]:
    """Every host that a URL or an address names, anywhere in ``node``."""
    if isinstance(node, dict):
        return {host for value in node.values() for host in hosts(value)}
    if isinstance(node, list):
        return {host for item in node for host in hosts(item)}
    text = re.sub(r"\$\{[^}]*\}", "x", str(node))
    return {next(filter(None, match)) for match in HOST.findall(text)}


def test_hosts_are_services() -> None:
    settings = [yaml.safe_load(file.read_text()) for file in HERE.rglob("*.yaml")]
    found = hosts(settings) - LOCAL
    assert {"mlflow", "postgres", "s3", "ray-head", "prometheus", "grafana"} <= found
    assert found <= SERVICES.keys()


def test_mlflow_answers_to_the_name_it_is_called_by() -> None:
    (name,) = hosts(SERVICES["ray-head"]["environment"]["MLFLOW_TRACKING_URI"])
    allowed = SERVICES["mlflow"]["command"].split("--allowed-hosts ")[1].split()[0].split(",")
    assert f"{name}:5000" in allowed
    assert SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql://mlflow:")
    bucket = re.search(r"--artifacts-destination s3://(\w+)", SERVICES["mlflow"]["command"])
    assert bucket and bucket[1] in SERVICES["buckets"]["command"]


def test_dependencies_stand_and_can_be_waited_for() -> None:
    for name, service in SERVICES.items():
        for other, condition in service.get("depends_on", {}).items():
            assert other in SERVICES, name
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], other


def test_volumes_and_files_are_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (HERE / source).exists() if source.startswith("./") else source in COMPOSE["volumes"], volume
        if "build" in service:
            context = (HERE / service["build"]["context"]).resolve()
            assert context == ROOT and (context / service["build"]["dockerfile"]).is_file()


def test_ports_are_open_on_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_every_variable_is_in_the_example() -> None:
    asked = set(re.findall(r"\$\{([A-Z0-9_]+)", (HERE / "compose.yaml").read_text()))
    assert asked == set(re.findall(r"^([A-Z0-9_]+)=", (HERE / ".env.example").read_text(), re.MULTILINE))


def test_two_workers_and_a_head_share_a_token() -> None:
    assert SERVICES["ray-worker"]["deploy"]["replicas"] == 2
    for name in ("ray-head", "ray-worker", "job"):
        environment = SERVICES[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" in environment


def images() -> set[str]:
    """Every image that a manifest names."""
    found = {service["image"] for service in SERVICES.values()}
    found |= {
        one["image"] for document in RAY_OBJECTS.values() for pod in pod_specs(document) for one in pod["containers"]
    }
    groups = AWS["available_node_types"].values()
    return found | {AWS["docker"]["image"]} | {group["docker"]["worker_image"] for group in groups if "docker" in group}


def test_images_are_pinned_and_ours_have_a_dockerfile() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ours = {"alit": {f"{version}-cpu", f"{version}-cuda"}, "alit-mlflow": {version}}
    readme = (INFRA / "docker/README.md").read_text()
    for image in images():
        name, _, tag = image.rpartition(":")
        assert name and tag and tag != "latest", image
        if (short := name.rpartition("/")[2]) in ours:
            assert tag in ours[short], image
            assert f"/{short}:{tag} ." in readme, image
    for file in re.findall(r"docker build -f (\S+)", readme):
        assert (ROOT / file).is_file()


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_images_are_pinned_small_and_not_root(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in [word for step, rest in steps if step == "COPY" for word in rest.split()[:-1]]:
        assert (ROOT / name).exists() and name in let_in
    assert [rest for step, rest in steps if step == "USER"] == ["1000"]
    for command in [
        part for step, rest in steps if step == "RUN" for part in rest.split("&&") if "pip install" in part
    ]:
        assert "--constraint" in command or "--no-deps" in command
    assert not any(re.search(r"(?i)password|secret|access_key|auth_token", rest) for _, rest in steps)


def test_buckets_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as the service runs it, twice, against a real S3 API."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in SERVICES["buckets"]["environment"].items():
            if name != "AWS_ENDPOINT_URL":
                monkeypatch.setenv(name, value)
        _, script, *names = SERVICES["buckets"]["command"]
        for _ in range(2):
            subprocess.run([sys.executable, HERE / script.lstrip("/"), *names], check=True)
        found = {bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]}
        assert set(names) <= found  # moto keeps one set of buckets a process: other tests have theirs in it
    finally:
        server.stop()
