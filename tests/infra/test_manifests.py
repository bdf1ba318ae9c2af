"""Kubernetes and EC2: valid by the operator's and Ray's own schemas, big enough, and without secrets in them."""

import copy
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from pipelines.build import build
from pipelines.cluster import check_demand
from pipelines.config import load_config
from tests.infra.files import (
    AWS,
    COMPOSE,
    INFRA,
    KUBERNETES,
    RAY_OBJECTS,
    ROOT,
    cluster_spec,
    entrypoint_commands,
    job_spec,
    pod_specs,
    without_files,
)

SCHEMAS = os.environ.get("ALIT_KUBERAY_SCHEMAS")
needs_schemas = pytest.mark.skipif(SCHEMAS is None, reason="ALIT_KUBERAY_SCHEMAS names no folder with KubeRay's CRDs")
SECRET = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY")


@lru_cache
def schema(kind: str) -> dict[str, Any]:
    """The schema of ``ray.io/v1``, made strict: the API server drops what it doesn't know, here it is a mistake."""
    assert SCHEMAS is not None
    text = Path(SCHEMAS, f"ray.io_{kind.lower()}s.yaml").read_text()
    crd = yaml.load(
        text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )  # a megabyte: the loader in C where there is one
    (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
    return strict(version["schema"]["openAPIV3Schema"], top=True)


def strict(node: Any, *, top: bool = False) -> Any:
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {name: strict(value) for name, value in node.items()}
    properties = node.get("properties")
    if isinstance(properties, dict) and node.get("type") == "object":
        if "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    if top:
        made["properties"]["metadata"] = {"type": "object"}
    return made


def mistakes(document: Any, rules: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(rules).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


@needs_schemas
@pytest.mark.parametrize("name", RAY_OBJECTS)
def test_ray_objects_are_what_the_operator_takes(name: str) -> None:
    assert mistakes(RAY_OBJECTS[name], schema(RAY_OBJECTS[name]["kind"])) == []


@needs_schemas
def test_the_schema_finds_mistakes() -> None:
    document = copy.deepcopy(RAY_OBJECTS["train-rayjob.yaml:RayJob"])
    document["spec"]["shutdownAfterJobFinish"] = True
    document["spec"]["backoffLimit"] = "two"
    document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imagee"] = "x"
    assert len(mistakes(document, schema("RayJob"))) == 3


@needs_schemas
def test_the_pod_of_the_cron_job_is_one() -> None:
    pod = schema("RayJob")["properties"]["spec"]["properties"]["submitterPodTemplate"]
    template = KUBERNETES["nightly-cronjob.yaml:CronJob"]["spec"]["jobTemplate"]["spec"]["template"]
    assert mistakes(template, pod) == []


def test_the_cron_job_makes_what_its_role_allows() -> None:
    (role,) = KUBERNETES["nightly-cronjob.yaml:Role"]["rules"]
    pod = KUBERNETES["nightly-cronjob.yaml:CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    mounted = pod["volumes"][0]["configMap"]["name"]
    assert "create" in role["verbs"] and role["resources"] == ["rayjobs"]
    assert f"configmap {mounted} --from-file=nightly-rayjob.yaml" in (INFRA / "kuberay/README.md").read_text()
    assert "--filename=/job/nightly-rayjob.yaml" in pod["containers"][0]["args"]


def test_both_nightly_runs_are_the_same() -> None:
    cron = RAY_OBJECTS["nightly-raycronjob.yaml:RayCronJob"]["spec"]
    assert cron["jobTemplate"] == RAY_OBJECTS["nightly-rayjob.yaml:RayJob"]["spec"]
    plain = KUBERNETES["nightly-cronjob.yaml:CronJob"]["spec"]
    assert (cron["schedule"], cron["timeZone"]) == (plain["schedule"], plain["timeZone"])


def test_all_clusters_are_the_same_but_for_their_token() -> None:
    def without_token(document: Mapping[str, Any]) -> dict[str, Any]:
        spec = copy.deepcopy(cluster_spec(dict(document)))
        spec.pop("authOptions", None)
        for pod in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            container = pod["template"]["spec"]["containers"][0]
            container["env"] = [one for one in container["env"] if not one["name"].startswith("RAY_AUTH")]
        return spec

    first, *others = (without_token(document) for document in RAY_OBJECTS.values())
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", RAY_OBJECTS)
def test_pods_are_bounded_unprivileged_and_watched(name: str) -> None:
    document = RAY_OBJECTS[name]
    for pod in pod_specs(document):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()
        if container["name"] != "submitter":
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    cluster = cluster_spec(document)
    by_env = {
        one["name"]: one.get("value") for one in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert cluster.get("authOptions") == {"mode": "token"} or by_env["RAY_AUTH_MODE"] == "token"
    if document["kind"] != "RayCluster":
        job = document["spec"].get("jobTemplate", document["spec"])
        assert job["shutdownAfterJobFinishes"] is True and job["ttlSecondsAfterFinished"] > 0


def kubernetes_totals(document: dict[str, Any]) -> dict[str, float]:
    """CPUs and GPUs of the workers; the head has none for Ray."""
    spec = cluster_spec(document)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    totals = {"CPU": 0.0, "GPU": 0.0}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        totals["CPU"] += group["replicas"] * float(limits["cpu"])
        totals["GPU"] += group["replicas"] * float(limits.get("nvidia.com/gpu", 0))
    return totals


def aws_totals() -> dict[str, float]:
    types = [one for name, one in AWS["available_node_types"].items() if name != AWS["head_node_type"]]
    assert all(one["min_workers"] == one["max_workers"] for one in types)
    return {kind: sum(one["min_workers"] * one["resources"].get(kind, 0) for one in types) for kind in ("CPU", "GPU")}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("place", [*RAY_OBJECTS, "aws.yaml"])
@pytest.mark.parametrize("config", ["train", "nightly"])
def test_what_the_configs_ask_for_is_there(config: str, place: str) -> None:
    (entrypoint, *_) = [job_spec(one)["entrypoint"] for name, one in RAY_OBJECTS.items() if name.startswith(config)]
    words = entrypoint_commands(entrypoint)[0]
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    overrides += ["data.source=demo", *without_files(load_config(words[2], overrides, folders_exist=False))]
    stages = build(load_config(words[2], overrides)).order()
    check_demand(stages, aws_totals() if place == "aws.yaml" else kubernetes_totals(RAY_OBJECTS[place]))


def test_ray_takes_the_ec2_file() -> None:
    rules = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    jsonschema.validate(AWS, rules)
    workers = sum(one.get("max_workers", 0) for one in AWS["available_node_types"].values())
    assert AWS["max_workers"] == workers and AWS["head_node_type"] in AWS["available_node_types"]
    assert any("RAY_AUTH_MODE=token" in option for option in AWS["docker"]["run_options"])


def environment_entries(node: Any) -> list[tuple[str, Any]]:
    """Name and value of each variable anywhere in a document."""
    if isinstance(node, list):
        return [entry for item in node for entry in environment_entries(item)]
    if not isinstance(node, dict):
        return []
    own = node.get("env")
    found = [(one["name"], one.get("value")) for one in own] if isinstance(own, list) else []
    plain = [node[name] for name in ("environment", "data", "stringData") if isinstance(node.get(name), dict)]
    found += [entry for mapping in plain for entry in mapping.items()]
    return found + [entry for value in node.values() for entry in environment_entries(value)]


def test_secrets_are_referred_to_and_never_there() -> None:
    assert not [name for name, document in KUBERNETES.items() if document["kind"] == "Secret"]
    entries = environment_entries([*KUBERNETES.values(), COMPOSE, AWS])
    secret = [(name, value) for name, value in entries if SECRET.search(name) and not name.endswith("ACCESS_KEY_ID")]
    assert len(secret) > 10
    for name, value in secret:
        assert value is None or re.fullmatch(r"\$\{[A-Z0-9_]+:\?see \.env\.example\}", str(value)), name
    example = (INFRA / "compose/.env.example").read_text()
    assert not re.search(r"^[A-Z0-9_]+=.", example, re.MULTILINE)
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
