"""Other sizes: 512 px from a 256 px checkpoint, grids that aren't square, budgets of unequal steps."""

from dataclasses import replace

import pytest
import torch
from conftest import SMALL, SMALL_CONFIGS, build, seeded

from model import AlitTokenizer, Threshold
from model.config import DistillConfig, VAEConfig, VQGANConfig
from model.objectives import DistillObjective
from model.tokenizer import resize_positions

F16 = {"channel_multipliers": (1, 1, 1, 1, 1), "channels": 8, "num_res_blocks": 1, "num_groups": 4}
AT_256 = replace(
    SMALL,
    image_size=(256, 256),
    budgets=(32, 64, 96, 128, 160, 192, 224, 256),
    base=VQGANConfig(**F16, embed_dim=16, codebook_size=64),
)


@pytest.mark.parametrize("base", ["vqgan", "vae"])
@torch.no_grad()
def test_512_px_from_a_256_px_checkpoint(photographs, tmp_path, base):
    config = AT_256 if base == "vqgan" else replace(AT_256, base=VAEConfig(**F16, embed_dim=8))
    build(config).save(tmp_path / "256")
    large = AlitTokenizer.load(tmp_path / "256").resized((512, 512))
    assert large.config.grid == (32, 32)
    large.save(tmp_path / "512")
    large = AlitTokenizer.load(tmp_path / "512")
    images = photographs(2, (512, 512))
    step = next(large.rollout(images))
    assert step.target.shape[1] == step.grid.shape[1] == 1024
    tokens = large.encode(images, 64)
    assert tokens.num_tokens.tolist() == [64, 64]
    decoded = large.decode(tokens)
    assert decoded.shape == images.shape and torch.isfinite(decoded).all()
    assert large.encode(images, Threshold("l1", max=1.0)).num_tokens.tolist() == [32, 32]


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_a_grid_that_is_not_square(photographs, name):
    tokenizer = build(replace(SMALL_CONFIGS[name], image_size=(24, 40)))
    assert tokenizer.config.grid == (6, 10)
    images = photographs(2, (24, 40))
    tokens = tokenizer.encode(images, Threshold("l1", max=0.0))
    assert tokens.num_tokens.tolist() == [16, 16]
    with torch.no_grad():
        *_, last = tokenizer.rollout(images)
    assert (tokenizer.decode(tokens) - last.images.clamp(0, 1)).abs().max() < 1e-5
    loss = DistillObjective(tokenizer, DistillConfig())(images, seeded())
    loss.total.backward()
    assert tokenizer.encoder.positions.grad.abs().sum(1).min() > 0


def test_rows_and_columns_are_not_mixed_up(photographs):
    """A bright left half makes bright left grid features and, decoded by the base alone, a bright left half."""
    tokenizer = build(replace(SMALL, image_size=(24, 40)))
    images = photographs(1, (24, 40))
    grid = tokenizer.base.encode(images)
    codes = tokenizer.base.codebook.weight[grid.target].transpose(1, 2).reshape(1, -1, 6, 10)
    one_hot = torch.nn.functional.one_hot(grid.target, 64).float()
    sure = tokenizer.grid_to_images(one_hot * 1000)
    assert torch.allclose(sure, tokenizer.base.decode(codes), atol=1e-4)


def test_resized_positions_keep_the_class_token_and_the_picture():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    table = torch.cat([torch.tensor([[7.0, 8.0]]), torch.stack([rows.flatten(), columns.flatten()], dim=1)])
    larger = resize_positions(table, (16, 16), (32, 24))
    assert larger.shape == (1 + 32 * 24, 2)
    assert larger[0].tolist() == [7.0, 8.0]
    picture = larger[1:].view(32, 24, 2)
    assert (picture[1:, :, 0] >= picture[:-1, :, 0] - 1e-3).all() and (
        picture[:, 1:, 1] >= picture[:, :-1, 1] - 1e-3
    ).all()
    assert (picture[..., 0].std(1) < 1e-5).all() and (picture[..., 1].std(0) < 1e-5).all()
    assert torch.allclose(resize_positions(table, (16, 16), (16, 16)), table, atol=1e-6)
    assert torch.allclose(resize_positions(larger, (32, 24), (16, 16)), table, atol=0.03)


@torch.no_grad()
def test_resized_to_its_own_size_is_the_same_and_a_copy(photographs):
    tokenizer = build(SMALL)
    same = tokenizer.resized(SMALL.image_size)
    images = photographs(2, (32, 32))
    assert (next(tokenizer.rollout(images)).images - next(same.rollout(images)).images).abs().max() < 1e-5
    same.encoder.latent_tokens.zero_()
    assert tokenizer.encoder.latent_tokens.abs().max() > 0
    with pytest.raises(ValueError, match="image_size"):
        tokenizer.resized((30, 32))


@torch.no_grad()
def test_steps_of_unequal_size(photographs):
    tokenizer, images = build(replace(SMALL, budgets=(2, 8, 11))), photographs(2, (32, 32))
    assert [step.latents.shape[1] for step in tokenizer.rollout(images)] == [2, 8, 11]
    assert tokenizer.decode(tokenizer.encode(images, 11)).shape == images.shape
