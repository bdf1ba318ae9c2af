"""The driver is killed in the middle of training; the next run goes on from the last checkpoint."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.conftest import ALIT, ROOT, SMALL, alit, environment, settings

pytestmark = pytest.mark.slow

LONG = ("training.distill.further_steps=30", "training.checkpoint_every=5", "training.eval_every=30")


def run_until(line: str, arguments: list[str], log: Path, timeout_s: float = 300) -> subprocess.Popen[bytes]:
    """Start a run and wait for a progress line that matches ``line``."""
    with log.open("wb") as sink:
        driver = subprocess.Popen([*ALIT, "run", *arguments], stdout=sink, stderr=sink, cwd=ROOT, env=environment())
    deadline = time.monotonic() + timeout_s
    while not re.search(line, log.read_text()):
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return driver


def test_kill_the_driver_in_the_middle_of_distill(tmp_path: Path) -> None:
    """The next run skips what stands, goes on from the last checkpoint, and ends with the weights of an unbroken run.

    Bitwise: each step follows from the seed and its number, and the checkpoint has all the rest.
    """
    arguments = ["demo", *settings(f"workspace={tmp_path}/broken", *SMALL, *LONG)]
    driver = run_until(r"distill +step 1[2-9]/30", arguments, tmp_path / "first.log")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not list((tmp_path / "broken" / "distill").glob("*/artifact.json"))

    second = alit("run", *arguments)
    assert second.code == 0, second.out + second.err
    for stage in ("ingest", "base"):
        assert re.search(rf"^{stage} +reused", second.out, re.MULTILINE), second.out
    resumed = re.search(r"distill +going on from step (\d+)", second.err)
    assert resumed and int(resumed[1]) >= 5, second.err
    for stage in ("distill", "tokenize", "score", "select.reconstruction", "pack.reconstruction", "publish"):
        assert len(list((tmp_path / "broken" / stage).glob("*/artifact.json"))) == 1, stage
    assert not list((tmp_path / "broken").glob(".drafts/*"))

    whole = ["demo", *settings(f"workspace={tmp_path}/whole", *SMALL, *LONG)]
    assert alit("run", *whole, "--until", "distill").code == 0
    weights = [next((tmp_path / name / "distill").glob("*/weights.safetensors")) for name in ("broken", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_interrupt_stops_cleanly(tmp_path: Path) -> None:
    arguments = ["demo", *settings(f"workspace={tmp_path}/w", *SMALL, *LONG)]
    driver = run_until(r"distill +step [5-9]/30", arguments, tmp_path / "log")
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=60) == 128 + signal.SIGINT
    assert re.search(r"^distill +cancelled", (tmp_path / "log").read_text(), re.MULTILINE)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/w/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name == "alit"])
    states = {run.data.tags.get("alit.stage", "parent"): run.info.status for run in runs}
    assert states["parent"] == states["distill"] == "KILLED"
    assert states["ingest"] == "FINISHED"
    assert not (tmp_path / "w" / ".lock").exists()
