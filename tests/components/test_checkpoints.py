"""Checkpoints: what is kept, what is found again, what damage and a full disk do."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from components.train.checkpoints import CheckpointError, Checkpoints

MIB = 1 << 20


def state(step: int, megabytes: float = 0.1) -> dict[str, object]:
    numbers = torch.randn(int(megabytes * MIB / 4), generator=torch.Generator().manual_seed(step))
    return {"steps_done": step, "players": {"model": {"weights": {"w": numbers}}}, "metrics": {"loss": 1.0 / step}}


def opened(path: Path, said: list[str], keep: int = 2) -> Checkpoints:
    return Checkpoints(str(path), keep=keep, say=said.append)


def steps(path: Path) -> list[int]:
    return [mark.step for mark in opened(path, []).standing()]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, [])
    for step, score in ((1, 0.5), (2, 0.1), (3, None), (4, 0.3), (5, 0.2)):
        checkpoints.save(state(step), step=step, score=score)
    checkpoints.close()
    assert steps(tmp_path) == [2, 4, 5]
    assert opened(tmp_path, []).best() == 2
    found = opened(tmp_path, []).newest()
    assert found is not None and found["steps_done"] == 5
    assert torch.equal(found["players"]["model"]["weights"]["w"], state(5)["players"]["model"]["weights"]["w"])  # type: ignore[index]


def test_what_is_saved_is_what_stood_at_the_call(tmp_path: Path) -> None:
    checkpoints, kept = opened(tmp_path, []), {"steps_done": 1, "w": torch.zeros(MIB)}
    checkpoints.save(kept, step=1, score=None)
    kept["w"].fill_(7.0)  # type: ignore[attr-defined]
    checkpoints.close()
    assert float(opened(tmp_path, []).read(1)["w"].sum()) == 0.0


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    checkpoints = opened(tmp_path, [])
    for step in (1, 2):
        checkpoints.save(state(step), step=step, score=None)
    checkpoints.close()
    file = tmp_path / "step-00000002" / "state.pt"
    if damage == "gone":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-100])
    said: list[str] = []
    found = opened(tmp_path, said).newest()
    assert found is not None and found["steps_done"] == 1
    assert len(said) == 1 and "step 2 is damaged" in said[0] and "one before it" in said[0]
    assert steps(tmp_path) == [1]


def test_nothing_half_written_counts_and_it_is_swept_up(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, [])
    checkpoints.save(state(1), step=1, score=None)
    checkpoints.close()
    half = tmp_path / "step-00000002"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert steps(tmp_path) == [1]
    opened(tmp_path, []).clean()
    assert not half.exists() and steps(tmp_path) == [1]


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    """Somebody who can write the folder can write its sha256 too; what is read must still not run anything."""
    import hashlib
    import json
    import pickle

    folder = tmp_path / "step-00000003"
    folder.mkdir()
    evil = pickle.dumps(os.getcwd)
    (folder / "state.pt").write_bytes(evil)
    mark = {"step": 3, "sha256": hashlib.sha256(evil).hexdigest(), "bytes": len(evil), "score": None}
    (folder / "checkpoint.json").write_text(json.dumps(mark))
    said: list[str] = []
    assert opened(tmp_path, said).newest() is None
    assert len(said) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root, which containers of CI have")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(small_disk: Path) -> None:
    said: list[str] = []
    checkpoints = opened(small_disk, said, keep=1)
    checkpoints.save(state(1, 3.0), step=1, score=None)
    checkpoints.settle()
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 4 * MIB)
    checkpoints.save(state(2, 3.0), step=2, score=None)
    assert checkpoints.settle() is False
    assert len(said) == 1 and "no checkpoint at step 2" in said[0] and "that of step 1" in said[0]
    assert steps(small_disk) == [1] and not (small_disk / "step-00000002").exists()
    ballast.unlink()
    checkpoints.save(state(3, 3.0), step=3, score=None)
    checkpoints.close()
    assert steps(small_disk) == [3]


def test_a_full_disk_at_the_end_is_an_error(small_disk: Path) -> None:
    checkpoints = opened(small_disk, [], keep=1)
    (small_disk / "ballast").write_bytes(b"x" * 7 * MIB)
    checkpoints.save(state(1, 3.0), step=1, score=None)
    with pytest.raises(CheckpointError, match="last checkpoint could not be written"):
        checkpoints.close()


def test_older_ones_make_room(small_disk: Path) -> None:
    """The oldest first; the best only when nothing else but the newest is left."""
    said: list[str] = []
    checkpoints = opened(small_disk, said, keep=2)
    for step in (1, 2):
        checkpoints.save(state(step, 2.0), step=step, score=float(-step))
        checkpoints.settle()
    for step in (3, 4):
        checkpoints.save(state(step, 2.0), step=step, score=float(step))
        checkpoints.settle()
    assert steps(small_disk) == [2, 3, 4] and not said
    checkpoints.save(state(5, 4.5), step=5, score=5.0)
    checkpoints.close()
    assert steps(small_disk) == [4, 5] and "step 2, the best so far, makes room" in said[0]


def test_what_passes_by_costs_no_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    checkpoints = opened(tmp_path, said, keep=2)
    for step, score in ((1, 0.1), (2, 0.5), (3, 0.4)):
        checkpoints.save(state(step), step=step, score=score)
        checkpoints.settle()

    def broken(*_: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION during PutObject")

    with monkeypatch.context() as patched:
        patched.setattr("components.train.checkpoints.torch.save", broken)
        checkpoints.save(state(4), step=4, score=0.3)
        assert checkpoints.settle() is False
    assert steps(tmp_path) == [1, 2, 3] and "no checkpoint at step 4" in said[0]
