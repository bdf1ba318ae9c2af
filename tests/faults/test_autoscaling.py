"""A cluster of one CPU that Ray's own autoscaler makes larger when a run asks for more."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.nodes import RAY, start, wait_for_nodes
from tests.integration.conftest import SMALL, environment, settings
from tests.integration.test_job_submit import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HEAD = "f" * 51 + "00000"  # the id that Ray's provider of local nodes wants its head to have
UNUSED = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
UNUSED = (*UNUSED, "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
UNUSED = (*UNUSED, "rsync_exclude", "rsync_filter")


def config_of(port: int) -> dict[str, object]:
    """For the autoscaler: a head with one CPU, and up to two nodes with one each, on this machine."""
    small = {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "node_config": {}}
    return {
        "cluster_name": "grows",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "head_node_id": HEAD,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "auth": {"ssh_user": "nobody"},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "small": {**small, "min_workers": 0, "max_workers": 2},
        },
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in UNUSED},
    }


@contextmanager
def growing_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The variables with which a run joins it. All its processes are in one PID namespace and end with it."""
    port = free_port()
    (folder / "autoscaler.json").write_text(json.dumps(config_of(port)))
    variables = environment() | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    place = ["--head", f"--port={port}", f"--autoscaling-config={folder}/autoscaler.json"]
    limits = ["--num-cpus=1", "--object-store-memory=100000000", "--include-dashboard=false"]
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", RAY, "start", *place, "--block", *limits]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
    try:
        yield variables | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        head.kill()
        head.wait()


def test_it_grows_as_far_as_a_run_needs(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a PID namespace needs root, which containers of CI have")
    wanted = (*SMALL, f"workspace={tmp_path}/w", "training.cpus_per_worker=1", "inference.actors={min: 1, max: 3}")
    with growing_cluster(tmp_path) as variables:
        wait_for_nodes(1, variables["RAY_ADDRESS"], variables)
        refused = start(["demo", *settings(*wanted)], tmp_path / "refused", variables)
        assert refused.finish() == 1
        assert "distill wants 2 workers x 1 CPU = 2 CPUs, the cluster has 1" in refused.said
        larger = ["demo", *settings(*wanted, "ray.grows_to.cpus=3"), "--until", "score"]  # the rest needs one CPU
        grown = start(larger, tmp_path / "grown", variables)
        assert grown.finish() == 0, grown.said
        assert cpus(variables) > 1


def cpus(variables: dict[str, str]) -> float:
    """Of all nodes that are up."""
    code = "import ray; ray.init(log_to_driver=False); print(ray.cluster_resources()['CPU'])"
    asked = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    return float(asked.stdout) if asked.returncode == 0 else 0.0
