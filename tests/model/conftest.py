"""Photographs, small tokenizers and the recorded numbers of the authors' code."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

from model.config import AlitConfig, HaltingConfig, VAEConfig, VQGANConfig
from model.tokenizer import AlitTokenizer

# A busy machine is no failure of a property.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

VARIABLE = "ALIT_PARITY"
SMALL_VQGAN = VQGANConfig(
    channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, embed_dim=16, codebook_size=64, num_groups=4
)
SMALL_VAE = VAEConfig(channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, embed_dim=8, num_groups=4)
SMALL = AlitConfig(
    image_size=(32, 32),
    base=SMALL_VQGAN,
    budgets=(4, 8, 12, 16),
    encoder_width=48,
    encoder_layers=2,
    encoder_heads=4,
    decoder_width=48,
    decoder_layers=2,
    decoder_heads=4,
    codebook_size=64,
    latent_dim=6,
)
SMALL_CONFIGS = {
    "vqgan": SMALL,
    "continuous": replace(SMALL, codebook_size=None),
    "wide latents": replace(SMALL, codebook_size=None, latent_dim=None),
    "vae": replace(SMALL, base=SMALL_VAE),
    "halting": replace(SMALL, halting=HaltingConfig(True, 0.05)),
    "vae halting": replace(SMALL, base=SMALL_VAE, halting=HaltingConfig(True, 0.05)),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: AlitConfig, seed: int = 0) -> AlitTokenizer:
    """A tokenizer with random weights, in eval mode; its base's codebook lies where its features do."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = AlitTokenizer(config).eval()
        table = tokenizer.base.code_table()
        if table is not None:
            torch.nn.init.normal_(table.weight, std=0.5)
        return tokenizer


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors gain nothing from a second thread, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small() -> Callable[..., AlitTokenizer]:
    """Small tokenizers by name, random weights."""
    return lambda name="vqgan", **changes: build(replace(SMALL_CONFIGS[name], **changes))


@pytest.fixture(scope="session")
def photographs() -> Callable[[int, tuple[int, int]], Tensor]:
    """Real photographs from inside the wheels: ``photographs(count, (height, width))`` float32 in [0, 1]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    shots = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]

    def crops(count: int, size: tuple[int, int]) -> Tensor:
        images = []
        for number in range(count):
            shot, part = shots[number % len(shots)], number // len(shots)
            side = min(shot.shape[:2]) // (1 + part)
            top, left = (shot.shape[0] - side) // 2, (shot.shape[1] - side) // 2
            square = torch.from_numpy(np.ascontiguousarray(shot[top : top + side, left : left + side]))
            pixels = square.permute(2, 0, 1)[None].float() / 255
            images.append(F.interpolate(pixels, size=size, mode="bilinear", antialias=True))
        return torch.cat(images).clamp(0, 1)

    return crops


def parity_folder() -> Path:
    """Where the recorded numbers are; skips the test, saying why, where they are not."""
    folder = Path(os.environ.get(VARIABLE, ""))
    if VARIABLE not in os.environ or not folder.is_dir():
        pytest.skip(f"no recorded numbers of the authors' code: {VARIABLE} names no folder of them")
    return folder


class Recorded(NamedTuple):
    """A fixture: the authors' config, weights by their names, inputs, outputs."""

    config: dict[str, Any]
    folder: Path
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def images(self) -> Tensor:
        return self.inputs["images_u8"].float() / 255

    @property
    def noise(self) -> dict[str, Any]:
        """What the authors drew, for ``AlitTokenizer.rollout``."""
        halting = [self.inputs[f"uniform_{k}"] for k in range(8)] if "uniform_0" in self.inputs else None
        return {"posterior_noise": self.inputs.get("vae_noise"), "halting_noise": halting}


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], Recorded]:
    """Fixtures of the authors' code by folder name."""

    def read(name: str) -> Recorded:
        folder = parity_folder() / name
        files = [load_file(folder / f"{part}.safetensors") for part in ("inputs", "outputs")]
        return Recorded(json.loads((folder / "config.json").read_text()), folder, *files)

    return read
