"""What lies in infra/, read once, and the commands in it."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.config import PipelineConfig, RunConfig

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SETTINGS: dict[str, str] = yaml.safe_load((INFRA / "kuberay/settings.yaml").read_text())["data"]


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


KUBERNETES = {
    f"{path.name}:{document['kind']}": document
    for path in sorted((INFRA / "kuberay").glob("*.yaml"))
    for document in documents(path)
}
RAY_OBJECTS = {name: one for name, one in KUBERNETES.items() if one["apiVersion"] == "ray.io/v1"}
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose/compose.yaml").read_text())
BEFORE = {"docker", "compose", "run", "--rm", "job", "registry.example.com/alit:0.1.0-cpu"}  # a command in a container
AWS: dict[str, Any] = yaml.safe_load((INFRA / "ray/aws.yaml").read_text())


def job_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The RayJob spec of a RayJob or a RayCronJob."""
    return document["spec"].get("jobTemplate", document["spec"])


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster spec of any of them."""
    return job_spec(document).get("rayClusterSpec", document["spec"])


def pod_specs(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Head, worker groups and submitter."""
    cluster = cluster_spec(document)
    submitter = job_spec(document).get("submitterPodTemplate")
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    return [template["spec"] for template in [*templates, *([submitter] if submitter else [])]]


def expand(script: str, variables: dict[str, str], *, shell: str = "sh") -> list[str]:
    """The words that a shell makes of a command in an environment of just these variables."""
    done = subprocess.run(
        [shell, "-c", f"printf '%s\\0' {script}"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\0")[:-1]


def entrypoint_commands(entrypoint: str) -> list[list[str]]:
    """What the head runs, one after the other: the submitting pod's shell reads the entrypoint, ``ray job submit``
    quotes what that made of it, and the head's shell, which has the settings, reads it again."""
    from_submitter = shlex.join(expand(entrypoint, {}, shell="bash"))
    on_head = expand(from_submitter, SETTINGS)
    assert on_head[:2] == ["sh", "-c"]
    return [expand(command, SETTINGS) for command in on_head[2].split("&&")]


def readme_commands() -> Iterator[tuple[str, list[str]]]:
    """README and words of each ``alit`` and ``ray`` command in its bash blocks."""
    for readme in sorted(INFRA.rglob("README.md")):
        for block in re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = [word for word in shlex.split(line, comments=True) if word != "&"]
                while words and (re.match(r"\w+=", words[0]) or words[0] in BEFORE):
                    words = words[1:]
                if words and words[0] in ("alit", "ray"):
                    yield str(readme.relative_to(ROOT)), words


def without_files(config: PipelineConfig) -> list[str]:
    """Settings that let ``config`` do without the weights that its cluster's nodes have."""
    lpips = isinstance(config, RunConfig) and config.training.finetune_objective.perceptual.weights is not None
    return ["training.finetune_objective.perceptual={kind: efficientnet}"] if lpips else []
