"""``alit import-checkpoint`` on recorded weights of the authors' code."""

import os
from pathlib import Path

import pytest

from model import AlitTokenizer
from pipelines.cli import main

NEEDS_RECORDINGS = pytest.mark.skipif(
    "ALIT_PARITY" not in os.environ, reason="ALIT_PARITY names no folder of recorded numbers of the authors' code"
)


def fixture(name: str) -> Path:
    return Path(os.environ["ALIT_PARITY"]) / name


@NEEDS_RECORDINGS
@pytest.mark.parametrize(("name", "base"), [("A_vqgan_quantized", "vqgan"), ("C_vae_quantized", "vae")])
def test_a_checkpoint_becomes_a_tokenizer(name: str, base: str, tmp_path: Path) -> None:
    weights, config = fixture(name) / "state_dict.safetensors", fixture(name) / "config.json"
    arguments = [str(weights), "--base", base, "--config", str(config), "--output", str(tmp_path)]
    assert main(["import-checkpoint", *arguments]) == 0
    tokenizer = AlitTokenizer.load(tmp_path)
    assert tokenizer.config.base.kind == base and tokenizer.budgets[-1] == 256


@NEEDS_RECORDINGS
def test_a_wrong_size_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = fixture("A_vqgan_quantized") / "state_dict.safetensors"
    assert main(["import-checkpoint", str(weights), "--base", "vqgan", "--output", str(tmp_path)]) == 2
    assert "width 64" in capsys.readouterr().err


def test_a_missing_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-checkpoint", "/no/such.pth", "--base", "vqgan", "--output", str(tmp_path)]) == 2
    assert "/no/such.pth" in capsys.readouterr().err
