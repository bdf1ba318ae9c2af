"""A task and a judge of the user's own through the command, and what a task that is added later costs."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import ALIT, ROOT, SMALL, Result, Workspace, environment, settings

pytestmark = pytest.mark.slow

OWN = (
    "{name: sharpness, kind: 'my_task:Sharpness', judge: 'my_task:Edges', metrics: [kept], "
    "rule: {kind: threshold, metric: kept, min: 0.5}}"
)


def alit(folder: Path, *overrides: str) -> Result:
    """``alit run demo`` until the scores, with ``folder`` on PYTHONPATH."""
    import subprocess

    given = settings(*SMALL, f"workspace={folder}/w", *overrides)
    done = subprocess.run(
        [*ALIT, "run", "demo", *given, "--until", "score"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def newest(folder: Path) -> Path:
    return max((folder / "w" / "score").glob("*/artifact.json"), key=lambda file: file.stat().st_mtime_ns).parent


def figures(folder: Path) -> dict:
    return json.loads((newest(folder) / "artifact.json").read_text())["counts"]


def test_a_task_added_later_is_all_that_is_decoded_for(finished: Workspace, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "class Sharpness(Task)" in block]
    (tmp_path / "my_task.py").write_text(block)

    for stage in ("ingest", "base", "distill", "tokenize", "score"):
        made = finished.artifact(stage)
        shutil.copytree(made, tmp_path / "w" / stage / made.name)
    assert figures(tmp_path)["decoded_tasks"] == "l1 mse psnr" and figures(tmp_path)["decoded_images"] == 90 * 8
    before = pq.read_table(newest(tmp_path) / "table")

    second = alit(tmp_path, f"tasks.1={OWN}")
    assert second.code == 2 and "nothing at '1'" in second.err, "a list grows in a file"
    both = f"tasks=[{{name: reconstruction, metrics: [l1, mse, psnr], rule: {{kind: best, metric: l1}}}}, {OWN}]"
    second = alit(tmp_path, both)
    assert second.code == 0, second.out + second.err
    assert re.search(r"^judge\.sharpness +done", second.out, re.MULTILINE), second.out
    told = figures(tmp_path)
    assert (told["decoded_tasks"], told["copied_columns"]) == ("sharpness", 3)
    after = pq.read_table(newest(tmp_path) / "table")
    assert after.drop(["sharpness.kept"]).equals(before)
    about = json.loads((newest(tmp_path) / "metrics.json").read_text())["sharpness.kept"]
    assert (about["task"], about["direction"], about["missing"]) == ("sharpness", "higher", 0)

    third = alit(tmp_path, f"tasks=[{OWN}]")
    assert third.code == 0, third.out + third.err
    assert figures(tmp_path)["decoded_images"] == 0 and figures(tmp_path)["copied_columns"] == 1
    assert pq.read_table(newest(tmp_path) / "table").column_names == ["image_id", "split", "sharpness.kept"]
