"""Base tokenizers behind one protocol, and a third one in this one file."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, SMALL_CONFIGS, build, seeded
from torch import Tensor, nn

from model import AlitTokenizer, Threshold
from model.base import Autoencoded, BaseTokenizer, Grid, build_base, register_base
from model.base.convolution import UpsampleConv
from model.base.files import load_base, save_base
from model.base.norm import GroupNorm
from model.config import BASE_CONFIGS, AlitConfig, DistillConfig
from model.finetune import FinetuneObjective
from model.objectives import DistillObjective
from model.recipes import FinetuneConfig


@dataclass(frozen=True)
class PatchConfig:
    """Linear patches: no convolution, codes are projected pixels."""

    kind: Literal["patches"] = "patches"
    patch: int = 4
    embed_dim: int = 12


class Patches(BaseTokenizer):
    default_halting_threshold = 0.05

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.embed_dim = self.output_dim = config.embed_dim
        self.encoder = nn.Conv2d(3, config.embed_dim, config.patch, stride=config.patch)
        self.decoder = nn.ConvTranspose2d(config.embed_dim, 3, config.patch, stride=config.patch)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.weight

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Grid:
        return self.grid(self.encoder(images))

    def grid(self, features_BEhw: Tensor) -> Grid:
        return Grid(features_BEhw, features_BEhw.flatten(2).transpose(1, 2))

    def autoencode(self, images: Tensor, generator: torch.Generator | None) -> Autoencoded:
        grid = self.encode(images)
        return Autoencoded(self.decode(grid.features_BEhw), images.new_zeros(()), None, grid.target.detach())

    def code(self, output_BGO: Tensor) -> Tensor:
        return output_BGO

    def decode(self, code_BEhw: Tensor) -> Tensor:
        return self.decoder(code_BEhw)

    def target_code(self, target: Tensor) -> Tensor:
        return target

    def distance(self, output_BGO: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.mse_loss(output_BGO, target, reduction="none").mean(-1)

    def halted(self, output_BGO: Tensor, target: Tensor, threshold: float, uniform_BG: Tensor | None) -> Tensor:
        return (output_BGO - target).abs().mean(-1) < threshold


@pytest.fixture
def patches(monkeypatch) -> AlitConfig:
    monkeypatch.setattr("model.base._BUILDERS", dict(__import__("model.base").base._BUILDERS))
    for kind in list(BASE_CONFIGS):
        monkeypatch.setitem(BASE_CONFIGS, kind, BASE_CONFIGS[kind])
    register_base(PatchConfig, Patches)
    yield replace(SMALL, base=PatchConfig())
    del BASE_CONFIGS["patches"]


def test_a_third_base_is_one_file(patches, photographs, tmp_path):
    tokenizer, images = build(patches), photographs(3, (32, 32))
    tokenizer.save(tmp_path)
    again = AlitTokenizer.load(tmp_path)
    assert again.config == patches
    tokens = again.encode(images, Threshold("l1", max=0.2))
    assert again.decode(tokens).shape == images.shape
    DistillObjective(again, DistillConfig())(images, seeded()).total.backward()
    finetune = FinetuneConfig(discriminator_channels=8, discriminator_layers=2)
    FinetuneObjective(again, finetune)(images, seeded()).total.backward()
    assert again.base.decoder.weight.grad.abs().max() > 0


def test_a_kind_is_given_once(patches):
    @dataclass(frozen=True)
    class Other:
        kind: Literal["patches"] = "patches"

    with pytest.raises(ValueError, match="'patches' of Other"):
        register_base(Other, Patches)
    values = patches.to_dict() | {"base": {"kind": "unheard"}}
    with pytest.raises(ValueError, match=r"base.kind = 'unheard'.*patches"):
        AlitConfig.from_dict(values)


@pytest.mark.parametrize("kind", ["vqgan", "vae"])
@torch.no_grad()
def test_protocol(photographs, tmp_path, kind):
    base = build(SMALL_CONFIGS[kind]).base
    images = photographs(2, (32, 32))
    grid = base.encode(images)
    assert grid.features_BEhw.shape == (2, base.embed_dim, 8, 8)
    assert base.target_code(grid.target).shape == (2, 64, base.embed_dim)
    codes = base.target_code(grid.target).transpose(1, 2).reshape(2, -1, 8, 8)
    assert base.decode(codes).shape == images.shape
    assert base.distance(torch.zeros(2, 64, base.output_dim), grid.target).shape == (2, 64)
    assert (base.code_table() is None) == (kind == "vae")
    save_base(base, SMALL_CONFIGS[kind].base, tmp_path)
    assert torch.equal(load_base(tmp_path).encode(images).features_BEhw, grid.features_BEhw)


@torch.no_grad()
def test_vqgan_targets_are_the_nearest_entries(photographs):
    base = build(SMALL).base
    grid = base.encode(photographs(2, (32, 32)))
    distances = torch.cdist(grid.features_BEhw.flatten(2).transpose(1, 2), base.codebook.weight.expand(2, -1, -1))
    assert torch.equal(distances.argmin(-1), grid.target)
    with pytest.raises(ValueError, match="posterior_noise"):
        base.encode(photographs(2, (32, 32)), torch.zeros(2, 16, 8, 8))


@torch.no_grad()
def test_vae_posterior(photographs):
    base = build(SMALL_CONFIGS["vae"]).base
    images = photographs(2, (32, 32))
    mean, std = base.posterior(images)
    noise = torch.randn(mean.shape, generator=seeded())
    scale = base.config.latent_scale
    assert torch.allclose(base.encode(images).features_BEhw, scale * mean)
    assert torch.allclose(base.encode(images, noise).features_BEhw, scale * (mean + std * noise))


def test_quirks_change_what_they_should(photographs):
    images = photographs(1, (32, 32))
    with torch.random.fork_rng(), torch.no_grad():
        for field, kind in (("symmetric", "vqgan"), ("symmetric", "vae"), ("unscale", "vae")):
            config = SMALL_CONFIGS[kind].base
            torch.manual_seed(0)
            ours = build_base(config)
            quirky = build_base(replace(config, **{field: False}))
            quirky.load_state_dict(ours.state_dict())
            made = [base.autoencode(images, None).images for base in (ours, quirky)]
            assert not torch.allclose(*made, atol=1e-3), field
        residual = build_base(replace(SMALL.base, shortcut="residual"))
        shapes = {n: p.shape for n, p in residual.named_parameters() if "shortcut" in n}
        assert all(shape[0] == shape[1] for shape in shapes.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_by_fewer_products_is_the_same_with_its_gradients(photographs, layout):
    layer, images = UpsampleConv(3).double(), photographs(2, (24, 17)).double().contiguous(memory_format=layout)
    plain = F.conv2d(F.interpolate(images, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(images), plain, rtol=1e-12, atol=1e-12)
    parameters = (layer.weight, layer.bias)
    found, expected = (torch.autograd.grad(out.square().sum(), parameters) for out in (layer(images), plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_channels_last_norms_are_as_accurate(photographs):
    norm, images = GroupNorm(3, 3), 0.05 * photographs(2, (256, 320)) + 2  # far from 0, where sums of squares lose most
    expected = F.group_norm(images.double(), 3, eps=norm.eps)
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(norm(images.contiguous(memory_format=layout)).double(), expected, rtol=0, atol=1e-4)
