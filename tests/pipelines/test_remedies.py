"""What a person is told when something fails: one cause, one next step; real errors wherever they can be had."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from components.config import MlflowSettings
from components.store import read_bytes
from components.tracking import TrackingError, open_parent_run, store_for
from pipelines.cli import main
from pipelines.failures import diagnose
from pipelines.remedies import next_step
from tests.s3_server import Fault, Proxy, point


def full_disk() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


def missing_module() -> None:
    import nothing_of_that_name  # noqa: F401


def lost_node() -> None:
    from ray.exceptions import WorkerCrashedError

    raise WorkerCrashedError


def no_memory_on_the_node() -> None:
    from ray.exceptions import OutOfMemoryError

    raise OutOfMemoryError(
        "Task was killed due to the node running low on memory.\nMemory on the node was 15.2GB / 16GB"
    )


def too_many_images() -> None:
    raise MemoryError("a worker ran out of memory with 8 images at once: set training.micro_batch=4; …")


def closed_port() -> None:
    import socket

    socket.create_connection(("127.0.0.1", 9), timeout=5)


def bad_value() -> None:
    raise ValueError("data.source '/nowhere': no good image in it")


def cause_of(fail: Callable[[], None]) -> str:
    with pytest.raises(Exception) as caught:
        fail()
    return diagnose(caught.value).cause


@pytest.mark.parametrize(
    ("fail", "cause", "step"),
    [
        (full_disk, "No space left on device", "make room"),
        (missing_module, "ModuleNotFoundError: No module named 'nothing_of_that_name'", "install it"),
        (lost_node, "WorkerCrashedError", "whether memory ran out"),
        (no_memory_on_the_node, "OutOfMemoryError: Task was killed", "training.micro_batch"),
        (too_many_images, "set training.micro_batch=4", "do what it says"),
        (closed_port, "ConnectionRefusedError", "when the other side answers"),
        (bad_value, "ValueError: data.source '/nowhere'", "mend what the cause names"),
    ],
)
def test_a_cause_has_a_next_step(fail: Callable[[], None], cause: str, step: str) -> None:
    told = cause_of(fail)
    assert cause in told and "\n" not in told
    assert step in next_step(told) and "same command again" in next_step(told)


def test_what_a_bucket_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy("http://127.0.0.1:9", lambda *_: Fault(status=403, code="AccessDenied")).serve() as endpoint:
        point(monkeypatch, endpoint)
        told = cause_of(lambda: read_bytes("s3://bucket/file"))
    assert "credentials of every node" in next_step(told), told


def test_mlflow_that_does_not_answer_is_told_in_one_line(tmp_path: Path) -> None:
    store = store_for(MlflowSettings(uri="http://me:secret@127.0.0.1:9"), str(tmp_path))
    with pytest.raises(TrackingError) as caught:
        open_parent_run(store, "run", {})
    told = str(caught.value)
    assert os.strerror(errno.ECONNREFUSED) in told and "secret" not in told and len(told) < 120, told
    assert "start the MLflow server" in next_step(f"TrackingError: {told}")


def test_a_run_that_cannot_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--set", f"workspace={tmp_path}/w", "--set", "ray.address=ray://127.0.0.1:9")
    assert main(["run", "demo", *settings]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert [line.split()[0] for line in told] == ["error:", "next:", "log:"], told
    assert "ray.address" in told[0] and "RAY_ADDRESS" in told[1]
    assert "Traceback" in Path(told[2].split()[1]).read_text()
