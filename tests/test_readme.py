"""What the README says can be typed can be typed."""

import re
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.config import READY
from tests.components.test_pack import packed

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(tmp_path: Path) -> None:
    found = blocks("python")
    assert found
    archive = str(packed(tmp_path, sizes_images=0)[0])
    for block in found:
        exec(compile(block.replace("path/to/archive", archive), "README.md", "exec"), {})


def test_every_command_of_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"^alit ([a-z-]+) ", "\n".join(blocks("text")), re.MULTILINE))
    named |= set(re.findall(r"alit ([a-z]+) CONFIG", README))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert named and named <= set(re.findall(r"^ {4}([a-z-]+)", capsys.readouterr().out, re.MULTILINE))


def test_ready_configs_are_named() -> None:
    for file in READY.glob("*.yaml"):
        assert f"`{file.stem}`" in README


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
