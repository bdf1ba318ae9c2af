"""What a submitted job brings along, and what is found out before anything is sent."""

import os
import zipfile
from pathlib import Path

import pytest

from pipelines.bundle import CONFIG_FOLDER, LIMIT_BYTES, make_bundle
from pipelines.cli import main
from pipelines.config import READY, ConfigError

DEMO = READY / "demo.yaml"
ROOT = Path(__file__).parents[2]
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing answers


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names(folder: Path, output: Path) -> set[str]:
    with zipfile.ZipFile(make_bundle(folder, config=DEMO, output=output).file) as archive:
        return set(archive.namelist())


def test_code_goes_and_the_rest_stays(tmp_path: Path) -> None:
    code = tmp_path / "code"
    write(code, "model/a.py", "model/data/b.py", "runs.py", "sub/keep.txt", "data.yaml")
    write(
        code, ".venv/x", ".git/x", ".env", "venv/x", "data/x.jpg", "runs/w/x", "mlruns/x", "mlflow.db", "a.egg-info/x"
    )
    write(
        code, "model/__pycache__/a.pyc", ".mypy_cache/x", "node_modules/x", "by_git.bin", "sub/by_ray.bin", "sub/deep/x"
    )
    (code / ".gitignore").write_text("by_git.bin\n")
    (code / "sub/.rayignore").write_text("*.bin\n/deep/\n")
    os.symlink(code, code / "sub/loop")
    kept = {"model/a.py", "model/data/b.py", "runs.py", "sub/keep.txt", "data.yaml"}
    assert names(code, tmp_path / "b.zip") == kept | {f"{CONFIG_FOLDER}/demo.yaml"}


def test_this_repository_is_small_and_whole(tmp_path: Path) -> None:
    bundle = make_bundle(ROOT, config=DEMO, output=tmp_path / "b.zip")
    assert bundle.size_bytes < LIMIT_BYTES / 2
    with zipfile.ZipFile(bundle.file) as archive:
        assert {"pipelines/cli.py", "model/starter/weights.safetensors", "pipelines/configs/demo.yaml"} <= {
            *archive.namelist()
        }
        assert archive.read(bundle.config) == DEMO.read_bytes()


def test_the_same_files_make_the_same_zip(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, "b.py", "a.py")
    os.utime(tmp_path / "two/a.py", (0, 0))
    first, second = (
        make_bundle(tmp_path / name, config=DEMO, output=tmp_path / f"{name}.zip").file.read_bytes()
        for name in ("one", "two")
    )
    assert first == second


def test_too_much_is_refused_and_the_biggest_named(tmp_path: Path) -> None:
    write(tmp_path, "small.py")
    for name, mib in (("big.bin", 40), ("bigger.bin", 41)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(mib * 2**20)
    with pytest.raises(ConfigError, match=r"81\.0 MiB.*bigger\.bin \(41\.0 MiB\), big\.bin \(40\.0 MiB\).*\.rayignore"):
        make_bundle(tmp_path, config=DEMO, output=tmp_path / "b.zip")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "config 'nowhere.yaml': no such file"),
        (["demo", "--set", "data.image_size=66"], "data.image_size = (66, 66)"),
        (["demo"], "workspace = 'runs/demo'"),
        (["demo", "--set", "workspace=/w", "--env", "ALIT_IS_NOT_SET"], "--env ALIT_IS_NOT_SET: not set"),
        (["demo", "--set", "workspace=/w", "--env", "KEY=hidden"], "--env: the name of a variable"),
        (["demo", "--set", "workspace=/w", "--working-dir", "/nowhere"], "--working-dir '/nowhere'"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *arguments, "--address", NOBODY]) == 2
    told = capsys.readouterr()
    assert said in told.err and "hidden" not in told.err + told.out


def test_folders_of_the_cluster_need_not_be_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = ["--set", "workspace=/w", "--set", "training.from=/on/the/cluster", "--set", "data.source=/also/there"]
    assert main(["submit", "demo", *elsewhere, "--address", NOBODY, "--working-dir", str(tmp_path)]) == 1
    assert f"{NOBODY} can't be reached" in capsys.readouterr().err
    assert main(["plan", "demo", *elsewhere]) == 2


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "auto"])
def test_the_dashboard_s_address_is_asked_for(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--set", "workspace=/w", "--address", address, "--working-dir", str(tmp_path)]
    assert main(["submit", "demo", *given]) == 2
    assert f"--address '{address}'" in capsys.readouterr().err
