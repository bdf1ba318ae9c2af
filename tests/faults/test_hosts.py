"""Three hosts that share nothing but a bucket train, tokenize and score, and rerun; one is lost on the way."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components import buckets
from tests.faults.hosts import Hosts, hosts, names_in
from tests.faults.nodes import Run
from tests.integration.conftest import SMALL, settings
from tests.integration.test_s3_run import photographs
from tests.s3_server import client_of, point, upload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

IMAGES, NEW = 240, 9
COMMON = (
    "data.source=s3://photos/in",
    "data.crops=90",
    "inference.actors=3",
    "inference.batch_size=8",
    "ingest.files_per_block=8",
)
VALUES = (*SMALL, *COMMON, "training.cpus_per_worker=1")


def test_three_hosts_without_a_common_folder_and_one_of_them_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root, which containers of CI have")
    photographs(tmp_path / "photos", IMAGES)
    with hosts(2, tmp_path) as three:
        client = client_of(three.endpoint)
        for bucket in ("photos", "work"):
            client.create_bucket(Bucket=bucket)
        upload(client, tmp_path / "photos", "photos", "in/")
        point(monkeypatch, three.endpoint)

        lost = three.run(run_of("s3://work/a"), tmp_path / "lost.log")
        wait_until(lambda: trainers(three) == 2, lost)
        lost.wait_for(r"tokenize +\d+ images +[2-9]/30 files")
        wait_until(lambda: tokenizers(three), lost)  # on a busy machine the head's has begun before the others are up
        victim = tokenizers(three)[0]
        three.kill(victim)
        assert lost.finish() == 0, lost.said
        assert table(client, "s3://work/a", "tokenize").num_rows == IMAGES
        kept = {stage: table(client, "s3://work/a", stage) for stage in ("tokenize", "score")}
        assert not [name for name in names_in(client, "work") if ".drafts/" in name and not name.endswith("/")]

        again(three, victim)
        forced = run_of("s3://work/a", "--force", "tokenize", "--force", "score", "--until", "score")
        whole = three.run(forced, tmp_path / "whole.log")
        assert whole.finish() == 0, whole.said
        for stage, before in kept.items():
            assert table(client, "s3://work/a", stage).equals(before)

        photographs(tmp_path / "new", NEW)
        upload(client, tmp_path / "new", "photos", "in/new/")
        few = settings("workspace=s3://work/a", *COMMON, "inference.actors=1")
        night = three.run(["rerun", *few], tmp_path / "night.log")
        assert night.finish() == 0, night.said
        assert re.search(
            rf"^images +{IMAGES + NEW}, .*added {NEW} .*encoded {NEW} +scored {NEW}", night.said, re.MULTILINE
        )


def run_of(workspace: str, *more: str) -> list[str]:
    return ["demo", *settings(f"workspace={workspace}", *VALUES), *more]


def trainers(three: Hosts) -> int:
    """Hosts with a training worker."""
    return sum(three.working(number, "ray::RayTrainWorker") for number in range(3))


def tokenizers(three: Hosts) -> list[int]:
    """Hosts but the head that have an actor of tokenize."""
    return [number for number in (1, 2) if three.working(number, "ray::MapWorker")]


def wait_until(true: Any, run: Run) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert run.process.poll() is None, run.said
        assert time.monotonic() < deadline, run.said
        time.sleep(0.2)


def again(three: Hosts, number: int) -> None:
    """The lost host comes back."""
    three.start(number)
    three.wait_for_nodes(3)


def table(client: Any, workspace: str, stage: str) -> pa.Table:
    """The stage's table, from the bucket itself."""
    prefix = f"{workspace.removeprefix('s3://work/')}/{stage}/"
    (manifest,) = [name for name in names_in(client, "work", prefix) if name.endswith("artifact.json")]
    folder = manifest.rpartition("/")[0]
    return pq.read_table(f"work/{folder}/table", filesystem=buckets.filesystem("work"))
